"""The card of a trained model: how to build it, which features it reads, and what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from antdist.config.schema import ModelConfig, Strategy
from antdist.features.table import has_table, open_table
from antdist.model.io import FeatureSource, ModelCard
from antdist.runs.inputs import Inputs


def model_card(
    kind: Literal["pretrained", "adapted"],
    config: ModelConfig,
    inputs: Inputs,
    *,
    seed: int,
    domains: Sequence[str],
    made: dict[str, Any],
    target: str | None = None,
    strategy: Strategy | None = None,
) -> ModelCard:
    """Make the card of a model trained on `inputs`; `domains` are those of its pre-training."""
    return ModelCard(
        kind=kind,
        config=config,
        dims=dict(inputs.catalogue.dims),
        catalogue_size=inputs.catalogue.size if config.item_embeddings else None,
        features=_feature_sources(inputs),
        domains=list(domains),
        target=target,
        strategy=strategy,
        seed=seed,
        made=made,
    )


def _feature_sources(inputs: Inputs) -> dict[str, FeatureSource]:
    """Find the encoder of each modality that the run reads."""
    sources = {}
    for modality, identity in inputs.catalogue.identities.items():
        tables = [open_table(d, modality).meta for d in inputs.domains if has_table(d, modality)]
        encoder = next((meta.encoder for meta in tables if meta.identity == identity), {})
        sources[modality] = FeatureSource(identity=identity, encoder=dict(encoder))
    return sources
