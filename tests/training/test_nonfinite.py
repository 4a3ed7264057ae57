"""NaN and Inf: skipped steps, their records and limits; loss spikes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from antdist.config.schema import StreamConfig, TrainingConfig
from antdist.data.domain import open_domain, read_blocks
from antdist.data.stream.stream import Stream
from antdist.distributed.world import current_world
from antdist.errors import UserError
from antdist.training.checkpoints.local import load_latest, steps_in
from antdist.training.divergence import weights_are_finite
from antdist.training.engines.deepspeed import DeepSpeedEngine
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import StepInput
from antdist.training.progress import Progress
from antdist.training.skipping import consecutive_skips, recently_skipped
from antdist.training.spikes import loss_spike
from antdist.training.trainer import Trainer
from tests.ranks import on_ranks
from tests.training.runs import NAMES, assert_same, run, run_with
from tests.training.test_engines import arrays, small_model


def inject_nan(monkeypatch: pytest.MonkeyPatch, *steps: int, **more: Any) -> None:
    faults = [{"fault": "nan", "at": "loss", "step": step, **more} for step in steps]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))


def nan_step(kind: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[float]]:
    """Take two finite steps, one with a non-finite gradient on the last rank, and a finite one.

    Returns the states after the second, third and fourth step, and what `update` returned each time.
    """
    world = current_world()
    config = TrainingConfig(**{"learning_rate": 0.05, "weight_decay": 0.1, **options})
    engine: Any = (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(small_model(), config, world)
    skipped: list[float] = []

    def step(finite: bool) -> dict[str, Any]:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(len(skipped)))[world.rank :: world.size]
        loss = (engine.forward(x) - 1).square().sum() / 12
        # a parameter of one element, whose moments are on a single rank if they are partitioned
        last = dict(engine.model.named_parameters())["3.bias"]
        hook = last.register_hook(lambda gradient: gradient * float("inf" if options.get("clip") else "nan"))
        if finite or world.rank < world.size - 1:
            hook.remove()
        engine.backward(loss, last=True)
        hook.remove()
        skipped.append(float(engine.update(0.05)))
        return arrays(engine.state())

    return [step(True), step(True)][1], step(False), step(True), skipped


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("plain", 1, {}),
        ("plain", 2, {}),
        ("plain", 1, {"clip": 1.0}),
        ("deepspeed", 1, {"zero_stage": 1}),
        ("deepspeed", 2, {"zero_stage": 0}),
        ("deepspeed", 2, {"zero_stage": 1}),
        ("deepspeed", 2, {"zero_stage": 1, "clip": 1.0}),
        ("deepspeed", 2, {"zero_stage": 2}),
        ("deepspeed", 2, {"zero_stage": 3}),
    ],
    ids=lambda value: (
        "-".join(f"{key.removesuffix('_stage')}{n}" for key, n in value.items()) if isinstance(value, dict) else None
    ),
)
def test_nan_gradient_on_one_rank_leaves_state_unchanged(kind: str, size: int, options: dict[str, Any]) -> None:
    results = on_ranks(size, nan_step, kind, options)
    before, after, later, _ = results[0]
    assert before["updates"] == after["updates"] == 2 and later["updates"] == 3
    for name, weight in before["weights"].items():
        np.testing.assert_array_equal(after["weights"][name], weight, err_msg=name)
    for moment, kept in before["moments"].items():
        for name, value in kept.items():
            np.testing.assert_array_equal(after["moments"][moment][name], value, err_msg=name)
    assert np.isfinite(later["weights"]["0.weight"]).all()
    assert not np.array_equal(later["weights"]["0.weight"], before["weights"]["0.weight"])
    assert [skipped for *_, skipped in results] == [[0.0, 0.0, 1.0, 0.0]] * size


def test_zero3_padding_is_ignored_in_the_nan_check() -> None:
    """DeepSpeed does not initialise the padding; NaN among the weights is found on either rank."""
    assert on_ranks(2, _finite_with_nan_on_a_rank) == [[True, False]] * 2


def _finite_with_nan_on_a_rank() -> list[bool]:
    world, config = current_world(), TrainingConfig(zero_stage=3)
    engine: Any = DeepSpeedEngine(small_model(), config, world)
    # one element, so the partition of rank 1 is all padding
    bias: Any = dict(engine.model.named_parameters())["3.bias"]
    finite = []
    for rank in (1, 0):
        if world.rank == rank:
            bias.ds_tensor.fill_(float("nan"))
        finite.append(weights_are_finite(engine.model, world))
    return finite


def test_nan_step_is_skipped_and_resume_is_exact(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inject_nan(monkeypatch, 2, 5)
    straight = run(data, tmp_path / "straight", noise=True)
    assert "training: step 3 (epoch 1) skipped: loss is nan; see skipped.jsonl" in capsys.readouterr().err
    steps = [step for step, _ in straight["curve"]]
    assert not {3, 6} & set(steps) and len(steps) == max(steps) - 2
    assert np.isfinite([loss for _, loss in straight["curve"]]).all()
    first = run(data, tmp_path / "parts", noise=True, stop_after=4)
    second = run(data, tmp_path / "parts", noise=True, stop_after=2)
    third = run(data, tmp_path / "parts", noise=True)
    assert_same(straight, {**third, "curve": first["curve"] + second["curve"] + third["curve"]})
    assert third["history"] == straight["history"]
    assert third["progress"].skipped == straight["progress"].skipped == [3, 6]
    lines = (tmp_path / "straight" / "skipped.jsonl").read_text()
    assert (tmp_path / "parts" / "skipped.jsonl").read_text() == lines


def test_nan_step_record_lists_the_users_of_the_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users read from the shards and blocks in the record are those of the stream's batch."""
    inject_nan(monkeypatch, 1)
    run(data, tmp_path / "a", epochs=1)
    (line,) = [json.loads(line) for line in (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()]
    assert (line["step"], line["epoch"], line["batch"], line["loss"]) == (2, 1, 1, "nan")
    domains = [open_domain(data / name) for name in NAMES]
    stream = Stream(domains, StreamConfig(batch_size=60, streams=2), max_length=6, seed=3)
    batch = next(stream.batches(0, 1))
    offset, named = 0, set()
    for domain in domains:
        for place, users in line["domains"].get(domain.name, {}).items():
            name, key = place.split()
            shard = next(shard for shard in domain.manifest.sequence_shards if shard.name == name)
            first, blocks = shard.first_user, read_blocks(domain.folder, shard, domain.manifest.items)
            for block, entry in zip(blocks, shard.blocks, strict=True):
                if entry.key == key:
                    assert all(first <= user < first + len(block.offsets) - 1 for user in users)
                first += len(block.offsets) - 1
            named |= {offset + user for user in users}
        offset += domain.manifest.users
    assert named == set(batch.users.tolist())


def test_nan_steps_of_a_killed_run_are_recorded_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies after a skipped step that is in no checkpoint, and repeats it."""
    inject_nan(monkeypatch, 1, 4)
    straight = run(data, tmp_path / "straight", epochs=2, checkpoint_every=4)
    faults = [{"fault": "nan", "at": "loss", "step": s} for s in (1, 4)] + [{"fault": "raise", "step": 5}]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    with pytest.raises(RuntimeError, match="ANTDIST_FAULTS"):
        run(data, tmp_path / "killed", epochs=2, checkpoint_every=4)
    with (tmp_path / "killed" / "skipped.jsonl").open("a") as torn:
        torn.write('{"step": 6, "ep')
    inject_nan(monkeypatch, 1, 4)
    killed = run(data, tmp_path / "killed", epochs=2, checkpoint_every=4)
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(killed["weights"][name], weight, err_msg=name)
    written = [(tmp_path / folder / "skipped.jsonl").read_text() for folder in ("straight", "killed")]
    assert written[0] == written[1] and written[0].count("\n") == 2


def test_nan_steps_killed_before_first_checkpoint_recorded_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_nan(monkeypatch, 1)
    run(data, tmp_path / "straight", epochs=1)
    faults = [{"fault": "nan", "at": "loss", "step": 1}, {"fault": "raise", "step": 3}]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    with pytest.raises(RuntimeError, match="ANTDIST_FAULTS"):
        run(data, tmp_path / "killed", epochs=1)
    assert not steps_in(tmp_path / "killed" / "checkpoints")
    inject_nan(monkeypatch, 1)
    run(data, tmp_path / "killed", epochs=1)
    written = [(tmp_path / folder / "skipped.jsonl").read_text() for folder in ("straight", "killed")]
    assert written[0] == written[1] and written[0].count("\n") == 1


def test_nan_loss_on_one_rank_skips_the_step_on_all(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader's own loss is finite; both engines give the same as one rank that skips."""
    inject_nan(monkeypatch, 2)
    alone = run(data, tmp_path / "alone", epochs=1)
    inject_nan(monkeypatch, 2, rank=1)
    for engine in ("plain", "deepspeed"):
        options = {"epochs": 1, "engine": engine}
        together = on_ranks(2, run_with, data, tmp_path / engine, options)
        assert_same(alone, together[0], 1e-5)
        assert together[0]["progress"].skipped == together[1]["progress"].skipped == [3]


def test_too_many_nan_steps_stop_the_run_and_resume_works(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject_nan(monkeypatch, 2, 3, 4, 5)
    with pytest.raises(UserError, match=r"NaN or Inf since step 3 \(epoch 1\); skipped.jsonl in the run's folder"):
        run(data, tmp_path / "row", checkpoint_every=1, max_skipped=2)
    assert steps_in(tmp_path / "row" / "checkpoints") == [1, 2]
    inject_nan(monkeypatch, 1, 3, 5)
    with pytest.raises(UserError, match=r"3 of the last 200 steps were skipped.*up to step 6"):
        run(data, tmp_path / "now and then", max_skipped=2)
    monkeypatch.delenv("ANTDIST_FAULTS")
    again = run(data, tmp_path / "row", checkpoint_every=1, max_skipped=2)
    straight = run(data, tmp_path / "straight")
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(again["weights"][name], weight, err_msg=name)


def test_nan_until_epoch_end_is_neither_saved_nor_validated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After consecutive skips the model may have diverged, so it is not saved below `max_skipped` either."""
    inject_nan(monkeypatch, *range(2, 40))
    with pytest.raises(UserError, match=r"NaN or Inf since step 3 \(epoch 1\)"):
        run(data, tmp_path / "a", max_skipped=100)
    assert load_latest(tmp_path / "a" / "checkpoints") is None


def test_counts_of_skipped_nan_steps() -> None:
    counts = [consecutive_skips(Progress(step=9, skipped=skipped)) for skipped in ([], [8], [9], [7, 9], [7, 8, 9])]
    assert counts == [0, 0, 1, 1, 3]
    assert recently_skipped([1, 700, 701, 1700], 1700, 10) == [701, 1700]
    assert recently_skipped([8, 9], 9, 0) == [9]


def test_loss_spike_is_detected_and_noise_is_not() -> None:
    noisy = [2.0 + 0.1 * (-1) ** i for i in range(30)]
    assert loss_spike(noisy, 2.9) is None and loss_spike(noisy[:10], 50.0) is None
    assert loss_spike(noisy, 4.0) == pytest.approx((4.0 - 2.1) / 0.1, rel=0.2)
    flat = [2.0] * 30
    assert loss_spike(flat, 2.01) is None and loss_spike(flat, 2.1) is not None
    assert loss_spike(noisy, 0.1) is None  # a drop is no spike


def test_loss_spike_is_logged_and_plotted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def spike(trainer: Trainer, step_input: StepInput) -> torch.Tensor:
        return step(trainer, step_input) * (1 + 40 * (step_input.step == 25))

    monkeypatch.setattr(Trainer, "step", spike)
    done = run(data, tmp_path / "a", epochs=9)
    assert len(done["curve"]) > 26
    log = capsys.readouterr().err
    assert log.count("loss spike to") == 1 and "at step 26, " in log
