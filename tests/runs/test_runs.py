"""Runs on a local Ray: DeepSpeed workers, the registry, resuming through it, adaptation, the verdict."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from antdist.cli.main import cli
from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, RayConfig, RelearnConfig
from antdist.distributed.ray_session import ray_session, run_workers
from antdist.errors import Preempted, UserError
from antdist.model.io import read_card
from antdist.runs import adapt as relearning
from antdist.runs.adapt import relearn
from antdist.runs.pretrain import PretrainedModel, pretrain
from antdist.serving.apply import evaluate_model, open_model, recommend_items
from antdist.serving.pyfunc import _load_pyfunc
from antdist.tracking import store
from antdist.tracking.resolve import resolve
from antdist.tracking.store import connect
from tests.ranks import free_port
from tests.worlds import make_domains

pytestmark = pytest.mark.ray

AUXILIARY = ["aa", "bbb", "cccc"]
SMALL_MODEL = {"dim": 16, "inner": 16, "experts": 2, "max_length": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", [*AUXILIARY, "target"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(RayConfig(workers=2)):
            yield folder


def pretrain_config(world: Path, name: str, **changes: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "name": name,
        "data": {"root": str(world / "data"), "domains": AUXILIARY},
        "model": {**SMALL_MODEL, **changes.pop("model", {})},
        "stream": {"batch_size": 200},
        "training": {"epochs": 2, "log_every": 1, **changes.pop("training", {})},
        "ray": {"workers": changes.pop("workers", 2), "storage": str(world / "runs"), "max_failures": 0},
        **changes,
    }
    return check_config(PretrainConfig, tree)


def relearn_config(world: Path, **changes: Any) -> RelearnConfig:
    tree: dict[str, Any] = {
        "name": "adapt",
        "target": "target",
        "strategy": "auto",
        "data": {"root": str(world / "data")},
        "model": SMALL_MODEL,
        "stream": {"batch_size": 200},
        "training": {"epochs": 2},
        "seeds": [0, 1],
        "ray": {"workers": 2, "storage": str(world / "runs"), "max_failures": 0},
        **changes,
    }
    return check_config(RelearnConfig, tree)


@pytest.fixture(scope="module")
def pretrained(world: Path) -> PretrainedModel:
    return pretrain(pretrain_config(world, "straight"))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "weights.safetensors")


def curve(run: PretrainedModel, metric: str = "train/loss") -> list[tuple[int, float]]:
    points = connect(run.tracking_uri).get_metric_history(run.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_pretrain_registers_model_lineage_curves_and_state(world: Path, pretrained: PretrainedModel) -> None:
    assert pretrained.model == "models:/straight/1" and pretrained.finished == "all epochs done"
    found = resolve("models:/straight@champion", pretrained.tracking_uri)
    assert found.uri == pretrained.model and found.tags["task"].startswith("pretrain:")
    card = read_card(found.folder)
    assert card.domains == AUXILIARY and card.dims == {"text": 12, "image": 10, "price": 6}
    steps = [step for step, _ in curve(pretrained)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    assert len(curve(pretrained, "validation/Recall_at_10")) == 2
    run = connect(pretrained.tracking_uri).get_run(pretrained.run_id)
    assert run.data.params["training.epochs"] == "2" and run.info.status == "FINISHED"


@pytest.mark.slow
def test_remote_data_give_the_same_run(world: Path, pretrained: PretrainedModel, tmp_path: Path) -> None:
    data = {"root": f"file://{world}/data", "domains": AUXILIARY, "cache": str(tmp_path), "cache_gb": 0.01}
    run = pretrain(pretrain_config(world, "far", data=data))
    assert curve(run) == curve(pretrained)
    near, far = weights(pretrained.folder / "model"), weights(run.folder / "model")
    for name, weight in near.items():
        np.testing.assert_array_equal(far[name], weight, err_msg=name)
    assert len(list(tmp_path.iterdir())) > 10
    for verb, more in (("evaluate", []), ("recommend", ["--user", "user-3"])):
        here, there = (
            CliRunner().invoke(cli, [verb, run.model, f"{root}/target", "--storage", str(world / "runs"), *more])
            for root in (world / "data", data["root"])
        )
        assert here.exit_code == 0 and here.stdout == there.stdout


def test_resume_through_registry_equals_uninterrupted_run(world: Path, pretrained: PretrainedModel) -> None:
    """Law 3, with the first run's folder deleted: all state comes from the registered one."""
    first = pretrain(pretrain_config(world, "parts", training={"stop_after": 3}))
    assert first.finished is None
    shutil.rmtree(first.folder)
    second = pretrain(pretrain_config(world, "parts", resume="models:/parts/latest"))
    assert (second.model, second.finished) == ("models:/parts/2", "all epochs done")
    assert second.run_id == first.run_id
    assert curve(second) == curve(pretrained)
    straight, resumed = weights(pretrained.folder / "model"), weights(second.folder / "model")
    for name, weight in straight.items():
        np.testing.assert_array_equal(resumed[name], weight, err_msg=name)


