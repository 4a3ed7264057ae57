"""A whole recommender with the plain twins selected: the same losses and gradients."""

from __future__ import annotations

import contextlib

import pytest
import torch

from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.ops import plain_ops, use_plain_ops
from antdist.model.recommender import build_recommender
from tests.reference.small_world import DIMS, SmallWorld, local_rows, make_batch, randomise, windows

SEQUENCES = [[0, 3, 3, 5, 1, 9, 2, 4], [5, 3], [7, 8, 3, 5], [2, 9, 10, 9, 1]]


def test_plain_ops_are_selected_inside_the_block_only() -> None:
    with pytest.raises(KeyError), use_plain_ops():
        assert plain_ops()
        with use_plain_ops():
            pass
        assert plain_ops()
        raise KeyError
    assert not plain_ops()


@pytest.mark.parametrize("missing", ["mask", "reference"])
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[1:2]], ids=["several users", "one prediction"])
@pytest.mark.parametrize("mode", ["prefix", "sequence"])
def test_losses_and_gradients_are_equal(mode: str, sequences: list[list[int]], missing: str) -> None:
    """To 1e-5 of the largest number in float32; a third of the modalities is missing."""
    world = SmallWorld()
    config = ModelConfig(dim=8, experts=3, inner=12, max_length=9, missing=missing, dropout=0.0, item_dropout=0.0)
    batch = make_batch([windows(sequences, mode, 9)], 0, "in_batch", world.size)
    found = []
    for selection in (contextlib.nullcontext(), use_plain_ops()):
        model = randomise(build_recommender(config, DIMS)).train()
        torch.manual_seed(0)  # of the routing noise
        with selection:
            losses = model(local_rows(world, batch), batch, loss=LossConfig(alignment=0.3, chunk=5))
        losses.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"recommendation": losses.recommendation, "alignment": losses.alignment, **gradients})
    ours, plain = found
    assert ours.keys() == plain.keys()
    for name, expected in plain.items():
        tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
