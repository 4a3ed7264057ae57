"""What each strategy inherits and trains, against the table of the spec, section 6."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from antdist.batch import ItemInputs
from antdist.config.schema import ModelConfig
from antdist.errors import UserError
from antdist.model.recommender import build_recommender, parameter_groups
from antdist.training.adaptation import adapt

CONFIG = ModelConfig(dim=8, experts=2, inner=8, max_length=5)
DIMS = {"text": 6, "image": 5, "price": 4}

# group -> (inherited, trained), copied from the spec
EXPECTED = {
    "scratch": {"theta": (False, True), "positions": (False, True), "phi": (False, True)},
    "finetune": {"theta": (True, True), "positions": (True, False), "phi": (True, False)},
    "finetune_all": {"theta": (True, True), "positions": (True, True), "phi": (True, True)},
    "relearn": {"theta": (False, True), "positions": (False, True), "phi": (True, False)},
}


def parent() -> torch.nn.Module:
    model = build_recommender(CONFIG, DIMS, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("strategy", list(EXPECTED))
def test_groups_are_inherited_and_trained_by_the_table(strategy: str) -> None:
    source = parent()
    model = adapt(strategy, CONFIG, DIMS, parent=source, seed=2)
    fresh = build_recommender(CONFIG, DIMS, seed=2)
    expected = EXPECTED[strategy]
    for group, names in parameter_groups(model).items():
        inherited, trained = (
            expected[{"price_bias": "theta", "input_norm": "phi"}.get(group, group)] if names else (0, 0)
        )
        for name in names:
            origin = source if inherited else fresh
            assert torch.equal(model.get_parameter(name), origin.get_parameter(name)), name
            assert model.get_parameter(name).requires_grad is trained, name


def test_reference_variants_change_one_group_each() -> None:
    source = parent()
    norm = adapt("relearn", CONFIG, DIMS, parent=source, variants=["learn_input_norm"])
    assert norm.get_parameter("encoder.input_norm.weight").requires_grad
    assert not any(norm.get_parameter(n).requires_grad for n in parameter_groups(norm)["phi"])
    price = adapt("relearn", CONFIG, DIMS, parent=source, variants=["keep_price_bias"])
    assert torch.equal(price.get_parameter("tower.price.bias"), source.get_parameter("tower.price.bias"))
    positions = adapt("finetune", CONFIG, DIMS, parent=source, variants=["redraw_positions"])
    assert not torch.equal(positions.positions.weight, source.positions.weight)
    assert positions.positions.weight.requires_grad


def test_reference_initialisation_redraws_experts_of_relearn() -> None:
    config = CONFIG.model_copy(update={"initialisation": "reference"})
    scratch = adapt("scratch", config, DIMS, parent=None, seed=3)
    relearn = adapt("relearn", config, DIMS, parent=parent(), seed=3)
    assert 0.015 < scratch.get_parameter("tower.text.weight").std() < 0.025
    assert relearn.get_parameter("tower.text.weight").std() > 0.2  # Xavier-normal of 6 x 8
    ours = adapt("relearn", CONFIG, DIMS, parent=parent(), seed=3)
    assert torch.equal(ours.get_parameter("tower.text.weight"), scratch.get_parameter("tower.text.weight"))


def test_item_embeddings_are_fresh_and_trained() -> None:
    config = CONFIG.model_copy(update={"item_embeddings": True})
    model = adapt("relearn", config, DIMS, parent=parent(), catalogue_size=7)
    assert model.item_embeddings is not None and model.item_embeddings.weight.shape == (7, 8)
    assert model.item_embeddings.weight.requires_grad


def test_missing_or_mismatched_parent_is_reported() -> None:
    with pytest.raises(
        UserError, match=r"from: strategy relearn starts from a pre-trained model.*from=models:/NAME/latest"
    ):
        adapt("relearn", CONFIG, DIMS, parent=None)
    with pytest.raises(UserError, match=r"from: the parent's tower.text.* missing.*Adapt a parent with the modalities"):
        image_only = build_recommender(CONFIG, {"image": 5}, seed=1)
        adapt("finetune", CONFIG, DIMS, parent=image_only)


@pytest.mark.parametrize(
    ("strategy", "key", "value"),
    [
        ("relearn", "heads", 4),  # the same shapes, another transformer
        ("relearn", "layers", 1),  # all required shapes exist
        ("relearn", "inner", 16),
        ("finetune", "max_length", 4),
        ("finetune", "mixture", False),
        ("finetune", "missing", "reference"),
    ],
)
def test_parent_of_another_configuration_names_the_key(strategy: Any, key: str, value: Any) -> None:
    other = CONFIG.model_copy(update={key: value})
    was = str(getattr(CONFIG, key))
    with pytest.raises(UserError, match=f"model.{key}: the parent has {was}, .* Set model.{key}={was.lower()}"):
        adapt(strategy, other, DIMS, parent=parent())


def test_fresh_groups_may_differ_from_the_parent() -> None:
    other = CONFIG.model_copy(update={"experts": 3, "max_length": 4, "missing": "reference", "temperature": 0.1})
    assert adapt("relearn", other, DIMS, parent=parent()).positions.weight.shape == (4, 8)


@pytest.mark.parametrize("mixture", [True, False])
def test_centred_tower_maps_the_mean_item_to_zero(mixture: bool) -> None:
    config = CONFIG.model_copy(update={"mixture": mixture})
    means = {m: torch.randn(d) for m, d in DIMS.items()}
    model = adapt("scratch", config, DIMS, parent=None, means=means).eval()
    present = {m: torch.ones(1, dtype=torch.bool) for m in DIMS}
    features = ItemInputs({m: v[None] for m, v in means.items()}, present, torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(model.embed_items(features).item, torch.zeros(1, 8), atol=1e-6, rtol=0)
    plain = adapt("scratch", config, DIMS, parent=None).eval()
    assert plain.embed_items(features).item.abs().max() > 1e-3


def test_inherited_tower_is_not_centred() -> None:
    source = parent()
    model = adapt("finetune", CONFIG, DIMS, parent=source, means={m: torch.ones(d) for m, d in DIMS.items()})
    for name in parameter_groups(model)["theta"]:
        assert torch.equal(model.get_parameter(name), source.get_parameter(name)), name
