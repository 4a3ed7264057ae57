"""Small training runs on two domains, for the tests of the loop, of its checkpoints and of its faults."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdist.batch import GlobalBatch
from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import current_world
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.model.recommender import build_recommender
from antdist.training.checkpoints.local import load_checkpoint
from antdist.training.checkpoints.remote import Remote
from antdist.training.engines.deepspeed import DeepSpeedEngine
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.trainer import Trainer

NAMES = ["one", "three"]


def run(
    data: Path,
    folder: Path,
    *,
    noise: bool = False,
    engine: str = "plain",
    negatives: str = "in_batch",
    mode: str = "sequence",
    start: Path | None = None,
    remote: str | None = None,
    loss: dict[str, Any] | None = None,
    recalls: list[float] | None = None,
    profile: bool = False,
    poll_signal: Any = lambda: None,
    **training: Any,
) -> dict[str, Any]:
    """Train a small model on two domains; return the curve, the final weights and the progress."""
    world = current_world()
    domains = [open_domain(data / name) for name in NAMES]
    rate = 0.1 if noise else 0.0
    model_config = ModelConfig(dim=8, experts=2, inner=8, max_length=6, item_dropout=rate, dropout=rate)
    catalogue = Catalogue(domains, model_config.modalities)
    config = TrainingConfig(
        **{"epochs": 3, "learning_rate": 0.01, "log_every": 1, "schedule": ScheduleConfig(factor=0.9), **training}
    )
    stream = Stream(
        domains, StreamConfig(batch_size=60, mode=mode, streams=2), max_length=model_config.max_length, seed=3
    )
    model = build_recommender(model_config, catalogue.dims, seed=4)
    if not noise:
        silence_routing(model)
    curve: list[tuple[int, float]] = []
    users: dict[int, list[int]] = {}

    class RecordingFeed(Feed):
        def inputs(self, batch: GlobalBatch) -> StepInput:
            step_input = super().inputs(batch)
            users[step_input.step] = batch.users.tolist()
            return step_input

    def report(metrics: dict[str, float], step: int) -> None:
        if "train/loss" in metrics:
            curve.append((step, metrics["train/loss"]))

    validations = iter(recalls) if recalls is not None else itertools.repeat(0.1)
    popularity = np.concatenate([domain.popularity() for domain in domains])
    losses = LossConfig(**{"negatives": negatives, "samples": 20, "alignment": 0.1, **(loss or {})})
    trainer = Trainer(
        engine=(DeepSpeedEngine if engine == "deepspeed" else PlainEngine)(model, config, world),
        feed=RecordingFeed(stream, catalogue, losses, popularity, config.accumulation, 3, world),
        config=config,
        world=world,
        folder=folder,
        seed=3,
        evaluate=lambda: {"Recall@10": next(validations), "NDCG@10": 0.05},
        log_metrics=report,
        poll_signal=poll_signal,
        start=load_checkpoint(start) if start else None,
        remote=Remote(remote) if remote else None,
        profile=profile,
    )
    progress = trainer.train()
    state = trainer.engine.state()
    return {
        "curve": curve,
        "weights": {name: value.numpy() for name, value in state.weights.items()},
        "gradients": {name: value.numpy() for name, value in state.moments.get("exp_avg", {}).items()},
        "progress": progress,
        "history": progress.history,
        "users": [users[step] for step in sorted(users) if step < progress.step],  # a few more were prefetched
    }


def silence_routing(model: torch.nn.Module) -> None:
    """Disable routing noise: its sigma is a softplus plus 0.01, so weights alone cannot make it 0."""
    for module in model.modules():
        if hasattr(module, "route"):
            module.route = lambda x, gate=module.gate: (x @ gate).float().softmax(-1)


def run_with(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """`run` with its options in a dictionary, as a function for `on_ranks`."""
    return run(data, folder, **options)


def refused(data: Path, folder: Path, options: dict[str, Any]) -> str:
    """Return the message of the UserError that a run raises."""
    with pytest.raises(UserError) as caught:
        run(data, folder, **options)
    return str(caught.value)


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> None:
    """Compare curves and weights; with a tolerance, gradients' running means instead of weights.

    Adam turns rounding errors into steps of full size where the true gradient is zero (the biases of attention's keys).
    """
    steps_a, losses_a = zip(*a["curve"], strict=True)
    steps_b, losses_b = zip(*b["curve"], strict=True)
    assert steps_a == steps_b
    np.testing.assert_allclose(losses_a, losses_b, rtol=tolerance, atol=tolerance)
    kind = "gradients" if tolerance else "weights"
    assert a[kind].keys() == b[kind].keys() and a[kind]
    for name, value in a[kind].items():
        np.testing.assert_allclose(value, b[kind][name], rtol=tolerance * 10, atol=tolerance, err_msg=name)
