"""Useful operations by formula agree with torch's counter where nothing is computed twice."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.recommender import build_recommender
from benchmarks.baseline import Baseline
from benchmarks.flops import padded_flops, useful_flops
from tests.reference.small_world import DIMS, SmallWorld, local_rows, make_batch, windows

MODEL = ModelConfig(dim=16, inner=8, experts=4, heads=2, layers=2, max_length=8, dropout=0.0, item_dropout=0.0)


def test_useful_operations_match_the_flop_counter() -> None:
    """Windows are as long as a block of attention, so torch's count has little padding."""
    world = SmallWorld(size=40)
    sequences = [[(7 * u + 3 * n) % 40 for n in range(9)] for u in range(30)]
    batch = make_batch([windows(sequences, "sequence", 8)], 0, "catalogue", 40)
    model = build_recommender(MODEL, DIMS, seed=0)
    with FlopCounterMode(display=False) as counter:
        model(local_rows(world, batch), batch, loss=LossConfig(negatives="catalogue", alignment=0.0)).total.backward()
    counted = counter.get_total_flops()
    ours = useful_flops(batch, MODEL, DIMS, aligned=False)
    assert 0.75 * counted < ours <= counted


def test_padded_operations_match_the_flop_counter() -> None:
    torch.manual_seed(0)
    features = {m: torch.randn(50, width) for m, width in DIMS.items()}
    model = Baseline(features, dim=16, experts=4, length=8)
    histories, lengths, targets = torch.randint(0, 50, (12, 8)), torch.full((12,), 8), torch.randint(0, 50, (12,))
    config = MODEL.model_copy(update={"inner": 16})
    for loss, items, aligned in ((model.pretraining_loss, 12, True), (model.adaptation_loss, 50, False)):
        with FlopCounterMode(display=False) as counter:
            loss(histories, lengths, targets).backward()
        counted = counter.get_total_flops()
        ours = padded_flops(12, 8, items, items, config, DIMS, aligned=aligned)
        assert 0.8 * counted < ours < 1.2 * counted
