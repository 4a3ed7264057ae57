"""The recommender against `tests/reference`: items, users, losses and gradients to 1e-5 in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.recommender import Losses, Recommender, build_recommender
from tests.reference.naive import NaiveModel, prefixes
from tests.reference.names import to_reference
from tests.reference.small_world import DIMS, SmallWorld, local_rows, make_batch, on_ranks, randomise, windows

LENGTH = 7
# an item twice in a row, users who share items, one user of two items, one of the full length
SEQUENCES = [[0, 3, 3, 5, 1, 9, 2, 4], [5, 3], [7, 8, 3, 5], [2, 9, 10, 9, 1], [11, 3, 9]]
LONGER = [[*SEQUENCES[0], 6, 3, 8], *SEQUENCES[1:]]  # the first sees only its last seven items
EXAMPLES = [example for sequence in SEQUENCES for example in prefixes(sequence)]
DRAWN = [0, 3, 3, 12, 9, 14, 12, 3]


def tiny(**changes: object) -> ModelConfig:
    shape = {"dim": 8, "experts": 3, "inner": 12, "max_length": LENGTH, "layers": 2, "heads": 2, "beta": 0.7}
    return ModelConfig(**{**shape, **changes})


def build(config: ModelConfig, world: SmallWorld) -> Recommender:
    return randomise(build_recommender(config, DIMS, world.size)).eval()


def naive_of(model: Recommender, world: SmallWorld) -> NaiveModel:
    config = model.config
    state = to_reference(dict(model.named_parameters()))
    leaves = {name: value.detach().clone().requires_grad_() for name, value in state.items()}
    return NaiveModel(
        leaves,
        world.values,
        world.present,
        heads=config.heads,
        beta=config.beta,
        missing=config.missing,
        fusion=config.fusion,
        length=config.max_length,
        temperature=config.temperature,
    )


def assert_near(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    assert ours.shape == theirs.shape, what
    tolerance = 1e-5 * max(1.0, float(theirs.detach().abs().max()) if theirs.numel() else 0.0)
    assert float((ours - theirs).detach().abs().max()) <= tolerance, what


def assert_same_gradients(model: Recommender, naive: NaiveModel) -> None:
    zeros = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    ours = to_reference(zeros)
    assert set(ours) == set(naive.state)
    largest = max(float(value.grad.abs().max()) for value in naive.state.values() if value.grad is not None)
    assert largest > 0.01
    for name, value in naive.state.items():
        theirs = torch.zeros_like(value) if value.grad is None else value.grad
        if name == "item_embedding.weight":
            theirs[0] = 0.0  # the padding row is nobody's
        assert_near(ours[name], theirs, name)


SWITCHES: list[dict[str, object]] = [
    {},
    {"missing": "reference"},
    {"mixture": False},
    {"mixture": False, "missing": "reference"},
    {"fusion": False},
    {"modalities": ["text", "price"]},
    {"modalities": ["image", "price"], "missing": "reference"},
    {"modalities": ["text", "image"]},
    {"modalities": ["text"]},
    {"item_embeddings": True},
    {"heads": 4, "layers": 1, "activation_checkpointing": True},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_item_and_user_embeddings(changes: dict[str, object]) -> None:
    world = SmallWorld()
    model = build(tiny(**changes), world)
    naive = naive_of(model, world)
    items = model.embed_items(world.rows(torch.arange(world.size)))
    for item in range(world.size):
        assert_near(items.item[item], naive.item(item), f"item {item}")
        for modality, rows in (("text", items.text), ("image", items.image)):
            theirs = naive.transformed(modality, item)
            assert (rows is None) == (theirs is None)
            if rows is not None and theirs is not None:
                assert_near(rows[item], theirs, f"{modality} {item}")
    histories = [history[-LENGTH:] for history, _ in EXAMPLES]
    offsets = torch.tensor([0, *(len(h) for h in histories)]).cumsum(0)
    states = model.encode_users(
        items.item, torch.tensor([item for history in histories for item in history]), offsets, LENGTH
    )
    for number, history in enumerate(histories):
        assert_near(states[offsets[number + 1] - 1], naive.user(history), f"user {number}")


def total_loss(
    model: Recommender,
    world: SmallWorld,
    mode: str,
    candidates: str,
    loss: LossConfig,
    expected: Tensor | None = None,
    ranks: int = 1,
    sequences: list[list[int]] = SEQUENCES,
) -> Losses:
    every = windows(sequences, mode, LENGTH)
    sharded = [every[rank::ranks] for rank in range(ranks)]
    batches = [make_batch(sharded, rank, candidates, world.size, DRAWN, expected) for rank in range(ranks)]
    if candidates != "sampled":
        batches = [make_batch(sharded, rank, candidates, world.size) for rank in range(ranks)]
    if ranks == 1:
        parts = [model(local_rows(world, batches[0]), batches[0], loss=loss)]
    else:
        parts = on_ranks(ranks, lambda r, gather: model(local_rows(world, batches[r]), batches[r], gather, loss))
    return Losses(*(torch.stack(column).sum() for column in zip(*parts, strict=True)))


@pytest.mark.parametrize("chunk", [100, 4])
@pytest.mark.parametrize("missing", ["mask", "reference"])
@pytest.mark.parametrize("mode", ["prefix", "sequence"])
def test_pretraining_losses_and_gradients(mode: str, missing: str, chunk: int) -> None:
    world = SmallWorld()
    model = build(tiny(missing=missing), world)
    naive = naive_of(model, world)
    losses = total_loss(model, world, mode, "in_batch", LossConfig(alignment=0.3, chunk=chunk))
    recommendation, alignment = naive.in_batch_loss(EXAMPLES), naive.alignment_loss(EXAMPLES)
    assert bool(alignment > 0.1)
    assert_near(losses.recommendation, recommendation)
    assert_near(losses.alignment, alignment)
    assert_near(losses.total, recommendation + 0.3 * alignment)
    losses.total.backward()
    (recommendation + 0.3 * alignment).backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_adaptation_loss_and_gradients(changes: dict[str, object]) -> None:
    world = SmallWorld()
    model = build(tiny(**changes), world)
    naive = naive_of(model, world)
    model.train()  # for activation checkpointing's sake; all that is random is switched off
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
        if hasattr(module, "route"):
            module.training = False
    losses = total_loss(model, world, "sequence", "catalogue", LossConfig(alignment=0.0, chunk=6))
    theirs = naive.catalogue_loss(EXAMPLES, world.size)
    assert_near(losses.total, theirs)
    assert float(losses.alignment) == 0.0
    losses.total.backward()
    theirs.backward()
    assert_same_gradients(model, naive)


@pytest.mark.parametrize("log_q", [False, True])
def test_sampled_loss_and_gradients(log_q: bool) -> None:
    world = SmallWorld()
    model = build(tiny(), world)
    naive = naive_of(model, world)
    expected = torch.rand(world.size, generator=torch.Generator().manual_seed(1)) + 0.1 if log_q else None
    losses = total_loss(model, world, "sequence", "sampled", LossConfig(alignment=0.0, chunk=5), expected)
    theirs = naive.sampled_loss(EXAMPLES, DRAWN, expected)
    assert_near(losses.total, theirs)
    losses.total.backward()
    theirs.backward()
    assert_same_gradients(model, naive)


def test_longer_users_see_their_last_items_only() -> None:
    world = SmallWorld()
    model = build(tiny(), world)
    naive = naive_of(model, world)
    losses = total_loss(model, world, "prefix", "in_batch", LossConfig(alignment=0.0), sequences=LONGER)
    assert_near(losses.total, naive.in_batch_loss([e for s in LONGER for e in prefixes(s)]))


@pytest.mark.parametrize("candidates", ["in_batch", "catalogue", "sampled"])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_losses_and_gradients_of_ranks_add_up(ranks: int, candidates: str) -> None:
    """Of seven ranks with five users some have no window; they still embed and gather items."""
    world = SmallWorld()
    loss = LossConfig(alignment=0.3, chunk=5)
    alone, many = build(tiny(), world), build(tiny(), world)
    one = total_loss(alone, world, "sequence", candidates, loss)
    sums = total_loss(many, world, "sequence", candidates, loss, ranks=ranks)
    for ours, theirs in zip(sums, one, strict=True):
        assert_near(ours, theirs)
    one.total.backward()
    sums.total.backward()
    for (name, ours), theirs in zip(many.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            assert_near(ours.grad, theirs.grad, name)


def test_no_image_in_the_batch_gives_no_alignment() -> None:
    world = SmallWorld()
    world.present["image"][:] = False
    model = build(tiny(), world)
    losses = total_loss(model, world, "sequence", "in_batch", LossConfig(alignment=0.3))
    assert float(losses.alignment) == 0.0
    losses.total.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