def test_two_workers_equal_one_with_the_same_global_batch(world: Path) -> None:
    """Law 2, through Ray and DeepSpeed; without noise, which each rank draws."""
    quiet = {"mixture": False, "dropout": 0.0}
    one = pretrain(pretrain_config(world, "one", model=quiet, workers=1))
    two = pretrain(pretrain_config(world, "two", model=quiet, workers=2))
    for (step, loss), (other_step, other) in zip(curve(one), curve(two), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other, rel=1e-5)


def test_relearn_judges_strategies_and_chooses_one(world: Path, pretrained: PretrainedModel) -> None:
    done = relearn(relearn_config(world, **{"from": pretrained.model}))
    assert [row.strategy for row in done.rows] == ["scratch", "finetune", "relearn"]
    assert all(row.verdict is not None and row.verdict.transfer != "unknown" for row in done.rows[1:])
    found = resolve(done.model, done.tracking_uri)
    assert found.tags["target"] == "target" and found.tags["strategy"] == done.chosen
    assert found.tags.get("parent") == (None if done.chosen == "scratch" else pretrained.model)
    table = "\n".join(done.lines())
    assert "Recall@10 to scratch" in table and "chosen on validation" in table
    # the table shows the metrics that evaluating the model gives
    card = read_card(found.folder)
    assert card.strategy == done.chosen and card.seed in (0, 1)
    figures = evaluate_model(open_model(done.model, world / "data" / "target", world / "runs"), "test")
    assert figures["Recall@10"] == pytest.approx(card.made["test"]["Recall@10"])
    # the registered model recommends the target's items without its features
    answer = _load_pyfunc(str(found.folder)).predict(
        pd.DataFrame({"history": [["target-1"], ["target-2", "target-3"]]})
    )
    assert all(item.startswith("target-") for items in answer["items"] for item in items)
    # run again: nothing is trained, the same choice, no new version
    assert relearn(relearn_config(world, **{"from": pretrained.model})).model == done.model


def test_relearn_freezes_the_transformer_and_not_the_tower(world: Path, pretrained: PretrainedModel) -> None:
    relearn(relearn_config(world, strategy="relearn", seeds=[0], **{"from": pretrained.model}))
    parent, adapted = weights(pretrained.folder / "model"), weights(world / "runs/adapt/target/relearn-seed0/model")
    for name, weight in adapted.items():
        same = name in parent and parent[name].shape == weight.shape and np.array_equal(parent[name], weight)
        assert same == name.startswith("encoder."), name


def test_relearn_without_scratch_promotes_nothing(world: Path, pretrained: PretrainedModel) -> None:
    done = relearn(relearn_config(world, name="alone", strategy="relearn", **{"from": pretrained.model}))
    assert done.rows[0].verdict is not None and done.rows[0].verdict.transfer == "unknown"
    assert "kept from being champion" in done.champion
    with pytest.raises(UserError, match="has no alias 'champion'"):
        resolve("models:/alone-target@champion", done.tracking_uri)


