"""A step whose numbers are no numbers changes nothing on any rank, is told with its data, and a run of them ends the run."""

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
from antdist.training.engines.deepspeed import DeepSpeedEngine
from antdist.training.engines.plain import PlainEngine
from antdist.training.numbers import in_a_row, spike, within_window
from antdist.training.trainer import Diverged, Job, Progress, _refuse_broken
from tests.ranks import on_ranks
from tests.training.test_engines import arrays, small_model
from tests.training.test_trainer import NAMES, assert_same, run
from tests.worlds import make_domains


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, **more: Any) -> None:
    faults = [{"fault": "nan", "at": "loss", "step": step, **more} for step in steps]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))


# -- the engines -----------------------------------------------------------------------------------------------------


def _poisoned(kind: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[float]]:
    """The state after two sound steps, after a third that rank 1 (or the only one) spoils, after a sound one; who was told."""
    world = current_world()
    config = TrainingConfig(**{"learning_rate": 0.05, "weight_decay": 0.1, **options})
    engine: Any = (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(small_model(), config, world)
    told = []

    def step(spoilt: bool) -> dict[str, Any]:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(len(told)))[world.rank :: world.size]
        loss = (engine.forward(x) - 1).square().sum() / 12
        # of one number alone, whose moments are on one rank alone where they are shared
        last = dict(engine.model.named_parameters())["3.bias"]
        spoiler = last.register_hook(lambda gradient: gradient * float("inf" if options.get("clip") else "nan"))
        if not spoilt or world.rank < world.size - 1:
            spoiler.remove()
        engine.backward(loss, last=True)
        spoiler.remove()
        told.append(float(engine.update(0.05)))
        return arrays(engine.state())

    return [step(False), step(False)][1], step(True), step(False), told


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
)
def test_a_broken_gradient_of_one_rank_leaves_weights_moments_and_counter_as_they_were(
    kind: str, size: int, options: dict[str, Any]
) -> None:
    results = on_ranks(size, _with, kind, options)
    before, after, later, _ = results[0]
    assert before["updates"] == after["updates"] == 2 and later["updates"] == 3
    for name, weight in before["weights"].items():
        np.testing.assert_array_equal(after["weights"][name], weight, err_msg=name)
    for moment, kept in before["moments"].items():
        for name, value in kept.items():
            np.testing.assert_array_equal(after["moments"][moment][name], value, err_msg=name)
    assert np.isfinite(later["weights"]["0.weight"]).all()
    assert not np.array_equal(later["weights"]["0.weight"], before["weights"]["0.weight"])
    assert [told for *_, told in results] == [[0.0, 0.0, 1.0, 0.0]] * size


def _with(kind: str, options: dict[str, Any]) -> Any:
    return _poisoned(kind, **options)


def test_what_fills_up_a_part_of_stage_three_is_no_weight() -> None:
    """DeepSpeed leaves it as the memory was; a number that is none among the weights is found, on whichever rank."""
    assert on_ranks(2, _refused_parts) == [[False, True]] * 2


def _refused_parts() -> list[bool]:
    world, config = current_world(), TrainingConfig(zero_stage=3)
    engine: Any = DeepSpeedEngine(small_model(), config, world)
    nowhere: Any = None
    job = Job(engine, nowhere, config, world, Path(), 0, nowhere, nowhere)
    bias: Any = dict(engine.model.named_parameters())["3.bias"]  # one number, so the part of rank 1 is all filling
    refused = []
    for rank in (1, 0):
        if world.rank == rank:
            bias.ds_tensor.fill_(float("nan"))
        try:
            _refuse_broken(job, Progress())
            refused.append(False)
        except Diverged:
            refused.append(True)
    return refused


# -- the loop --------------------------------------------------------------------------------------------------------


def test_a_poisoned_step_is_skipped_and_the_run_goes_on_over_it_and_a_restart(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, 2, 5)
    straight = run(data, tmp_path / "straight", noise=True)
    assert "training: step 3 (epoch 1) is skipped: its loss is nan; see skipped.jsonl" in capsys.readouterr().err
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


