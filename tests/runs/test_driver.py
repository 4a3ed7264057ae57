"""The cluster outlives what starts a run: a killed driver, the client of a submitted job."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from antdist.tracking.store import connect
from tests.heads import PROJECT, RAY, Head, ray_head
from tests.worlds import make_domains

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 20


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


@pytest.fixture(scope="module")
def world(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of domains and runs, with the undisturbed run `straight`."""
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "bbb"])
    straight = start(head, folder, "straight")
    assert straight.wait(timeout=300) == 0, (folder / "straight.said").read_text()
    return folder


def overrides(folder: Path, name: str, *more: str) -> list[str]:
    return [
        f"name={name}", f"data.root={folder}/data", "data.domains=[aa,bbb]", f"ray.storage={folder}/runs", "ray.workers=2",
        "ray.max_failures=0", "model.dim=16", "model.inner=16", "model.experts=2", "model.max_length=8",
        "stream.batch_size=200", f"training.epochs={EPOCHS}", "training.validate_every=10", "training.log_every=1", *more,
    ]  # fmt: skip


def start(head: Head, folder: Path, name: str, *more: str) -> subprocess.Popen[bytes]:
    """Start `antdist pretrain`, attached to the head, with its output in NAME.said."""
    with (folder / f"{name}.said").open("a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "antdist", "pretrain", *overrides(folder, name, *more), f"ray.address={head.address}"],
            env=dict(head.environment), cwd=PROJECT, stdout=said, stderr=said,
        )  # fmt: skip


def until(come: Callable[[], bool], told: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < deadline, told.read_text()
        time.sleep(0.02)


def last_step(run: Path) -> int:
    return max((int(marker.parent.name[5:]) for marker in run.glob("checkpoints/step-*/COMPLETE.json")), default=0)


def assert_same_end(folder: Path, name: str) -> None:
    """Check model, last checkpoint and curves against the undisturbed run, bit for bit."""
    mine, theirs = folder / "runs" / name, folder / "runs" / "straight"
    step = last_step(theirs)
    for file in (
        "model/weights.safetensors",
        *(
            f"checkpoints/step-{step:08d}/{kept}"
            for kept in ("weights.safetensors", "moments.safetensors", "progress.json")
        ),
    ):
        assert (mine / file).read_bytes() == (theirs / file).read_bytes(), file
    client = connect(f"sqlite:///{folder}/runs/mlflow.db")
    runs = {
        each: client.search_runs(
            [experiment.experiment_id for experiment in client.search_experiments()], f"run_name = '{each}'"
        )
        for each in (name, "straight")
    }
    assert [len(found) for found in runs.values()] == [1, 1]
    assert runs[name][0].info.status == "FINISHED"
    for metric in ("train/loss", "validation/Recall_at_10"):
        curve, other = (
            [(point.step, point.value) for point in client.get_metric_history(found[0].info.run_id, metric)]
            for found in runs.values()
        )
        assert len(other) >= EPOCHS // 10 and curve == other, metric


@pytest.mark.parametrize("more", [(), ("ray.min_workers=1",)], ids=["fixed", "range"])
def test_killed_driver_resumes_to_the_same_run(head: Head, world: Path, more: tuple[str, ...]) -> None:
    """The command starts again while the old workers still run and hold all of the cluster."""
    name = "range" if more else "fixed"
    run, said = world / "runs" / name, world / f"{name}.said"
    driver = start(head, world, name, *more)
    until(lambda: driver.poll() is not None or last_step(run) > 10, said)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    again = start(head, world, name, *more)
    assert again.wait(timeout=300) == 0, said.read_text()
    (step,) = re.findall(r"resumes at step (\d+), epoch \d+, 2 workers", (run / "log.txt").read_text())
    assert 10 < int(step) < last_step(world / "runs" / "straight")
    assert_same_end(world, name)


def test_submitted_job_outlives_its_client(head: Head, world: Path) -> None:
    said, run = world / "submitted.said", world / "runs" / "submitted"
    submit = [
        RAY,
        "job",
        "submit",
        "--address",
        head.jobs,
        "--submission-id",
        "submitted",
        "--working-dir",
        PROJECT,
        "--",
    ]
    with said.open("w") as told:
        client = subprocess.Popen(
            [*submit, "python", "launch/pretrain.py", *overrides(world, "submitted")],
            env=dict(head.environment), stdout=told, stderr=told,
        )  # fmt: skip
    until(lambda: client.poll() is not None or last_step(run) > 10, said)
    client.kill()
    assert client.wait() == -signal.SIGKILL, said.read_text()
    assert head.status("submitted") == "RUNNING"
    until(lambda: head.status("submitted") not in ("PENDING", "RUNNING"), said)
    assert head.status("submitted") == "SUCCEEDED"
    assert_same_end(world, "submitted")
