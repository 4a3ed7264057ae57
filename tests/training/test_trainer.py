"""The training loop: world-size invariance (law 2), exact resumption (law 3), early stopping."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.training import meter
from antdist.training.checkpoints.local import best_weights, load_latest, save_checkpoint, steps_in
from antdist.training.status import StatusReporter
from tests.ranks import on_ranks
from tests.training.runs import assert_same, refused, run, run_with


@pytest.mark.parametrize("negatives", ["in_batch", "catalogue", "sampled"])
def test_world_size_invariance_of_losses_and_gradients(data: Path, tmp_path: Path, negatives: str) -> None:
    """Law 2."""
    options = {"negatives": negatives, "accumulation": 2, "epochs": 2}
    alone = run(data, tmp_path / "1", **options)
    assert len(alone["curve"]) > 6
    for size in (2, 3):
        together = on_ranks(size, run_with, data, tmp_path / str(size), options)
        assert_same(alone, together[0], 1e-5)
        assert all(peer["history"] == together[0]["history"] for peer in together[1:])


def test_deepspeed_losses_equal_plain_engine(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", epochs=2)
    twin = on_ranks(2, run_with, data, tmp_path / "twin", {"engine": "deepspeed", "epochs": 2, "zero_stage": 1})
    assert_same(plain, twin[0], 1e-5)


def test_bf16_losses_close_to_float32_on_both_engines(data: Path, tmp_path: Path) -> None:
    exact = run(data, tmp_path / "exact", epochs=2)
    plain = run(data, tmp_path / "plain", epochs=2, precision="bf16")
    options = {"engine": "deepspeed", "epochs": 2, "precision": "bf16"}
    (twin,) = on_ranks(1, run_with, data, tmp_path / "twin", options)
    losses = {name: np.array([loss for _, loss in each["curve"]]) for name, each in
              {"exact": exact, "plain": plain, "twin": twin}.items()}  # fmt: skip
    assert losses["exact"][-1] < losses["exact"][0] - 1
    for name in ("plain", "twin"):
        np.testing.assert_allclose(losses[name], losses["exact"], rtol=0.02)
        assert (losses[name] != losses["exact"]).all(), "not in bfloat16"
    np.testing.assert_allclose(losses["plain"], losses["twin"], rtol=2e-3)
    assert all(value.dtype == np.float32 for value in twin["weights"].values())


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_resume_equals_uninterrupted_bit_for_bit(data: Path, tmp_path: Path, mode: str) -> None:
    """Law 3, with dropout and routing noise on, stops in mid-epoch and across epoch ends."""
    straight = run(data, tmp_path / "straight", noise=True, mode=mode)
    steps = len(straight["curve"])
    first = run(data, tmp_path / "parts", noise=True, mode=mode, stop_after=2)
    second = run(data, tmp_path / "parts", noise=True, mode=mode, stop_after=steps // 2)
    third = run(data, tmp_path / "parts", noise=True, mode=mode)
    assert (len(first["curve"]), len(second["curve"])) == (2, steps // 2)
    whole = {**third, "curve": first["curve"] + second["curve"] + third["curve"]}
    assert_same(straight, whole)
    assert third["history"] == straight["history"]


def test_noise_is_active_in_the_resume_test(data: Path, tmp_path: Path) -> None:
    silent, noisy = run(data, tmp_path / "a", epochs=1), run(data, tmp_path / "b", epochs=1, noise=True)
    assert silent["curve"] != noisy["curve"]


def test_resume_in_another_folder_from_a_checkpoint(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", noise=True, epochs=2)
    run(data, tmp_path / "first", noise=True, epochs=2, stop_after=5)
    found = load_latest(tmp_path / "first" / "checkpoints")
    assert found is not None
    elsewhere = run(data, tmp_path / "second", noise=True, epochs=2, start=found.folder)
    assert_same({**straight, "curve": straight["curve"][5:]}, elsewhere)


def test_failed_copy_of_best_weights_raises_on_all_ranks(data: Path, tmp_path: Path) -> None:
    """They lie beside another run's checkpoints, and the disk has no space for a copy."""
    run(data, tmp_path / "first", epochs=1)
    found = load_latest(tmp_path / "first" / "checkpoints")
    assert found is not None and found.document["progress"]["best_epoch"] == 1
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "best").touch()  # where the folder would be: as on a full disk
    messages = on_ranks(2, refused, data, tmp_path / "second", {"epochs": 2, "start": found.folder})
    assert messages[0] == messages[1]
    assert "second/best: the best weights (epoch 1) cannot be copied here" in messages[0]