def test_registered_model_is_the_best_seed_in_any_order(world: Path, pretrained: PretrainedModel) -> None:
    done = relearn(relearn_config(world, name="order", strategy="scratch", seeds=[2, 1, 0]))
    found = resolve(done.model, done.tracking_uri)
    cards = {seed: read_card(done.folder / f"scratch-seed{seed}" / "model") for seed in (0, 1, 2)}
    reached = {seed: card.made["validation"]["Recall@10"] for seed, card in cards.items()}
    assert len(set(reached.values())) == 3
    best = max(reached, key=lambda seed: reached[seed])
    assert read_card(found.folder).seed == best and found.tags["seed"] == str(best)
    assert float(found.tags["validation_recall_at_10"]) == reached[best]


def test_relearn_resumes_after_stop_after(world: Path) -> None:
    stopped = relearn_config(world, name="pause", strategy="scratch", training={"epochs": 2, "stop_after": 1})
    with pytest.raises(
        UserError, match=r"training.stop_after: stopped early: scratch-seed0, scratch-seed1\. Run the same"
    ):
        relearn(stopped)
    done = relearn(relearn_config(world, name="pause", strategy="scratch"))
    assert read_card(done.folder / "scratch-seed1" / "model").made["epochs"] == 2
    with pytest.raises(UserError, match=r"another configuration: training.epochs was 2, is 3"):
        relearn(relearn_config(world, name="pause", strategy="scratch", training={"epochs": 3}))


def test_item_embeddings_belong_to_one_catalogue(world: Path) -> None:
    """ANT_t knows the items of its target alone, not of another domain of the same size."""
    done = relearn(
        relearn_config(world, name="ant_t", strategy="scratch", model={**SMALL_MODEL, "item_embeddings": True})
    )
    assert evaluate_model(open_model(done.model, world / "data/target", world / "runs"), "test")["users"] == 40
    with pytest.raises(UserError, match=r"an embedding for each item of target at fingerprint .* none for aa"):
        open_model(done.model, world / "data/aa", world / "runs")


def test_finished_run_is_not_trained_again(
    world: Path, pretrained: PretrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    again = pretrain(pretrain_config(world, "straight"))
    assert again.model == pretrained.model and curve(again) == curve(pretrained)
    assert "straight: already finished (all epochs done, step" in capsys.readouterr().err


def test_paths_may_be_relative_to_the_working_folder(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    config = pretrain_config(world, "relative", training={"epochs": 1})
    data, ray = config.data.model_copy(update={"root": "data"}), config.ray.model_copy(update={"storage": "runs"})
    done = pretrain(config.model_copy(update={"data": data, "ray": ray}))
    assert done.folder == world / "runs" / "relative"


def test_diverged_run_resumes_as_its_error_advises(world: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"the loss or its gradient is NaN or Inf since step \d+.*[Ll]ower training.learning_rate.*start again",
    ):
        pretrain(pretrain_config(world, "diverged", training={"learning_rate": 1e30}))
    again = pretrain(pretrain_config(world, "diverged", training={"learning_rate": 1e-3}))
    assert again.finished == "all epochs done"


def test_killed_worker_resumes_bit_for_bit(world: Path, tmp_path: Path) -> None:
    """Ray starts another, which resumes to the same weights, also as with a profile."""
    training = {"epochs": 40, "validate_every": 40}
    straight = pretrain(pretrain_config(world, "unkilled", training=training, workers=1, profile=True))
    trace = straight.folder / "profile" / "rank-0.json.gz"
    assert {"wait for data", "backward"} <= {
        e["name"] for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    artifacts = connect(straight.tracking_uri).list_artifacts(straight.run_id, "profile")
    assert [artifact.path for artifact in artifacts] == ["profile/rank-0.json.gz"]
    config = pretrain_config(world, "killed", training=training, workers=1)
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"max_failures": 1})})
    folder = world / "runs" / "killed"
    killer = threading.Thread(target=kill_leader_after, args=(folder, 5))
    killer.start()
    killed = pretrain(config)
    killer.join()
    assert "resumes at step" in (folder / "log.txt").read_text()
    for name, weight in weights(straight.folder / "model").items():
        np.testing.assert_array_equal(weights(killed.folder / "model")[name], weight, err_msg=name)


