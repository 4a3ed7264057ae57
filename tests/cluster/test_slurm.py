"""The batch script: checked by shellcheck, and run with fake programs that record their calls."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig
from antdist.errors import Preempted
from tests.cluster.linters import CLUSTER, PROJECT, lint

SCRIPT = CLUSTER / "slurm" / "antdist.sbatch"
JOB = "4242"

# srun runs its command here; a Ray runs until it is signalled
PROGRAMS = {
    "slurm/srun": """echo "srun $*" >>"$CALLS"; while [[ "$1" == --* ]]; do shift; done; exec "$@" """,
    "slurm/scontrol": """
        if [[ "$1" == show ]]; then printf '%s\\n' node1 node2 node3; else echo "scontrol $*" >>"$CALLS"; fi""",
    "venv/bin/ray": """
        [[ "$1" == health-check ]] && exit 0
        trap 'echo "ray ended" >>"$CALLS"; exit 0' TERM
        echo "ray $* $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH") $(cat "$RAY_AUTH_TOKEN_PATH")" >>"$CALLS"
        for _ in $(seq 600); do sleep 0.05; done""",
}
AWAIT_RAY = """
        steps=$((SLURM_JOB_NUM_NODES > 1 ? 2 : 1))
        until [[ "$(grep -c '^ray start' "$CALLS")" == "$steps" ]]; do sleep 0.02; done"""
ENDS_BY_ITSELF = f"""{AWAIT_RAY}
        echo "python $* $RAY_ADDRESS $RAY_AUTH_MODE" >>"$CALLS"; exit {{status}}"""
ENDS_WHEN_SIGNALLED = f"""{AWAIT_RAY}
        trap 'sleep 0.2; echo "python signalled" >>"$CALLS"; exit {{status}}' TERM
        echo "python started" >>"$CALLS"
        for _ in $(seq 600); do sleep 0.05; done"""


@dataclass(frozen=True)
class Allocation:
    """The environment that Slurm sets for the script, and a file of recorded calls."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, *arguments: str) -> int:
        with self.start(*arguments) as process:
            process.communicate(timeout=30)
        return process.returncode

    @property
    def calls(self) -> list[str]:
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def await_call(self, start: str) -> None:
        deadline = time.monotonic() + 30
        while not any(call.startswith(start) for call in self.calls):
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.02)


def allocation(folder: Path, driver: str, nodes: int = 3) -> Allocation:
    for name, body in (PROGRAMS | {"venv/bin/python": driver}).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{body}\n")
        file.chmod(0o755)
    environment = {
        "PATH": f"{folder / 'slurm'}:{os.environ['PATH']}",
        "HOME": str(folder),
        "CALLS": str(folder / "calls"),
        "ANTDIST_VENV": str(folder / "venv"),
        "ANTDIST_HEAD_IP": "10.0.0.1",
        "SLURM_SUBMIT_DIR": str(PROJECT),
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_CPUS_PER_TASK": "8",
    }
    return Allocation(folder, environment)


def test_script_passes_bash_and_shellcheck() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    assert lint("shellcheck", SCRIPT) == ""


def test_a_broken_script_is_refused(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    (tmp_path / "script").write_text(text.replace("\ndone\n", "\n", 1))
    assert subprocess.run(["bash", "-n", tmp_path / "script"], stderr=subprocess.DEVNULL).returncode != 0
    (tmp_path / "script").write_text(text.replace('rm -rf "$state"', "rm -rf $state"))
    assert "SC2086" in lint("shellcheck", tmp_path / "script")


def test_ray_starts_on_all_nodes_with_a_token(tmp_path: Path) -> None:
    slurm = allocation(tmp_path, ENDS_BY_ITSELF.format(status=0))
    assert slurm.run("launch/pretrain.py", "--config", "configs/scale.yaml", "data.domains=[a, b]") == 0
    calls = slurm.calls
    head, workers = (next(call for call in calls if call.startswith("srun") and kind in call) for kind in ("--nodelist=node1", "--exclude=node1"))  # fmt: skip
    assert "--nodes=1 --ntasks=1 " in head and "--nodes=2 --ntasks=2 " in workers
    assert "ray start --head --block" in head and "--dashboard-host=127.0.0.1" in head
    assert "--node-ip-address=10.0.0.1 --port=24242" in head and "--address=10.0.0.1:24242" in workers
    started = [call.split() for call in calls if call.startswith("ray start")]
    assert len(started) == 2
    for *_, mode, access, token in started:
        assert (mode, access) == ("token", "600") and re.fullmatch("[0-9a-f]{64}", token)
        assert not any(token in call for call in calls if call.startswith("srun")), "visible in `ps`"
    assert "python launch/pretrain.py --config configs/scale.yaml data.domains=[a, b] 10.0.0.1:24242 token" in calls
    assert calls.count("ray ended") == 2
    assert not (tmp_path / ".antdist" / JOB).exists()


def test_one_node_runs_only_a_head(tmp_path: Path) -> None:
    slurm = allocation(tmp_path, ENDS_BY_ITSELF.format(status=0), nodes=1)
    assert slurm.run("launch/pretrain.py") == 0
    assert len([call for call in slurm.calls if call.startswith("srun")]) == 1


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path: Path, status: int) -> None:
    slurm = allocation(tmp_path, ENDS_BY_ITSELF.format(status=status))
    assert slurm.run("launch/pretrain.py") == status
    assert not any("requeue" in call for call in slurm.calls)


def test_a_signalled_job_saves_its_state_and_is_requeued(tmp_path: Path) -> None:
    slurm = allocation(tmp_path, ENDS_WHEN_SIGNALLED.format(status=Preempted.EXIT_CODE))
    with slurm.start("launch/pretrain.py") as process:
        slurm.await_call("python started")
        process.send_signal(signal.SIGTERM)  # to the shell alone, as --signal=B: does
        process.communicate(timeout=30)
    assert process.returncode == Preempted.EXIT_CODE
    # the state is saved while Ray runs, and Ray ends before Slurm takes the nodes
    order = [call for call in slurm.calls if call in ("python signalled", "ray ended") or call.startswith("scontrol")]
    assert order == ["python signalled", "ray ended", "ray ended", f"scontrol requeue {JOB}"]


def test_a_job_that_fails_when_signalled_is_not_requeued(tmp_path: Path) -> None:
    slurm = allocation(tmp_path, ENDS_WHEN_SIGNALLED.format(status=1))
    with slurm.start("launch/pretrain.py") as process:
        slurm.await_call("python started")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 1
    assert not any("requeue" in call for call in slurm.calls)


def test_without_arguments_it_prints_its_usage(tmp_path: Path) -> None:
    slurm = allocation(tmp_path, "")
    assert slurm.run() == 2 and slurm.calls == []


def test_the_allocation_matches_the_elastic_range() -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", SCRIPT.read_text(), re.M))
    config = load_config(PretrainConfig, PROJECT / "configs" / "scale.yaml").ray
    gpus = int(options["gpus-per-node"])
    fewest, most = (int(nodes) * gpus for nodes in options["nodes"].split("-"))
    assert (fewest, most) == (config.fewest, config.workers)
    assert gpus * config.gpus_per_worker == gpus
    assert int(options["cpus-per-task"]) == gpus * config.cpus_per_worker
    assert re.fullmatch(r"B:TERM@\d{3,}", options["signal"])
    flags = re.findall(r"^#SBATCH --([\w-]+)(?: |$)", SCRIPT.read_text(), re.M)
    assert {"requeue", "no-kill", "exclusive"} <= set(flags)