def test_resume_refuses_state_of_another_model(data: Path, tmp_path: Path) -> None:
    """One weight is transposed, so the number of weights is the same."""
    run(data, tmp_path / "a", epochs=1)
    found = load_latest(tmp_path / "a" / "checkpoints")
    assert found is not None
    weights = found.state.weights
    weights["tower.text.weight"] = weights["tower.text.weight"].transpose(0, 1)
    document = {key: found.document[key] for key in ("progress", "stream")}
    save_checkpoint(tmp_path / "b" / "checkpoints", 9, found.state, document, keep=2)
    shutil.copytree(tmp_path / "a" / "best", tmp_path / "b" / "best")
    with pytest.raises(UserError, match=r"the training state belongs to another model: tower\.text\.weight differs"):
        run(data, tmp_path / "b", epochs=2)


def test_resume_refuses_another_stream(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a", epochs=1)
    with pytest.raises(UserError, match=r"stream\.mode was 'sequence', is 'prefix'"):
        run(data, tmp_path / "a", epochs=2, mode="prefix")


def test_nan_loss_stops_the_run_with_a_remedy(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the loss or its gradient is NaN or Inf since step \d+ .*[Ll]ower training.learning_rate"
    ):
        run(data, tmp_path / "a", epochs=3, learning_rate=1e30)


def test_patience_stops_the_run_and_keeps_best_weights(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "a", epochs=9, patience=2)
    progress = done["progress"]
    assert (progress.epoch, progress.best_epoch) == (3, 1)  # the metric is constant, so the first epoch wins
    assert progress.finished == "no better validation Recall@10 in 2 validations"
    kept = list((tmp_path / "a" / "best").iterdir())
    assert kept == [best_weights(tmp_path / "a", 1)]


def test_resume_continues_with_more_epochs_or_patience(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "a", epochs=9, patience=1)["progress"]
    assert (first.epoch, first.finished) == (2, "no better validation Recall@10 in 1 validation")
    again = run(data, tmp_path / "a", epochs=9, patience=1)
    assert again["progress"] == first and not again["curve"]
    patient = run(data, tmp_path / "a", epochs=9, patience=3)["progress"]
    assert (patient.epoch, patient.finished) == (4, "no better validation Recall@10 in 3 validations")
    longer = run(data, tmp_path / "b", epochs=2) and run(data, tmp_path / "b", epochs=3)
    assert (longer["progress"].epoch, longer["progress"].finished) == (3, "all epochs done")


def test_nan_weights_are_neither_saved_nor_validated(data: Path, tmp_path: Path) -> None:
    """The loss is computed before the update, so it does not show that the update gave NaN weights."""
    with pytest.raises(UserError, match=r"weights are NaN or Inf after step \d+ \(epoch 1\)"):
        run(data, tmp_path / "a", epochs=3, learning_rate=1e38, checkpoint_every=1, weight_decay=1e10)
    assert load_latest(tmp_path / "a" / "checkpoints") is None


def test_resume_falls_back_from_a_damaged_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The previous one still has its best weights, though a later validation was better."""
    run(data, tmp_path / "a", epochs=2, recalls=[0.1, 0.2])
    newest = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    (newest / "moments.safetensors").write_bytes(b"torn")
    best_weights(tmp_path / "a", 2).unlink()
    done = run(data, tmp_path / "a", epochs=3, recalls=[0.05, 0.04])["progress"]
    assert "moments.safetensors: missing, truncated or modified" in capsys.readouterr().err
    assert (done.epoch, done.best_epoch) == (3, 1) and best_weights(tmp_path / "a", 1).is_file()


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_resume_detects_damaged_best_weights(
    data: Path, tmp_path: Path, damage: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run falls back to a checkpoint whose best weights are intact, and recreates the lost ones."""
    options: dict[str, Any] = {"noise": True, "checkpoint_every": 2, "keep_checkpoints": 9, "recalls": [0.1, 0.2, 0.1]}
    straight = run(data, tmp_path / "straight", **options)
    run(data, tmp_path / "a", **options, stop_after=len(straight["curve"]) - 1)
    corrupt(best_weights(tmp_path / "a", 2), damage)
    resumed = run(data, tmp_path / "a", **{**options, "recalls": [0.2, 0.1]})
    assert "best/epoch-00002.safetensors: missing, truncated or modified" in capsys.readouterr().err
    first = resumed["curve"][0][0]
    assert first <= 2 * len(straight["curve"]) // 3, "fell back before the end of the second epoch"
    assert_same({**straight, "curve": straight["curve"][first - 1 :]}, resumed)
    mine, theirs = (best_weights(tmp_path / name, 2).read_bytes() for name in ("a", "straight"))
    assert mine == theirs


def test_best_weights_damaged_between_saves_are_detected(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a", epochs=1, keep_checkpoints=9)
    corrupt(best_weights(tmp_path / "a", 1), "flip")
    with pytest.raises(UserError, match=r"all checkpoints are damaged.*best/epoch-00001"):
        run(data, tmp_path / "a", epochs=2)
    run(data, tmp_path / "b", epochs=1, keep_checkpoints=9)
    flip = [lambda: corrupt(best_weights(tmp_path / "b", 1), "flip"), lambda: None]

    class Flipping(list[float]):
        def __iter__(self) -> Any:
            for value in (0.05, 0.04):
                flip.pop(0)()  # later saves repeat the digest of the first one
                yield value

    run(data, tmp_path / "b", epochs=3, keep_checkpoints=9, recalls=Flipping())
    with pytest.raises(UserError, match=r"all checkpoints are damaged.*best/epoch-00001"):
        run(data, tmp_path / "b", epochs=4)


def damaged_run(data: Path, folder: Path) -> tuple[str, list[tuple[int, float]]]:
    try:
        return "", run(data, folder, epochs=2, checkpoint_every=2, keep_checkpoints=3)["curve"]
    except UserError as error:
        return str(error), []


def test_resume_from_damage_agrees_on_all_ranks(data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "a" / "checkpoints"
    run(data, tmp_path / "a", epochs=2, stop_after=7, checkpoint_every=2, keep_checkpoints=3)
    steps = steps_in(checkpoints)
    assert len(steps) == 3
    oldest, middle, newest = (checkpoints / f"step-{step:08d}" for step in steps)
    corrupt(newest / "weights.safetensors", "flip")
    corrupt(oldest / "progress.json", "cut")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    outcomes = on_ranks(2, damaged_run, data, tmp_path / "a")
    assert [failure for failure, _ in outcomes] == ["", ""]
    assert outcomes[0][1][0][0] == steps[1] + 1, "resumes after the middle one"
    corrupt(tmp_path / "b" / "checkpoints" / middle.name / "moments.safetensors", "gone")
    failures = [failure for failure, _ in on_ranks(2, damaged_run, data, tmp_path / "b")]
    assert failures[0] == failures[1] and "all checkpoints are damaged, the oldest too" in failures[0]
    assert steps_in(tmp_path / "b" / "checkpoints") == steps, "nothing was removed"


def test_damaged_checkpoints_do_not_displace_complete_ones(data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "a" / "checkpoints"
    run(data, tmp_path / "a", epochs=2, stop_after=6, checkpoint_every=2, keep_checkpoints=3)
    assert steps_in(checkpoints) == [2, 4, 6]
    for step in (4, 6):
        corrupt(checkpoints / f"step-{step:08d}" / "weights.safetensors", "cut")
    run(data, tmp_path / "a", epochs=2, stop_after=1, keep_checkpoints=2)
    assert steps_in(checkpoints) == [2, 3]
    found = load_latest(checkpoints)
    assert found is not None and found.folder.name == "step-00000003"


def test_throughput_curve_excludes_validation_time(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, rates = [0.0], list[float]()

    def clock() -> float:
        seconds[0] += 0.001
        return seconds[0]

    class Slow(list[float]):
        def __iter__(self) -> Any:
            while True:
                seconds[0] += 1000.0
                yield 0.1

    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(StatusReporter, "report", lambda self, step, loss, rate, wait: rates.append(rate))
    run(data, tmp_path / "a", recalls=Slow())
    assert seconds[0] > 3000 and len(rates) > 9 and min(rates) > 100


def test_sampled_negatives_with_log_q_reduce_the_loss(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "a", negatives="sampled", epochs=3, loss={"log_q": True})
    losses = [loss for _, loss in done["curve"]]
    assert losses[-1] < losses[0]
