"""A job on a Ray of its own, as `antdist submit` without an address starts it; a job of trials, stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.heads import Head, ray_head
from tests.worlds import make_domains

pytestmark = [pytest.mark.slow, pytest.mark.ray]

PROJECT = Path(__file__).resolve().parents[2]
SMALL = [
    "ray.workers=1",
    "ray.max_failures=0",
    "model.dim=16",
    "model.inner=16",
    "model.experts=2",
    "model.max_length=8",
]
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
SLOW_STEPS = json.dumps([{"fault": "stall", "at": "step", "seconds": 0.3}])


def until(come: Callable[[], bool], told: Callable[[], str], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if come():
                return
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


def step_of(run: Path) -> int:
    return int(json.loads((run / "live.json").read_text())["step"])


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    left = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:  # of one whose parent is gone, too
                left.append(process)
    return left


def listening(processes: list[psutil.Process]) -> dict[str, set[int]]:
    """At which addresses they listen: for each, the ports."""
    found: dict[str, set[int]] = {}
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    found.setdefault(socket.laddr.ip, set()).add(socket.laddr.port)
    return found


def test_ctrl_c_saves_the_job_and_the_command_resumes(tmp_path: Path) -> None:
    """With the code that is installed; all of it on loopback, and nothing of it left."""
    make_domains(tmp_path / "data", ["aa", "bbb"])
    command = [
        sys.executable, "-m", "antdist", "submit", "--installed", "pretrain", "name=shop", "data.root=data",
        "data.domains=[aa,bbb]", "ray.storage=runs", *SMALL, "stream.batch_size=40", "training.epochs=4",
        "training.log_every=1", "training.checkpoint_every=1000",
    ]  # fmt: skip
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")},
        "PYTHONPATH": str(PROJECT),
        "RAY_worker_niceness": "0",
    }
    said, run = tmp_path / "said", tmp_path / "runs" / "shop"
    with said.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**environment, "ANTDIST_FAULTS": SLOW_STEPS},
            stdout=file,
            stderr=file,
            # a shell's background jobs ignore Ctrl-C, and so would this one
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    until(lambda: process.poll() is not None or step_of(run) >= 2, said.read_text)
    started = psutil.Process(process.pid).children(recursive=True)
    ports = listening([psutil.Process(process.pid), *started])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=200) == 130, said.read_text()
    text = said.read_text()
    found = re.search(
        r"stopping (pretrain-shop-\w+)\n(?:.*\n)*shop: stopped after step (\d+); run the same command", text
    )
    assert found, text
    assert text.rstrip().endswith("stopped") and "Traceback" not in text and "run the same command to continue" in text
    step = int(found[2])
    assert (run / f"checkpoints/step-{step:08d}/COMPLETE.json").is_file()
    until(lambda: not alive(started), lambda: str(alive(started)), 30)
    assert len(ports) > 0 and ports.keys() <= LOOPBACK, ports

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resumes at step {step}" in done.stdout and "registered models:/shop/1" in done.stdout


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTDIST_FAULTS", SLOW_STEPS)
        with ray_head() as started:
            yield started


def antdist(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "antdist", *arguments, "--address", head.jobs],
        env=dict(head.environment), cwd=PROJECT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def relearn(name: str, world: Path) -> list[str]:
    return [
        "submit", "relearn", f"name={name}", "target=target", "strategy=scratch", "seeds=[0,1]", f"data.root={world}/data",
        f"ray.storage={world}/runs", *SMALL, "stream.batch_size=20", "training.epochs=2", "training.log_every=1",
    ]  # fmt: skip


def test_stopped_trials_resume_to_the_same_figures(head: Head, tmp_path: Path) -> None:
    make_domains(tmp_path / "data", ["target"])
    sent = antdist(head, *relearn("cut", tmp_path))
    job = sent.stdout.splitlines()[0].removeprefix("job ")
    run = tmp_path / "runs/cut/target"
    until(
        lambda: "seed 1" in (run / "live.json").read_text() and step_of(run) >= 2,
        lambda: antdist(head, "logs", job).stdout,
    )
    stopped = antdist(head, "stop", job)
    assert stopped.returncode == 0 and f"{job}: stopped" in stopped.stdout, stopped.stderr
    resumed = antdist(head, "resume", job, "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumes at step" in resumed.stdout
    whole = antdist(head, *relearn("whole", tmp_path), "--wait")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    for seed in (0, 1):
        folders = [tmp_path / f"runs/{name}/target/scratch-seed{seed}" for name in ("cut", "whole")]
        weights = [sorted((folder / "best").iterdir())[-1] for folder in folders]
        assert weights[0].read_bytes() == weights[1].read_bytes() and weights[0].name == weights[1].name