def test_preempted_pretrain_resumes_bit_for_bit(world: Path, pretrained: PretrainedModel) -> None:
    """SIGTERM to the driver before the second of nine steps: no worker dies, nothing differs."""
    folder = world / "runs" / "terminated"
    config = pretrain_config(world, "terminated")
    terminator = threading.Thread(target=terminate_once, args=(folder / "lock",))
    terminator.start()
    with pytest.raises(Preempted, match=r"terminated: stopped after step \d+; run the same command to continue"):
        pretrain(config)
    terminator.join()
    assert not (folder / "stop").exists()
    known = json.loads((folder / "run.json").read_text())["run_id"]
    assert connect(f"sqlite:///{world}/runs/mlflow.db").get_run(known).info.status == "KILLED"
    done = pretrain(config)
    assert done.finished == "all epochs done" and curve(done) == curve(pretrained)
    for name, weight in weights(pretrained.folder / "model").items():
        np.testing.assert_array_equal(weights(done.folder / "model")[name], weight, err_msg=name)


def terminate_once(ready: Path) -> None:
    """Send SIGTERM to this process once the run handles it."""
    before = signal.getsignal(signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) in (before, signal.default_int_handler):
        time.sleep(0.02)
    assert ready.exists()
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_runs_resume_from_remote_storage_without_folders(
    world: Path, pretrained: PretrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stopped pre-training, in the same MLflow run; and a finished trial, not trained again."""

    def copied(config: Any) -> Any:
        ray = config.ray.model_copy(update={"remote_storage": f"file://{tmp_path}"})
        return config.model_copy(update={"ray": ray})

    first = pretrain(copied(pretrain_config(world, "copied", training={"stop_after": 4})))
    shutil.rmtree(first.folder)
    done = pretrain(copied(pretrain_config(world, "copied")))
    assert "fetched the checkpoint of step 4 from" in capsys.readouterr().err
    assert done.run_id == first.run_id and curve(done) == curve(pretrained)
    for name, weight in weights(pretrained.folder / "model").items():
        np.testing.assert_array_equal(weights(done.folder / "model")[name], weight, err_msg=name)
    config = copied(relearn_config(world, name="copied", strategy="scratch", seeds=[0]))
    trial = relearn(config).folder / "scratch-seed0"
    before = weights(trial / "model")
    shutil.rmtree(trial.parent)
    relearn(config)
    assert "target scratch seed 0: already finished (all epochs done" in capsys.readouterr().err
    for name, weight in before.items():
        np.testing.assert_array_equal(weights(trial / "model")[name], weight, err_msg=name)


def test_preempted_relearn_resumes_its_trial(world: Path) -> None:
    config = relearn_config(world, name="parted", strategy="scratch")
    terminator = threading.Thread(target=terminate_once, args=(world / "runs" / "parted" / "target" / "lock",))
    terminator.start()
    with pytest.raises(Preempted, match=r"target scratch seed 0: stopped after step \d+; run the same command"):
        relearn(config)
    terminator.join()
    done = relearn(config)
    whole = relearn(relearn_config(world, name="whole", strategy="scratch"))
    for seed in (0, 1):
        ours, theirs = (weights(each.folder / f"scratch-seed{seed}" / "model") for each in (done, whole))
        for name, weight in theirs.items():
            np.testing.assert_array_equal(ours[name], weight, err_msg=name)


@pytest.mark.slow
def test_offline_run_survives_a_kill_and_registers_later(
    world: Path, pretrained: PretrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is unreachable throughout; the later start delivers the curve and trains nothing."""
    faults = [{"fault": "kill", "at": "step", "rank": 0, "step": 6, "once": str(world / "killed-offline")}]
    away = f"http://127.0.0.1:{free_port()}"
    config = pretrain_config(world, "offline", tracking={"uri": away, "offline_ok": True})
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"max_failures": 1})})
    refused = config.model_copy(update={"tracking": config.tracking.model_copy(update={"offline_ok": False})})
    with pytest.raises(UserError, match="the tracking server does not answer"):
        pretrain(refused)
    monkeypatch.setattr(store, "WAITS", (0.1,))
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    with pytest.raises(UserError, match=r"the tracking store refused or failed.* then run the command again"):
        pretrain(config)
    monkeypatch.delenv("ANTDIST_FAULTS")
    assert (world / "killed-offline").exists()
    assert capsys.readouterr().err.count("offline, since tracking.offline_ok is set: records wait on disk") == 1
    done = pretrain(pretrain_config(world, "offline"))
    assert done.model == "models:/offline/1" and curve(done) == curve(pretrained)
    run = connect(done.tracking_uri).get_run(done.run_id)
    assert run.info.status == "FINISHED" and run.data.params["training.epochs"] == "2"
    for name, weight in weights(pretrained.folder / "model").items():
        np.testing.assert_array_equal(weights(done.folder / "model")[name], weight, err_msg=name)


