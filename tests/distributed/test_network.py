"""Machines with networks of their own: a run that is submitted from one that sees neither data nor storage, trained on others
that are killed, cut off and switched on again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from antdist.tracking.store import connect
from tests.distributed.test_elastic import assert_same_weights, restarts
from tests.heads import PROJECT, RAY, ray_environment
from tests.machines import Machine, Network, network
from tests.worlds import make_domains

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

HEAD, LAPTOP, WORKERS = 10, 20, {"one": 11, "two": 12, "three": 13}
MEMORY = f"--object-store-memory={80 * 1024**2}"
STEP_SECONDS = 0.3
LOOK_SECONDS = 25  # Ray counts the nodes that a run may have once in 20; a run that starts before grows later
RUN = [
    "data.domains=[aa,bbb]", "ray.workers=3", "ray.min_workers=1", "ray.max_failures=5", "model.dim=16", "model.inner=16",
    "model.experts=2", "model.max_length=8", "model.mixture=false", "model.dropout=0", "stream.batch_size=40",
    "training.epochs=24", "training.validate_every=24", "training.log_every=5", "training.engine=plain",
    "training.checkpoint_every=20", "training.hang.step_minutes=1",
]  # fmt: skip


@dataclass
class Site:
    """A head, three machines for workers, a laptop; what they share; what Ray's processes need to know."""

    network: Network
    head: Machine
    laptop: Machine
    workers: dict[str, Machine]
    shared: Path
    environment: dict[str, str]

    def join(self, name: str) -> None:
        """Switch a machine on, and let it join the cluster as `ray start` does it by itself."""
        machine = self.workers[name] = self.network.switch_on(name, WORKERS[name])
        command = [RAY, "start", "--block", f"--address={self.head.address}:6379", "--num-cpus=1", MEMORY]
        machine.popen(command, self.network.folder / f"{name}.log", self.environment)

    def antdist(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """On the laptop."""
        return self.laptop.run(
            sys.executable, "-m", "antdist", *arguments, "--address", f"http://{self.head.address}:8265",
            environment=self.environment, timeout=timeout,
        )  # fmt: skip

    def leads(self, run: str) -> str:
        """The machine on which the leading worker is: the one that has the run's log open."""
        look = f"ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q {run}/log.txt"
        (found,) = [name for name, machine in self.workers.items() if machine.run("sh", "-c", look).returncode == 0]
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    make_domains(folder / "shared" / "data", ["aa", "bbb"])
    return folder


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """One worker on this machine alone, from the start to the end."""
    environment = ray_environment(folder)
    run = [*RUN, "ray.workers=1", "ray.min_workers=1", f"data.root={folder}/shared/data", f"ray.storage={folder}/alone"]
    command = [sys.executable, "-m", "antdist", "pretrain", "name=run", *run]
    subprocess.run(command, env=environment, cwd=PROJECT, check=True, capture_output=True, timeout=300)
    return folder / "alone" / "run"


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    faults = [{"fault": "stall", "at": "step", "seconds": STEP_SECONDS}]
    environment = {**ray_environment(folder), "ANTDIST_FAULTS": json.dumps(faults)}
    with network(folder) as made:
        head, laptop = made.switch_on("head", HEAD), made.switch_on("laptop", LAPTOP)
        laptop.hide(folder / "shared")
        dashboard = f"--dashboard-host={head.address}"
        command = [RAY, "start", "--head", "--block", "--num-cpus=0", "--port=6379", dashboard, MEMORY]
        head.popen(command, folder / "head.log", environment)
        until(
            lambda: (
                head.run(RAY, "health-check", "--address", f"{head.address}:6379", environment=environment).returncode
                == 0
            ),
            100,
        )
        site = Site(made, head, laptop, {}, folder / "shared", environment)
        for name in WORKERS:
            site.join(name)
        yield site


def until(come: Callable[[], bool], seconds: float) -> float:
    """Wait for it; the seconds it took."""
    start = time.monotonic()
    while not come():
        assert time.monotonic() < start + seconds
        time.sleep(0.2)
    return time.monotonic() - start


def step_of(run: Path) -> int:
    try:
        return int(json.loads((run / "live.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


def curve(run: Path) -> list[tuple[int, float]]:
    client = connect(f"sqlite:///{run.parent}/mlflow.db")
    points = client.get_metric_history(json.loads((run / "run.json").read_text())["run_id"], "train/loss")
    return [(point.step, point.value) for point in points]


def test_a_network_run_survives_killed_and_cut_off_machines(
    site: Site, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints what docs/operations/machines.md quotes."""
    run = site.shared / "runs" / "run"
    places = [f"data.root={site.shared}/data", f"ray.storage={site.shared}/runs"]
    assert site.laptop.run("ls", str(site.shared)).stdout == ""
    sent = site.antdist("submit", "pretrain", "name=run", *RUN, *places)
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.split()[1]
    seen: dict[str, float] = {}

    def goes_on_with(workers: int) -> Callable[[], bool]:
        return lambda: bool(restarts(run)) and restarts(run)[-1][1] == workers

    # 127.0.1.1 is what each machine's own name stands for
    until(lambda: step_of(run) > 25, 200)
    talks = [machine.run("ss", "-tnp", "state", "established").stdout for machine in site.workers.values()]
    for mine, said in zip(WORKERS.values(), talks, strict=True):
        spoken_to = [re.findall(r"10\.77\.0\.(\d+):", line) for line in said.splitlines() if "RayTrainWo" in line]
        peers = {int(ends[1]) for ends in spoken_to if len(ends) == 2}
        assert set(WORKERS.values()) - {mine} <= peers, said

    # all its processes die
    lost = next(name for name in WORKERS if name != site.leads("run"))
    before = step_of(run)
    site.workers.pop(lost).crash()
    seen["killed"] = until(goes_on_with(2), 300)
    seen["killed, steps repeated"] = before - restarts(run)[-1][0]

    # the leader's cable, while it still reaches the storage
    until(lambda: step_of(run) > restarts(run)[-1][0] + 25, 100)
    cut = site.leads("run")
    before = step_of(run)
    site.workers[cut].link("down")
    seen["cut off"] = until(goes_on_with(1), 500)
    seen["cut off, steps repeated"] = before - restarts(run)[-1][0]

    start = time.monotonic()
    stopped = site.antdist("stop", job)
    seen["stopped"] = time.monotonic() - start
    with capsys.disabled():
        print("\n" + ", ".join(f"{what}: {value:.0f}" for what, value in seen.items()))
    assert re.search(r"last line of its log: run: stopped after step \d+; run the same command", stopped.stdout), (
        stopped.stdout + stopped.stderr
    )
    assert seen["stopped"] < 120  # Ray would wait ten minutes for a child that nobody lays to rest

    # back, as a new machine, and as it was
    site.join(lost)
    site.workers[cut].link("up")
    site.workers[cut].crash()
    site.join(cut)
    until(lambda: site.head.run(RAY, "status", environment=site.environment).stdout.count("1 node_") == 4, 200)
    time.sleep(LOOK_SECONDS)
    resumed = site.antdist("resume", job, "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "registered models:/run/1" in resumed.stdout
    assert [workers for _, workers in restarts(run)] == [2, 1, 3]

    ours, theirs = curve(run), curve(straight)
    assert [step for step, _ in ours] == [step for step, _ in theirs] and len(theirs) > 50
    for (step, loss), (_, other) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, rel=1e-5), step
    assert_same_weights(run, straight)
