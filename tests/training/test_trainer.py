"""The loop's laws, on the core alone: any number of ranks gives the same losses (law 2); stop and resume is exact (law 3)."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from antdist.batch import GlobalBatch
from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
from antdist.data.domain import open_domain
from antdist.data.stream.stream import Stream
from antdist.distributed.world import current_world
from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.features.table import Catalogue
from antdist.model.recommender import build_recommender
from antdist.training import trainer as loop
from antdist.training.checkpoints.local import best_weights, load_checkpoint, load_latest, save_checkpoint, steps_in
from antdist.training.checkpoints.remote import Remote
from antdist.training.engines.deepspeed import DeepSpeedEngine
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed, StepInput
from antdist.training.trainer import Job, train
from tests.ranks import on_ranks
from tests.worlds import make_domains

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
    asked: Any = lambda: None,
    **training: Any,
) -> dict[str, Any]:
    """Train a small model on two domains; give the curve, the last weights and the progress."""
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

    class NotedFeed(Feed):
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
    job = Job(
        engine=(DeepSpeedEngine if engine == "deepspeed" else PlainEngine)(model, config, world),
        feed=NotedFeed(stream, catalogue, losses, popularity, config.accumulation, 3, world),
        config=config,
        world=world,
        folder=folder,
        seed=3,
        validate=lambda: {"Recall@10": next(validations), "NDCG@10": 0.05},
        report=report,
        asked=asked,
        start=load_checkpoint(start) if start else None,
        remote=Remote(remote) if remote else None,
        profile=profile,
    )
    progress = train(job)
    state = job.engine.state()
    return {
        "curve": curve,
        "weights": {name: value.numpy() for name, value in state.weights.items()},
        "gradients": {name: value.numpy() for name, value in state.moments.get("exp_avg", {}).items()},
        "progress": progress,
        "history": progress.history,
        "users": [users[step] for step in sorted(users) if step < progress.step],  # a few more were read ahead
    }


def silence_routing(model: torch.nn.Module) -> None:
    """No routing noise: sigma is softplus of a very negative number plus 0.01, so take the 0.01 as well."""
    for module in model.modules():
        if hasattr(module, "route"):
            module.route = lambda x, gate=module.gate: (x @ gate).float().softmax(-1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> None:
    """The same curve and, with no tolerance, the very same weights; else the same running mean of gradients, as Adam
    makes steps of full size out of rounding errors where the true gradient is zero (the biases of attention's keys)."""
    steps_a, losses_a = zip(*a["curve"], strict=True)
    steps_b, losses_b = zip(*b["curve"], strict=True)
    assert steps_a == steps_b
    np.testing.assert_allclose(losses_a, losses_b, rtol=tolerance, atol=tolerance)
    kind = "gradients" if tolerance else "weights"
    assert a[kind].keys() == b[kind].keys() and a[kind]
    for name, value in a[kind].items():
        np.testing.assert_allclose(value, b[kind][name], rtol=tolerance * 10, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("negatives", ["in_batch", "catalogue", "sampled"])
def test_any_number_of_ranks_gives_the_same_losses_and_weights(data: Path, tmp_path: Path, negatives: str) -> None:
    """Law 2."""
    options = {"negatives": negatives, "accumulation": 2, "epochs": 2}
    alone = run(data, tmp_path / "1", **options)
    assert len(alone["curve"]) > 6
    for size in (2, 3):
        together = on_ranks(size, _run, data, tmp_path / str(size), options)
        assert_same(alone, together[0], 1e-5)
        assert all(peer["history"] == together[0]["history"] for peer in together[1:])


def _run(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(data, folder, **options)


def test_the_deepspeed_engine_gives_the_plain_engines_losses(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", epochs=2)
    twin = on_ranks(2, _run, data, tmp_path / "twin", {"engine": "deepspeed", "epochs": 2, "zero_stage": 1})
    assert_same(plain, twin[0], 1e-5)


def test_bfloat16_gives_nearly_the_losses_of_float32_in_both_engines(data: Path, tmp_path: Path) -> None:
    exact = run(data, tmp_path / "exact", epochs=2)
    plain = run(data, tmp_path / "plain", epochs=2, precision="bf16")
    options = {"engine": "deepspeed", "epochs": 2, "precision": "bf16"}
    (twin,) = on_ranks(1, _run, data, tmp_path / "twin", options)
    losses = {name: np.array([loss for _, loss in each["curve"]]) for name, each in
              {"exact": exact, "plain": plain, "twin": twin}.items()}  # fmt: skip
    assert losses["exact"][-1] < losses["exact"][0] - 1
    for name in ("plain", "twin"):
        np.testing.assert_allclose(losses[name], losses["exact"], rtol=0.02)
        assert (losses[name] != losses["exact"]).all(), "not in bfloat16"
    np.testing.assert_allclose(losses["plain"], losses["twin"], rtol=2e-3)
    assert all(value.dtype == np.float32 for value in twin["weights"].values())


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(data: Path, tmp_path: Path, mode: str) -> None:
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


def test_noise_is_on_in_that_test(data: Path, tmp_path: Path) -> None:
    silent, noisy = run(data, tmp_path / "a", epochs=1), run(data, tmp_path / "b", epochs=1, noise=True)
    assert silent["curve"] != noisy["curve"]


def test_a_run_goes_on_elsewhere_from_another_runs_checkpoint(data: Path, tmp_path: Path) -> None:
    straight = run(data, tmp_path / "straight", noise=True, epochs=2)
    run(data, tmp_path / "first", noise=True, epochs=2, stop_after=5)
    found = load_latest(tmp_path / "first" / "checkpoints")
    assert found is not None
    elsewhere = run(data, tmp_path / "second", noise=True, epochs=2, start=found.folder)
    assert_same({**straight, "curve": straight["curve"][5:]}, elsewhere)


def test_best_weights_that_cannot_be_brought_are_told_on_all_ranks(data: Path, tmp_path: Path) -> None:
    """They lie beside another run's checkpoints, and there is no room for a copy of them."""
    run(data, tmp_path / "first", epochs=1)
    found = load_latest(tmp_path / "first" / "checkpoints")
    assert found is not None and found.progress["progress"]["best_epoch"] == 1
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "best").touch()  # where the folder would be: as on a full disk
    told = on_ranks(2, _refused, data, tmp_path / "second", {"epochs": 2, "start": found.folder})
    assert told[0] == told[1] and "second/best: the best weights (epoch 1) cannot be brought here" in told[0]


def _refused(data: Path, folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run(data, folder, **options)
    return str(caught.value)


def test_a_state_of_another_model_is_refused_though_it_has_as_many_numbers(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a", epochs=1)
    found = load_latest(tmp_path / "a" / "checkpoints")
    assert found is not None
    weights = found.state.weights
    weights["tower.text.weight"] = weights["tower.text.weight"].transpose(0, 1)
    document = {key: found.progress[key] for key in ("progress", "stream")}
    save_checkpoint(tmp_path / "b" / "checkpoints", 9, found.state, document, keep=2)
    shutil.copytree(tmp_path / "a" / "best", tmp_path / "b" / "best")
    with pytest.raises(UserError, match=r"the training state is of another model: tower\.text\.weight differs"):
        run(data, tmp_path / "b", epochs=2)


def test_resuming_with_another_stream_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a", epochs=1)
    with pytest.raises(UserError, match=r"stream\.mode was 'sequence', is 'prefix'"):
        run(data, tmp_path / "a", epochs=2, mode="prefix")


def test_a_diverged_loss_stops_the_run_with_advice(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the loss or its gradient is no number since step \d+ .*[Ll]ower training.learning_rate"
    ):
        run(data, tmp_path / "a", epochs=3, learning_rate=1e30)


def test_patience_ends_the_run_and_the_best_weights_stay(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "a", epochs=9, patience=2)
    progress = done["progress"]
    assert (progress.epoch, progress.best_epoch) == (3, 1)  # the constant metric is best at first
    assert progress.finished == "no better validation Recall@10 in 2 validations"
    kept = list((tmp_path / "a" / "best").iterdir())
    assert kept == [best_weights(tmp_path / "a", 1)]


def test_more_epochs_or_more_patience_go_on_and_the_same_do_not(data: Path, tmp_path: Path) -> None:
    first = run(data, tmp_path / "a", epochs=9, patience=1)["progress"]
    assert (first.epoch, first.finished) == (2, "no better validation Recall@10 in 1 validations")
    again = run(data, tmp_path / "a", epochs=9, patience=1)
    assert again["progress"] == first and not again["curve"]
    patient = run(data, tmp_path / "a", epochs=9, patience=3)["progress"]
    assert (patient.epoch, patient.finished) == (4, "no better validation Recall@10 in 3 validations")
    longer = run(data, tmp_path / "b", epochs=2) and run(data, tmp_path / "b", epochs=3)
    assert (longer["progress"].epoch, longer["progress"].finished) == (3, "all epochs done")


def test_weights_that_are_no_numbers_are_neither_kept_nor_validated(data: Path, tmp_path: Path) -> None:
    """The loss of a step is computed before its update: it does not tell that the update broke the weights."""
    with pytest.raises(UserError, match=r"weights are no numbers after step \d+ \(epoch 1\)"):
        run(data, tmp_path / "a", epochs=3, learning_rate=1e38, checkpoint_every=1, weight_decay=1e10)
    assert load_latest(tmp_path / "a" / "checkpoints") is None


def test_a_damaged_last_checkpoint_costs_an_epoch_and_no_more(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before it still has its best weights, though a later validation was better."""
    run(data, tmp_path / "a", epochs=2, recalls=[0.1, 0.2])
    newest = sorted((tmp_path / "a" / "checkpoints").iterdir())[-1]
    (newest / "moments.safetensors").write_bytes(b"torn")
    best_weights(tmp_path / "a", 2).unlink()
    done = run(data, tmp_path / "a", epochs=3, recalls=[0.05, 0.04])["progress"]
    assert "moments.safetensors: missing, cut short or altered" in capsys.readouterr().err
    assert (done.epoch, done.best_epoch) == (3, 1) and best_weights(tmp_path / "a", 1).is_file()


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_best_weights_are_found_by_the_checkpoint_that_names_them(
    data: Path, tmp_path: Path, damage: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run falls back on a checkpoint whose best weights are whole, and makes the lost ones again."""
    options: dict[str, Any] = {"noise": True, "checkpoint_every": 2, "keep_checkpoints": 9, "recalls": [0.1, 0.2, 0.1]}
    straight = run(data, tmp_path / "straight", **options)
    run(data, tmp_path / "a", **options, stop_after=len(straight["curve"]) - 1)
    corrupt(best_weights(tmp_path / "a", 2), damage)
    resumed = run(data, tmp_path / "a", **{**options, "recalls": [0.2, 0.1]})
    assert "best/epoch-00002.safetensors: missing, cut short or altered" in capsys.readouterr().err
    first = resumed["curve"][0][0]
    assert first <= 2 * len(straight["curve"]) // 3, "fell back before the end of the second epoch"
    assert_same({**straight, "curve": straight["curve"][first - 1 :]}, resumed)
    mine, theirs = (best_weights(tmp_path / name, 2).read_bytes() for name in ("a", "straight"))
    assert mine == theirs


def test_what_damages_the_best_weights_between_two_saves_does_not_pass_for_them(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "a", epochs=1, keep_checkpoints=9)
    corrupt(best_weights(tmp_path / "a", 1), "flip")
    with pytest.raises(UserError, match=r"all checkpoints are damaged.*best/epoch-00001"):
        run(data, tmp_path / "a", epochs=2)
    run(data, tmp_path / "b", epochs=1, keep_checkpoints=9)
    flip = [lambda: corrupt(best_weights(tmp_path / "b", 1), "flip"), lambda: None]

    class Flipping(list[float]):
        def __iter__(self) -> Any:
            for value in (0.05, 0.04):
                flip.pop(0)()  # the later saves carry on what the first one said of the file
                yield value

    run(data, tmp_path / "b", epochs=3, keep_checkpoints=9, recalls=Flipping())
    with pytest.raises(UserError, match=r"all checkpoints are damaged.*best/epoch-00001"):
        run(data, tmp_path / "b", epochs=4)


def damaged_run(data: Path, folder: Path) -> tuple[str, list[tuple[int, float]]]:
    try:
        return "", run(data, folder, epochs=2, checkpoint_every=2, keep_checkpoints=3)["curve"]
    except UserError as error:
        return str(error), []


def test_damage_is_decided_on_by_all_ranks_together(data: Path, tmp_path: Path) -> None:
    """And a damaged one that nobody looked at does not stop the run either."""
    checkpoints = tmp_path / "a" / "checkpoints"
    run(data, tmp_path / "a", epochs=2, stop_after=7, checkpoint_every=2, keep_checkpoints=3)
    steps = steps_in(checkpoints)
    assert len(steps) == 3
    oldest, middle, newest = (checkpoints / f"step-{step:08d}" for step in steps)
    corrupt(newest / "weights.safetensors", "flip")
    corrupt(oldest / "progress.json", "cut")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    told = on_ranks(2, damaged_run, data, tmp_path / "a")
    assert [failure for failure, _ in told] == ["", ""]
    assert told[0][1][0][0] == steps[1] + 1, "goes on after the middle one"
    corrupt(tmp_path / "b" / "checkpoints" / middle.name / "moments.safetensors", "gone")
    failures = [failure for failure, _ in on_ranks(2, damaged_run, data, tmp_path / "b")]
    assert failures[0] == failures[1] and "all checkpoints are damaged, the oldest too" in failures[0]
    assert steps_in(tmp_path / "b" / "checkpoints") == steps, "nothing was removed"


def test_damaged_checkpoints_do_not_push_out_the_whole_ones(data: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "a" / "checkpoints"
    run(data, tmp_path / "a", epochs=2, stop_after=6, checkpoint_every=2, keep_checkpoints=3)
    assert steps_in(checkpoints) == [2, 4, 6]
    for step in (4, 6):
        corrupt(checkpoints / f"step-{step:08d}" / "weights.safetensors", "cut")
    run(data, tmp_path / "a", epochs=2, stop_after=1, keep_checkpoints=2)
    assert steps_in(checkpoints) == [2, 3]
    found = load_latest(checkpoints)
    assert found is not None and found.folder.name == "step-00000003"


def test_the_curve_of_predictions_a_second_leaves_validations_out(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, rates = [0.0], list[float]()

    def clock() -> float:
        seconds[0] += 0.001
        return seconds[0]

    class Slow(list[float]):
        def __iter__(self) -> Any:
            while True:
                seconds[0] += 1000.0
                yield 0.1

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(loop.Meter, "_tell", lambda meter, progress, loss, rate, wait: rates.append(rate))
    run(data, tmp_path / "a", recalls=Slow())
    assert seconds[0] > 3000 and len(rates) > 9 and min(rates) > 100


def test_all_candidates_sampled_with_correction_train(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "a", negatives="sampled", epochs=3, loss={"log_q": True})
    losses = [loss for _, loss in done["curve"]]
    assert losses[-1] < losses[0]