def test_relearn_workers_need_no_store(
    world: Path, pretrained: PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is unreachable for them: the driver resolves the parent, and delivers pending records."""

    def run_without_store(work: Any, settings: Any, *others: Any) -> None:
        run_workers(work, replace(settings, store=f"http://127.0.0.1:{free_port()}"), *others)

    monkeypatch.setattr(relearning, "run_workers", run_without_store)
    done = relearn(relearn_config(world, name="away", strategy="relearn", seeds=[0], **{"from": pretrained.model}))
    trial = json.loads((done.folder / "relearn-seed0" / "run.json").read_text())
    run = connect(done.tracking_uri).get_run(trial["run_id"])
    assert trial["parent"] == pretrained.model and run.info.status == "FINISHED"
    steps = [point.step for point in connect(done.tracking_uri).get_metric_history(trial["run_id"], "train/loss")]
    assert len(steps) > 0 and steps == sorted(set(steps))


def test_dead_worker_is_a_one_line_error(world: Path) -> None:
    config = pretrain_config(world, "dead", training={"epochs": 400}, workers=1)
    killer = threading.Thread(target=kill_leader_after, args=(world / "runs" / "dead", 1))
    killer.start()
    with pytest.raises(
        UserError, match=r"a worker died: killed, .* The same command continues from the last checkpoint"
    ):
        pretrain(config)
    killer.join()
    known = json.loads((world / "runs" / "dead" / "run.json").read_text())["run_id"]
    assert connect(f"sqlite:///{world}/runs/mlflow.db").get_run(known).info.status == "FAILED"


def kill_leader_after(folder: Path, epochs: int) -> None:
    """Kill the leading worker, found by its open lock, once it has written so many checkpoints."""
    seen: set[str] = set()
    while len(seen) < epochs:
        seen |= {path.parent.name for path in folder.glob("checkpoints/step-*/COMPLETE.json")}
        time.sleep(0.02)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("ray::") and any(
                file.path == str(folder / "leader.lock") for file in process.open_files()
            ):
                process.kill()


def test_another_config_under_the_same_name_is_refused(world: Path, pretrained: PretrainedModel) -> None:
    with pytest.raises(UserError, match=r"another configuration: training.learning_rate was 0.001, is 0.5"):
        pretrain(pretrain_config(world, "straight", training={"learning_rate": 0.5}))


def test_recommend_prints_titles(world: Path, pretrained: PretrainedModel) -> None:
    arguments = ["recommend", pretrained.model, str(world / "data/target"), "--storage", str(world / "runs")]
    told = CliRunner().invoke(cli, [*arguments, "--user", "user-3", "-n", "4"], catch_exceptions=False).output
    assert told.count("thing ") >= 4 + 3 and "  4  " in told
    opened = open_model(pretrained.model, world / "data/target", world / "runs")
    found = recommend_items(opened, user=None, history=["target-3", "target-5"], n=5)
    assert [item.item_id for item in found.history] == ["target-3", "target-5"]
    assert len(found.items) == 5 and not {"target-3", "target-5"} & {item.item_id for item in found.items}
    with pytest.raises(UserError, match=r"no item 'target-99'.*[Dd]id you mean target-"):
        recommend_items(opened, user=None, history=["target-99"], n=5)