def test_what_a_skipped_batch_held_is_written_down_with_its_users(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The users in the record, read from the shards and blocks that it names, are those of the stream's batch."""
    poison(monkeypatch, 1)
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


def test_the_steps_of_a_killed_run_are_written_down_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run dies after a skipped step that no checkpoint holds, and repeats it."""
    poison(monkeypatch, 1, 4)
    straight = run(data, tmp_path / "straight", epochs=2, checkpoint_every=4)
    faults = [{"fault": "nan", "at": "loss", "step": s} for s in (1, 4)] + [{"fault": "raise", "step": 5}]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    with pytest.raises(RuntimeError, match="ANTDIST_FAULTS"):
        run(data, tmp_path / "killed", epochs=2, checkpoint_every=4)
    with (tmp_path / "killed" / "skipped.jsonl").open("a") as torn:
        torn.write('{"step": 6, "ep')
    poison(monkeypatch, 1, 4)
    killed = run(data, tmp_path / "killed", epochs=2, checkpoint_every=4)
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(killed["weights"][name], weight, err_msg=name)
    written = [(tmp_path / folder / "skipped.jsonl").read_text() for folder in ("straight", "killed")]
    assert written[0] == written[1] and written[0].count("\n") == 2


def test_so_are_those_of_a_run_that_was_killed_before_its_first_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1)
    run(data, tmp_path / "straight", epochs=1)
    faults = [{"fault": "nan", "at": "loss", "step": 1}, {"fault": "raise", "step": 3}]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    with pytest.raises(RuntimeError, match="ANTDIST_FAULTS"):
        run(data, tmp_path / "killed", epochs=1)
    assert not steps_in(tmp_path / "killed" / "checkpoints")
    poison(monkeypatch, 1)
    run(data, tmp_path / "killed", epochs=1)
    written = [(tmp_path / folder / "skipped.jsonl").read_text() for folder in ("straight", "killed")]
    assert written[0] == written[1] and written[0].count("\n") == 1


def test_two_ranks_skip_what_one_of_them_finds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader's own numbers are sound; both engines, and the same as one rank that skips."""
    poison(monkeypatch, 2)
    alone = run(data, tmp_path / "alone", epochs=1)
    poison(monkeypatch, 2, rank=1)
    for engine in ("plain", "deepspeed"):
        options = {"epochs": 1, "engine": engine}
        together = on_ranks(2, _run, data, tmp_path / engine, options)
        assert_same(alone, together[0], 1e-5)
        assert together[0]["progress"].skipped == together[1]["progress"].skipped == [3]


def _run(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(data, folder, **options)


def test_too_many_skipped_steps_stop_the_run_and_its_last_good_checkpoint_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 2, 3, 4, 5)
    with pytest.raises(UserError, match=r"no number since step 3 \(epoch 1\); skipped.jsonl in the run's folder"):
        run(data, tmp_path / "row", checkpoint_every=1, max_skipped=2)
    assert steps_in(tmp_path / "row" / "checkpoints") == [1, 2]
    poison(monkeypatch, 1, 3, 5)
    with pytest.raises(UserError, match=r"3 of the last 200 steps were skipped.*up to step 6"):
        run(data, tmp_path / "now and then", max_skipped=2)
    monkeypatch.delenv("ANTDIST_FAULTS")
    again = run(data, tmp_path / "row", checkpoint_every=1, max_skipped=2)
    straight = run(data, tmp_path / "straight")
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(again["weights"][name], weight, err_msg=name)


def test_a_spoilt_model_is_not_what_an_epoch_ends_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skips at an epoch's end, one after the other: the model may be broken, so it is not kept, though the cap is far."""
    poison(monkeypatch, *range(2, 40))
    with pytest.raises(UserError, match=r"no number since step 3 \(epoch 1\)"):
        run(data, tmp_path / "a", max_skipped=100)
    assert load_latest(tmp_path / "a" / "checkpoints") is None


# -- the rules -------------------------------------------------------------------------------------------------------


def test_runs_and_windows_of_skipped_steps() -> None:
    assert [in_a_row(skipped, 9) for skipped in ([], [8], [9], [7, 9], [7, 8, 9])] == [0, 0, 1, 1, 3]
    assert within_window([1, 700, 701, 1700], 1700, 10) == [701, 1700]
    assert within_window([8, 9], 9, 0) == [9]


def test_a_leap_of_the_loss_is_told_and_noise_is_not() -> None:
    noisy = [2.0 + 0.1 * (-1) ** i for i in range(30)]
    assert spike(noisy, 2.9) is None and spike(noisy[:10], 50.0) is None
    assert spike(noisy, 4.0) == pytest.approx((4.0 - 2.1) / 0.1, rel=0.2)
    flat = [2.0] * 30
    assert spike(flat, 2.01) is None and spike(flat, 2.1) is not None
    assert spike(noisy, 0.1) is None  # down is no leap


def test_a_leap_is_a_line_and_a_point_of_a_curve(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from antdist.training import trainer as loop

    step = loop.train_step

    def leaping(job: loop.Job, step_input: Any) -> Any:
        losses = step(job, step_input)
        return losses * (1 + 40 * (step_input.step == 25))

    monkeypatch.setattr(loop, "train_step", leaping)
    done = run(data, tmp_path / "a", epochs=9)
    assert len(done["curve"]) > 26
    told = capsys.readouterr().err
    assert told.count("the loss leaps to") == 1 and "at step 26, " in told
