"""The card of a trained model: its features and its catalogue."""

from __future__ import annotations

from pathlib import Path

from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig
from antdist.features.table import encoder_identity
from antdist.runs.cards import model_card
from antdist.runs.inputs import open_pretrain_inputs
from tests.worlds import make_domain


def test_card_names_encoders_that_the_first_domain_lacks(tmp_path: Path) -> None:
    make_domain(tmp_path, "plain", dims={"text": 12})
    make_domain(tmp_path, "whole", dims={"text": 12, "image": 10})
    tree = {"data": {"root": str(tmp_path), "domains": ["plain", "whole"]}, "model": {"modalities": ["text", "image"]}}
    inputs, _ = open_pretrain_inputs(check_config(PretrainConfig, tree), {})
    config = ModelConfig(modalities=["text", "image"])
    card = model_card("pretrained", config, inputs, seed=3, domains=["plain", "whole"], made={"epoch": 2})
    encoder = {"name": "random", "digest": "random"}
    assert {modality: source.encoder for modality, source in card.features.items()} == dict.fromkeys(card.dims, encoder)
    assert card.features["image"].identity == encoder_identity("image", encoder, 10)
    assert (card.dims, card.seed, card.made, card.catalogue_size) == ({"text": 12, "image": 10}, 3, {"epoch": 2}, None)
    transductive = config.model_copy(update={"item_embeddings": True})
    assert model_card("adapted", transductive, inputs, seed=0, domains=[], made={}).catalogue_size == 60
