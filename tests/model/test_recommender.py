"""Parameter groups, initial weights, precision and what is random in training."""

from __future__ import annotations

import pytest
import torch

from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.initialisation import redraw_experts
from antdist.model.recommender import (
    Recommender,
    build_recommender,
    parameter_groups,
)
from tests.reference.small_world import DIMS, SmallWorld, local_rows, make_batch, windows

SEQUENCES = [[0, 3, 3, 5, 1, 9, 2, 4], [5, 3], [7, 8, 3, 5], [2, 9, 10, 9, 1]]
WIDE = {"text": 384, "image": 96, "price": 64}


def tiny(**changes: object) -> ModelConfig:
    return ModelConfig(**{"dim": 8, "experts": 3, "inner": 12, "max_length": 9, **changes})


def loss_of(model: Recommender, world: SmallWorld) -> torch.Tensor:
    batch = make_batch([windows(SEQUENCES, "sequence", 9)], 0, "in_batch", world.size)
    total: torch.Tensor = model(local_rows(world, batch), batch, loss=LossConfig(alignment=0.1)).total
    return total


@pytest.mark.parametrize(
    "changes", [{}, {"mixture": False}, {"item_embeddings": True}, {"modalities": ["text"]}], ids=str
)
def test_every_parameter_is_in_one_group(changes: dict[str, object]) -> None:
    model = build_recommender(tiny(**changes), DIMS, 15)
    groups = parameter_groups(model)
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    has_price = "price" in model.config.modalities
    assert groups["price_bias"] == (["tower.price.bias"] if has_price else [])
    assert groups["positions"] == ["positions.weight"]
    assert groups["input_norm"] == ["encoder.input_norm.weight", "encoder.input_norm.bias"]
    assert groups["item_embeddings"] == (["item_embeddings.weight"] if changes.get("item_embeddings") else [])
    assert all(name.startswith("tower.") for name in groups["theta"])
    assert all(name.startswith("encoder.layers.") for name in groups["phi"])


def test_initial_weights() -> None:
    model = build_recommender(ModelConfig(item_embeddings=True), WIDE, 500).requires_grad_(False)
    for name, value in model.named_parameters():
        kind = name.split(".")[-1]
        if "norm.weight" in name:
            assert bool((value == 1).all()), name
        elif kind in ("bias", "shift", "gate", "noise"):
            assert bool((value == 0).all()), name
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(value.mean())) < 0.002, name


def test_xavier_experts() -> None:
    model = build_recommender(ModelConfig(initialisation="xavier"), WIDE).requires_grad_(False)
    assert float(model.get_parameter("tower.text.weight").std()) == pytest.approx((2 / (384 + 256)) ** 0.5, rel=0.02)
    assert float(model.positions.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_weights_are_a_function_of_seed_and_name() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = dict(build_recommender(tiny(), DIMS, seed=3).named_parameters())
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = dict(
        build_recommender(tiny(modalities=["text"], item_embeddings=True), DIMS, 15, seed=3).named_parameters()
    )
    other = dict(build_recommender(tiny(), DIMS, seed=4).named_parameters())
    for name in one.keys() & again.keys():
        assert torch.equal(one[name], again[name]), name
    assert not torch.equal(one["tower.text.weight"], other["tower.text.weight"])
    assert not torch.equal(one["encoder.layers.0.qkv.weight"], one["encoder.layers.1.qkv.weight"])


@pytest.mark.parametrize("mixture", [True, False])
def test_redraw_experts_changes_the_experts_alone(mixture: bool) -> None:
    model = build_recommender(ModelConfig(mixture=mixture), WIDE)
    kept = {name: value.clone() for name, value in model.named_parameters()}
    redraw_experts(model, 5)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, kept[name])}
    assert changed == {"tower.text.weight", "tower.image.weight", "tower.price.weight"}
    for modality, width in WIDE.items():
        deviation = float(model.get_parameter(f"tower.{modality}.weight").detach().std())
        assert deviation == pytest.approx((2 / (width + 256)) ** 0.5, rel=0.03)


def test_a_modality_without_features_has_no_parameters() -> None:
    model = build_recommender(tiny(), {"text": 7})
    assert {n.split(".")[1] for n, _ in model.named_parameters() if n.startswith("tower.")} == {"text"}
    world = SmallWorld()
    embeddings = model.embed_items(world.rows(torch.arange(4)))
    assert embeddings.image is None and not embeddings.image_present.any()


@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_is_near_float32(autocast: bool) -> None:
    """Both ways of low precision: weights in bf16, and float32 weights under autocast."""
    world = SmallWorld()
    model = build_recommender(tiny(item_embeddings=True), DIMS, world.size).eval()
    exact = float(loss_of(model, world).detach())
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, world)
    else:
        loss = loss_of(model.bfloat16(), world)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(exact, rel=0.02)
    loss.backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("noise"):
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


def test_training_is_noisy_and_evaluation_is_not() -> None:
    world = SmallWorld(missing=0.0)
    model = build_recommender(tiny(item_dropout=0.0, dropout=0.0), DIMS)
    rows = world.rows(torch.arange(world.size))
    model.train()
    assert not torch.equal(model.embed_items(rows).item, model.embed_items(rows).item), "routing noise"
    model.eval()
    assert torch.equal(model.embed_items(rows).item, model.embed_items(rows).item)


def test_routing_noise_has_the_spread_of_the_spec() -> None:
    """With gate and noise 0 the logits are eps * (softplus(0) + 0.01); differences spread sqrt 2 as far."""
    experts = build_recommender(tiny(experts=2), {"text": 7}).tower.get_submodule("text").train().requires_grad_(False)
    weights = experts.route(torch.randn(20_000, 7))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(20_000))
    spread = float((weights[:, 0].log() - weights[:, 1].log()).std())
    assert spread == pytest.approx(2**0.5 * (torch.log(torch.tensor(2.0)) + 0.01).item(), rel=0.03)
    with torch.no_grad():
        experts.noise.fill_(-100.0)  # softplus vanishes: what is left is 0.01
    weights = experts.route(torch.ones(20_000, 7))
    assert float((weights[:, 0].log() - weights[:, 1].log()).std()) == pytest.approx(0.01 * 2**0.5, rel=0.03)
    x = torch.randn(3, 7)
    assert torch.equal(experts.eval().route(x), torch.full((3, 2), 0.5))


def test_feature_dropout_is_scaled_and_not_in_the_routing() -> None:
    """With one expert, no shift and many draws, the mean of the output is the output without dropout."""
    model = build_recommender(tiny(experts=1, item_dropout=0.5), {"text": 7})
    tower = model.tower.get_submodule("text")
    x = torch.randn(1, 7)
    draws = tower.train()(x.expand(40_000, 7))
    torch.testing.assert_close(draws.mean(0), tower.eval()(x)[0], rtol=0.05, atol=1e-3)
    assert float(draws.detach().std(0).min()) > 0.001


def test_windows_see_neither_each_other_nor_the_future() -> None:
    world = SmallWorld()
    model = build_recommender(tiny(), DIMS).eval()
    items = model.embed_items(world.rows(torch.arange(world.size))).item
    tokens, offsets = torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([0, 4, 7])
    states = model.encode_users(items, tokens, offsets, 4)
    changed = tokens.clone()
    changed[3] = 9  # the first window's last token
    again = model.encode_users(items, changed, offsets, 4)
    same = [0, 1, 2, 4, 5, 6]
    assert torch.equal(states[same], again[same])
    assert not torch.allclose(states[3], again[3])
