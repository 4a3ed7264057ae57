"""Adaptation strategies: what each inherits from the pre-trained model and what it trains.

Section 6 of the spec.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from antdist.config.schema import ModelConfig, Strategy, Variant
from antdist.config.semantics import defining
from antdist.errors import UserError
from antdist.model.initialisation import centre_tower, redraw_experts
from antdist.model.recommender import Recommender, build_recommender, parameter_groups


@dataclass(frozen=True)
class Treatment:
    """How a strategy treats one parameter group."""

    inherited: bool  # initial values come from the parent
    trained: bool


FRESH, KEPT, FROZEN = Treatment(False, True), Treatment(True, True), Treatment(True, False)

#                                    THETA (items)    P (positions)        PHI (transformer)
_TABLE: dict[Strategy, tuple[Treatment, Treatment, Treatment]] = {
    "scratch": (FRESH, FRESH, FRESH),
    "finetune": (KEPT, FROZEN, FROZEN),
    "finetune_all": (KEPT, KEPT, KEPT),
    "relearn": (FRESH, FRESH, FROZEN),
}


def treatments(strategy: Strategy, variants: Collection[Variant] = ()) -> dict[str, Treatment]:
    """Map each group of `parameter_groups` to its treatment under a strategy and its variants.

    PHI is the transformer and the input LayerNorm; price biases belong to THETA; item embeddings (ANT_t) are always
    fresh, as the parent has other items. The variants: `learn_input_norm` trains the input LayerNorm of a frozen
    transformer; `keep_price_bias` lets `relearn` inherit c_k; `redraw_positions` lets `finetune` train a fresh P.
    """
    theta, positions, phi = _TABLE[strategy]
    table = {
        "theta": theta,
        "price_bias": theta,
        "positions": positions,
        "phi": phi,
        "input_norm": phi,
        "item_embeddings": FRESH,
    }
    if "learn_input_norm" in variants and phi is FROZEN:
        table["input_norm"] = KEPT
    if "keep_price_bias" in variants and strategy == "relearn":
        table["price_bias"] = KEPT
    if "redraw_positions" in variants and strategy == "finetune":
        table["positions"] = FRESH
    return table


def needs_parent(strategy: Strategy) -> bool:
    """Whether the strategy inherits any group."""
    return any(treatment.inherited for treatment in treatments(strategy).values())


def adapt(
    strategy: Strategy,
    config: ModelConfig,
    dims: dict[str, int],
    *,
    parent: Recommender | None,
    variants: Collection[Variant] = (),
    catalogue_size: int | None = None,
    means: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Recommender:
    """Build a strategy's initial model: fresh groups initialised by `seed`, the others inherited.

    Dropout stays active in a frozen transformer, as in the reference.

    Args:
        dims: feature dimensions of the target; of the parent if THETA is inherited.
        parent: the pre-trained model; `scratch` ignores it.
        means: feature means of the target, to centre a fresh item tower; None leaves its shifts at zero.

    Raises:
        UserError: a parent is missing, or was built with another configuration.
    """
    if needs_parent(strategy) and parent is None:
        raise UserError(
            f"strategy {strategy} starts from a pre-trained model",
            where="from",
            remedy="give one, e.g. from=models:/NAME/latest",
        )
    table = treatments(strategy, variants)
    if parent is not None:
        _check_same_build(config, parent.config, table)
    model = build_recommender(config, dims, catalogue_size, seed)
    if strategy == "relearn" and config.initialisation == "reference":
        redraw_experts(model, seed)
    if means is not None:
        centre_tower(model.tower, means)
    groups = parameter_groups(model)
    inherited = dict(parent.named_parameters()) if parent is not None else {}
    for group, treatment in table.items():
        for name in groups[group]:
            parameter = model.get_parameter(name)
            if treatment.inherited:
                _inherit(parameter, inherited.get(name), name)
            parameter.requires_grad_(treatment.trained)
    return model


def _check_same_build(config: ModelConfig, parent: ModelConfig, table: dict[str, Treatment]) -> None:
    for group, treatment in table.items():
        for key in defining(group) if treatment.inherited else ():
            there, here = getattr(parent, key), getattr(config, key)
            if there != here and (key != "experts" or config.mixture):
                raise UserError(
                    f"the parent has {there}, the configuration {here}",
                    where=f"model.{key}",
                    remedy=f"set model.{key}={str(there).lower()}, as in the parent's pre-training",
                )


def _inherit(parameter: torch.nn.Parameter, source: torch.Tensor | None, name: str) -> None:
    if source is None or source.shape != parameter.shape:
        there = "missing" if source is None else f"of shape {tuple(source.shape)}"
        raise UserError(
            f"the parent's {name} is {there}; the configuration needs shape {tuple(parameter.shape)}",
            where="from",
            remedy="adapt a parent with the modalities and feature dimensions of the target",
        )
    with torch.no_grad():
        parameter.copy_(source)
