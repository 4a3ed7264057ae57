"""`benchmarks.throughput` compares equal work: with equal weights and no noise, equal losses."""

from __future__ import annotations

import torch

from antdist.config.schema import LossConfig, ModelConfig
from antdist.model.recommender import Recommender, build_recommender
from benchmarks.baseline import Baseline
from tests.reference.small_world import DIMS, SmallWorld, local_rows, make_batch, randomise, windows

MODEL = ModelConfig(dim=16, inner=16, experts=4, max_length=8)


def copy_weights(ours: Recommender, usual: Baseline) -> None:
    """Copy the weights. Shifts and biases of experts, placed differently for prices, are zero."""
    with torch.no_grad():
        for modality, tower in usual.towers.items():
            experts = ours.tower.get_submodule(modality)
            for k, expert in enumerate(tower.experts):
                expert.linear.weight.copy_(experts.weight[:, k].T)
            for name in ("gate", "noise"):
                getattr(tower, name).copy_(getattr(experts, name))
            (experts.shift if experts.whitening else experts.bias).zero_()
        usual.positions.load_state_dict(ours.positions.state_dict())
        usual.norm.load_state_dict(ours.encoder.input_norm.state_dict())
        for mine, theirs in zip(ours.encoder.layers, usual.layers, strict=True):
            for part, weight, bias in zip(
                (theirs.query, theirs.key, theirs.value), mine.qkv.weight.chunk(3), mine.qkv.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            pairs = ((theirs.out, mine.output), (theirs.expand, mine.expand), (theirs.contract, mine.contract))
            norms = zip(theirs.norms, (mine.attention_norm, mine.forward_norm), strict=True)
            for to, source in (*pairs, *norms):
                to.load_state_dict(source.state_dict())


def test_baseline_loss_equals_ours() -> None:
    world = SmallWorld(size=20, missing=0.0)
    sequences = [[(3 * u + 5 * n * n) % 20 for n in range(3 + u % 6)] for u in range(12)]
    prefixes = windows(sequences, "prefix", 8)
    histories = torch.zeros(len(prefixes), 8, dtype=torch.int64)
    for row, (items, _, _) in enumerate(prefixes):
        histories[row, : len(items)] = torch.tensor(items)
    lengths = torch.tensor([len(items) for items, _, _ in prefixes])
    targets = torch.tensor([nexts[0] for _, _, nexts in prefixes])
    ours, usual = randomise(build_recommender(MODEL, DIMS, seed=0)).eval(), Baseline(world.values, 16, 4, 8).eval()
    copy_weights(ours, usual)
    for candidates, alignment, loss_of in (
        ("in_batch", 1e-3, usual.pretraining_loss),
        ("catalogue", 0.0, usual.adaptation_loss),
    ):
        batch = make_batch([windows(sequences, "sequence", 8)], 0, candidates, 20)
        loss = LossConfig.model_validate({"negatives": candidates, "alignment": alignment})
        found = ours(local_rows(world, batch), batch, loss=loss).total
        torch.testing.assert_close(found, loss_of(histories, lengths, targets), rtol=1e-4, atol=1e-4)
