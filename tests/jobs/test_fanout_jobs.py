"""A fan-out as a user starts it, over HTTP: twelve trials, two at a time, one that fails and one whose driver is killed; then
the same command again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from antdist.config.schema import ModelConfig
from antdist.evaluation.results import load_ranks
from antdist.model.io import ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from tests.heads import PROJECT, Head, ray_head
from tests.worlds import make_domains

TARGETS, STRATEGIES, SEEDS = ["food", "target"], ["scratch", "relearn"], [0, 1, 2]
SMALL: dict[str, Any] = {"dim": 16, "inner": 16, "experts": 2, "max_length": 8}
DIMS: Any = {"text": 12, "image": 10, "price": 6}
RUN = [
    "ray.workers=1", "ray.max_failures=0", "model.dim=16", "model.inner=16", "model.experts=2", "model.max_length=8",
    "stream.batch_size=60", "training.epochs=2", "training.engine=plain", "training.checkpoint_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four domains, and a model in the registry that learned from two of them."""
    folder = tmp_path_factory.mktemp("world")
    domains = make_domains(folder / "data", ["aa", "bbb", *TARGETS])
    config = ModelConfig(**SMALL)
    card = {"kind": "pretrained", "config": config, "dims": DIMS, "domains": ["aa", "bbb"]}
    save_model(folder / "parent", build_recommender(config, DIMS), ModelCard.model_validate(card))
    uri = f"sqlite:///{folder}/runs/mlflow.db"
    run = start_run(uri, "antdist", "parent", folder / "run")
    assert run.finish() is None
    lineage = Lineage({domain.name: domain.fingerprint for domain in domains[:2]})
    register(uri, run.run_id, folder / "parent", "p", lineage, validation=0.5)
    return folder


