"""A private Ray head for a test, and jobs submitted to it as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.ranks import free_port

RAY = Path(sys.executable).with_name("ray")
PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """A submitted job that has ended: its logs, and whether it succeeded."""

    succeeded: bool
    logs: str


@dataclass(frozen=True)
class Head:
    """A running head. `environment` lets a process connect; it names the token's file, not the token."""

    address: str  # host:port, for ray.init
    jobs: str  # http://host:port, for ray job
    folder: Path
    environment: Mapping[str, str]

    def submit(self, *entrypoint: str, working_dir: Path = PROJECT, timeout: float = 300) -> Job:
        """Submit `entrypoint` with a copy of `working_dir` and wait for its end."""
        done = subprocess.run(
            [RAY, "job", "submit", "--address", self.jobs, "--working-dir", working_dir, "--", *entrypoint],
            env=dict(self.environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Job(done.returncode == 0, done.stdout)

    def status(self, job: str) -> str:
        """Return the status of a job by its id."""
        return str(self.get(f"/api/jobs/{job}")["status"])

    def get(self, path: str) -> Any:
        """Return the head's answer to an HTTP request."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.jobs}{path}", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)


@contextlib.contextmanager
def ray_head(cpus: int = 2, *, wait: float = 90) -> Iterator[Head]:
    """Start a head with free ports, its own folder and token; stop it, and no other, at the end."""
    # Ray's sockets are below its folder, and a socket's path has at most 107 characters
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    environment = ray_environment(folder)
    jobs = f"127.0.0.1:{free_port()}"
    command: list[str | Path] = [
        RAY, "start", "--head", "--block", f"--num-cpus={cpus}", f"--temp-dir={folder}", f"--port={free_port()}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs.rpartition(':')[2]}",
        f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        f"--object-store-memory={100 * 1024**2}",
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield Head(_await_head(process, folder, jobs, wait), f"http://{jobs}", folder, environment)
    finally:
        _stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def ray_environment(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "MLFLOW_TRACKING_URI"}
    return {
        **kept,
        "PATH": f"{RAY.parent}{os.pathsep}{kept.get('PATH', os.defpath)}",  # so that `python` is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let workers starve on a busy machine
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # otherwise it waits up to 30 s for Train's idle actors
    }


def _await_head(process: subprocess.Popen[bytes], folder: Path, jobs: str, wait: float) -> str:
    """Wait until the head accepts jobs. Returns its address."""
    address, log = folder / "ray_current_cluster", folder / "head.log"
    deadline = time.monotonic() + wait
    while not (address.is_file() and _answers(f"http://{jobs}/api/version")):
        assert process.poll() is None, f"the head ended:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"no head within {wait:.0f} s:\n{log.read_text()}"
        time.sleep(0.2)
    return address.read_text().strip()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:  # an answer, too: it requires the token
        return True
    except OSError:
        return False
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the head: `ray start --block` ends its processes, and SIGKILL what would outlive it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
