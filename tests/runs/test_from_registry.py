"""A job resumes a run that only the registry still has: MLflow over HTTP, on PostgreSQL and a bucket."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from antdist.tracking.store import connect
from tests.heads import PROJECT, Head, ray_head
from tests.stores import TrackingServer, postgres_programs, postgres_server, s3_server
from tests.worlds import make_domains

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RUN = [
    "data.domains=[aa,bbb]", "ray.workers=1", "ray.max_failures=0", "model.dim=16", "model.inner=16", "model.experts=2",
    "model.max_length=8", "stream.batch_size=40", "training.epochs=6", "training.log_every=1",
    "training.validate_every=1", "training.checkpoint_every=3",
]  # fmt: skip
HALF = 13  # steps; in the middle of an epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "bbb"])
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[TrackingServer]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL absent: no initdb on PATH or in /usr/lib/postgresql/*/bin")
    with (
        s3_server() as bucket,
        postgres_server(programs) as database,
        TrackingServer(world / "mlflow", database(), bucket()) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def head(served: TrackingServer, world: Path) -> Iterator[Head]:
    """A cluster whose environment names the tracking server, without keys of the bucket."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(world / "cache"))
        patch.setenv("ANTDIST_FAULTS", json.dumps([{"fault": "stall", "at": "step", "seconds": 0.2}]))
        with ray_head() as started:
            yield started


def antdist(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "antdist", *arguments, "--address", head.jobs],
        env=dict(head.environment), cwd=PROJECT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def submit(head: Head, *arguments: str) -> str:
    """Submit a job, follow it to its end, and return its log."""
    done = antdist(head, "submit", "pretrain", *RUN, *arguments, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def places(world: Path, runs: str, served: TrackingServer) -> list[str]:
    return [f"data.root={world}/data", f"ray.storage={world}/{runs}", f"tracking.uri={served.uri}"]


def final(folder: Path) -> dict[str, dict[str, Any]]:
    """Weights, optimizer and stream of the last checkpoint, and the model."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    told = json.loads((last / "progress.json").read_text())
    told = {key: value for key, value in told.items() if key != "best"} | {"name": last.name}
    arrays = {
        name: load_file(path)
        for name, path in (
            ("weights", last / "weights.safetensors"),
            ("moments", last / "moments.safetensors"),
            ("model", folder / "model" / "weights.safetensors"),
        )
    }
    return {**arrays, "progress": told}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("weights", "moments", "model"):
        assert one[name].keys() == other[name].keys() and one[name]
        for key in one[name]:
            np.testing.assert_array_equal(one[name][key], other[name][key], err_msg=f"{name} {key}")
    assert one["progress"] == other["progress"]


def curve(uri: str, run_id: str) -> list[tuple[int, float]]:
    points = connect(uri).get_metric_history(run_id, "train/loss")
    return [(point.step, point.value) for point in points]


def test_job_resumes_from_registry_on_an_empty_machine(head: Head, world: Path, served: TrackingServer) -> None:
    straight = world / "straight/straight"
    done = antdist(head, "submit", "pretrain", *RUN, "name=straight", *places(world, "straight", served))
    job = done.stdout.splitlines()[0].removeprefix("job ")
    until(lambda: json.loads((straight / "live.json").read_text())["step"] >= 3)
    alone = json.loads((straight / "run.json").read_text())["run_id"]
    row = antdist(head, "jobs").stdout.splitlines()[1]
    link = re.escape(f"{served.uri}/#/runs/{alone}")
    assert re.match(rf"{job} +runs +pretrain +straight +\d+/\d+ +[\d,]+ +\d+\.\d+ +[\d.]+ min +{link}$", row), row
    served.kill()
    step = json.loads((straight / "live.json").read_text())["step"]
    until(
        lambda: json.loads((straight / "live.json").read_text())["step"] >= step + 5
    )  # training does not wait for the store
    served.start()
    followed = antdist(head, "logs", job, "-f")
    assert followed.returncode == 0 and "registered models:/straight/1" in followed.stdout, followed.stdout

    begun = places(world, "begun", served)
    assert "registered models:/shop/1" in submit(head, "name=shop", f"training.stop_after={HALF}", *begun)
    first = json.loads((world / "begun/shop/run.json").read_text())["run_id"]
    assert len(curve(served.uri, first)) == HALF
    for left in ("begun", "cache"):
        shutil.rmtree(world / left, ignore_errors=True)

    resumed = submit(head, "name=shop", "resume=models:/shop/latest", *places(world, "elsewhere", served))
    assert f"resumes at step {HALF}" in resumed and "registered models:/shop/2" in resumed
    same(final(straight), final(world / "elsewhere/shop"))
    # the same MLflow run, each point once, as if never interrupted
    known = json.loads((world / "elsewhere/shop/run.json").read_text())["run_id"]
    assert known == first and curve(served.uri, known) == curve(served.uri, alone)
    steps = [step for step, _ in curve(served.uri, known)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > HALF
    check_secrets(head, world, served)


def check_secrets(head: Head, world: Path, served: TrackingServer) -> None:
    """Check that no log, configuration, tag or metadata has the cluster's token or the stores' keys."""
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    secrets = [token, served.database.environment["PGPASSWORD"], served.bucket.environment["AWS_SECRET_ACCESS_KEY"]]
    texts = {
        path: path.read_bytes()
        for folder in (head.folder / "session_latest" / "logs", world)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".safetensors", ".npy", ".tar")
    }
    assert len(texts) > 50 and any(path.name.startswith("job-driver-") for path in texts)
    request = urllib.request.Request(f"{head.jobs}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    texts[Path("jobs")] = urllib.request.urlopen(request, timeout=30).read()
    for run in connect(served.uri).search_runs(["1"]):
        texts[Path(run.info.run_id)] = repr(run.to_dictionary()).encode()
    found = [path for path, text in texts.items() for secret in secrets if secret.encode() in text]
    assert not found, found


def until(come: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError):
            if come():
                return
        assert time.monotonic() < deadline
        time.sleep(0.1)