@pytest.fixture(scope="module")
def head(world: Path) -> Iterator[Head]:
    """The first trial that comes to its second step fails, the first that comes to its third is slow enough to be killed."""
    faults = [
        {"fault": "raise", "at": "step", "step": 1, "once": f"{world}/raised"},
        {"fault": "stall", "at": "step", "step": 2, "seconds": 300, "once": f"{world}/stalled"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTDIST_FAULTS", json.dumps(faults))
        with ray_head(cpus=4) as started:
            yield started


def start(head: Head, *arguments: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "antdist", *arguments, "--address", head.jobs]
    return subprocess.Popen(
        words, env=dict(head.environment), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def jobs(head: Head) -> list[dict[str, Any]]:
    """What the head tells over HTTP of the jobs that antdist submitted, oldest first."""
    found = [job for job in head.get("/api/jobs/") if job["submission_id"] and "verb" in job["metadata"]]
    return sorted(found, key=lambda job: job["start_time"])


def trials(listed: list[dict[str, Any]]) -> list[str]:
    return [job["metadata"]["run"] for job in listed if re.search(r"-seed\d+$", job["metadata"]["run"])]


def most_at_once(listed: list[dict[str, Any]]) -> int:
    edges = [(job["start_time"], 1) for job in listed] + [(job["end_time"], -1) for job in listed]
    level = np.cumsum([change for _, change in sorted(edges)])
    return int(level.max())


def kill_the_stalled(head: Head, world: Path, fan: subprocess.Popen[str]) -> str:
    """kill -9 the driver of the trial whose worker stalls; the trial."""
    deadline = time.monotonic() + 600
    while not (stalled := [log for log in world.glob("runs/fan/*/*/log.txt") if "stall at step" in log.read_text()]):
        assert time.monotonic() < deadline and fan.poll() is None
        time.sleep(0.2)
    trial = str(stalled[0].parent.relative_to(world / "runs"))
    job = next(job["submission_id"] for job in jobs(head) if job["metadata"]["run"] == trial)
    killed = 0
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", "")
            if job in mine and "--only=trial" in process.cmdline():
                process.kill()
                killed += 1
        except psutil.Error:
            continue
    assert killed
    return trial


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rerun_repeats_only_failed_and_killed_trials(head: Head, world: Path) -> None:
    places = [f"data.root={world}/data", f"ray.storage={world}/runs", "from=models:/p@champion"]
    command = [
        "fanout", "--targets=all", "--strategies=scratch,relearn", "--seeds=0-2", "--parallel=2",
        f"--json={world}/fan.json", "name=fan", *RUN, *places,
    ]  # fmt: skip
    fan = start(head, *command)
    killed = kill_the_stalled(head, world, fan)
    told, said = fan.communicate(timeout=900)
    assert fan.returncode == 1, told + said
    first = jobs(head)
    everything = {f"fan/{target}/{s}-seed{seed}" for target in TARGETS for s in STRATEGIES for seed in SEEDS}
    assert set(trials(first)) == everything and len(trials(first)) == 12
    failed = {job["metadata"]["run"] for job in first if job["status"] == "FAILED"}
    assert len(failed) == 2 and killed in failed
    assert most_at_once(first) == 2
    outcomes = {str(f.parent.relative_to(world / "runs")): f for f in world.glob("runs/fan/*/*/outcome.json")}
    assert outcomes.keys() == everything - failed
    broken = {run.split("/")[1] for run in failed}
    left = len(failed) + len(broken)
    assert told.endswith(f"run the same command again: {left} jobs are left\n")
    assert (
        told.count("failed: ") == 2
        and "a fault that ANTDIST_FAULTS asked for" in told
        and "antdist logs fan" not in told
    )
    assert "left out, as models:/p/1 learned from them: aa, bbb" in said
    registered = {target for target in TARGETS if (world / f"runs/fan/{target}/verdict.json").is_file()}
    assert registered == set(TARGETS) - broken  # the others are concluded, and those alone

    times = {run: outcome.stat().st_mtime_ns for run, outcome in outcomes.items()}
    again = start(head, *command)
    told, said = again.communicate(timeout=600)
    assert again.returncode == 0, told + said
    second = jobs(head)[len(first) :]
    assert sorted(trials(second)) == sorted(failed)
    assert sorted(job["metadata"]["run"] for job in second if job["metadata"]["verb"] == "relearn") == sorted(
        failed | {f"fan/{target}" for target in broken}
    )
    assert most_at_once(second) == 2 and {job["status"] for job in second} == {"SUCCEEDED"}
    assert {run: outcome.stat().st_mtime_ns for run, outcome in outcomes.items()} == times
    assert "jobs are left" not in told

    figures = json.loads((world / "fan.json").read_text())
    uri = f"sqlite:///{world}/runs/mlflow.db"
    for target in TARGETS:
        plain = start(
            head, "submit", "relearn", "--wait", "name=plain", f"target={target}", "strategy=[scratch, relearn]",
            "seeds=[0, 1, 2]", *RUN, *places,
        )  # fmt: skip
        printed, errors = plain.communicate(timeout=600)
        assert plain.returncode == 0, printed + errors
        alike = json.loads((world / f"runs/plain/{target}/verdict.json").read_text())
        mine = figures["targets"][target]
        for key in ("test", "validation verdicts", "chosen"):
            assert mine[key] == alike[key], (target, key)
        for trial in [f"{s}-seed{seed}" for s in STRATEGIES for seed in SEEDS]:
            for split in ("validation.npz", "test.npz"):
                one, other = (load_ranks(world / f"runs/{name}/{target}/{trial}/{split}") for name in ("fan", "plain"))
                assert one.key == other.key
                np.testing.assert_array_equal(one.ranks[0].ranks, other.ranks[0].ranks)
        assert resolve(f"models:/fan-{target}/latest", uri).tags["strategy"] == mine["chosen"]
        row = next(line for line in told.splitlines() if re.match(rf"{target} +{mine['chosen']} ", line))
        assert row.endswith(f"models:/fan-{target}/1") == (mine["holder"] is not None), told


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_finished_fanout_runs_nothing_by_launch_script_too(head: Head, world: Path) -> None:
    """After the test above: the verdicts are there. The verb runs in a job itself, which submits to its own cluster."""
    assert (world / "fan.json").is_file()
    before = len(jobs(head))
    done = head.submit(
        "python", "launch/fanout.py", "--targets=food,target", "--strategies=scratch,relearn", "--seeds=0-2",
        "name=fan", *RUN, f"data.root={world}/data", f"ray.storage={world}/runs", "from=models:/p@champion",
    )  # fmt: skip
    assert done.succeeded, done.logs
    assert "food    relearn" in done.logs and "champion" in done.logs
    verbs = [job["metadata"]["verb"] for job in jobs(head)[before:]]
    assert "relearn" not in verbs, verbs


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_stops_the_trials_with_their_state_saved(head: Head, world: Path) -> None:
    for happened in ("raised", "stalled"):
        (world / happened).touch()
    fan = start(
        head, "fanout", "--targets=food", "--strategies=scratch", "--seeds=0-5", "--parallel=2", "name=long", *RUN,
        f"data.root={world}/data", f"ray.storage={world}/runs", "training.epochs=100000", "training.checkpoint_every=100000",
    )  # fmt: skip
    trials_at_work = [world / f"runs/long/food/scratch-seed{seed}" for seed in (0, 1)]
    deadline = time.monotonic() + 400
    while not all((trial / "live.json").is_file() for trial in trials_at_work):
        assert time.monotonic() < deadline and fan.poll() is None
        time.sleep(0.2)
    fan.send_signal(signal.SIGINT)
    _, said = fan.communicate(timeout=120)
    assert fan.returncode == 130 and "stopped: run the same command again to continue" in said, said
    mine = [job for job in jobs(head) if job["metadata"]["run"].startswith("long/food/scratch")]
    assert [job["status"] for job in mine] == ["STOPPED", "STOPPED"]
    for trial in trials_at_work:
        assert list(trial.glob("checkpoints/step-*/COMPLETE.json"))
