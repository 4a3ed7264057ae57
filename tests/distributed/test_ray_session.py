"""Around a command: an address where nobody listens is told at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from antdist.config.schema import HangConfig, RayConfig
from antdist.distributed.ray_compat import preemption_context
from antdist.distributed.ray_session import is_node_leaving, ray_session, run_workers
from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from tests.ranks import free_port
from tests.ray_internals import count_reserved_nodes, reserve
from tests.worlds import make_domains


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_without_a_listener_fails_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    import ray  # noqa: F401  # its import is not what is timed

    start = time.monotonic()
    with (
        pytest.raises(UserError, match=f"ray.address {address}: no Ray answers.*refused.*`ray start --head`"),
        ray_session(RayConfig()),
    ):
        pass
    assert time.monotonic() - start < 5


def test_the_address_of_the_jobs_page_is_not_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS is also where `ray job` looks for the page."""
    with socket.create_server(("127.0.0.1", 0)) as page:
        address = f"http://127.0.0.1:{page.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(UserError, match=rf"no Ray answers \(Invalid Ray address: '{address}'\)"),
            ray_session(RayConfig()),
        ):
            pass


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(RayConfig()):
            yield


@pytest.mark.ray
def test_a_user_error_in_a_worker_is_not_retried(local_ray: None, tmp_path: Path) -> None:
    def work(settings: dict[str, Any]) -> None:
        with Path(settings["attempts"]).open("a") as file:
            file.write("x")
        raise UserError("a torn shard", where="items-00000.tar", remedy="prepare again")

    config = RayConfig(storage=str(tmp_path), max_failures=-1)
    with pytest.raises(UserError, match=r"^items-00000.tar: a torn shard\. Prepare again\.$"):
        run_workers(work, {"attempts": str(tmp_path / "attempts")}, config, "torn", HangConfig())
    assert (tmp_path / "attempts").read_text() == "x"


@pytest.mark.ray
def test_a_fault_in_a_worker_keeps_its_traceback(local_ray: None, tmp_path: Path) -> None:
    def work(settings: dict[str, Any]) -> None:
        raise ZeroDivisionError("of ours")

    with pytest.raises(Exception, match=r"in work\n(?s:.)*ZeroDivisionError: of ours"):
        run_workers(work, {}, RayConfig(storage=str(tmp_path), max_failures=0), "fault", HangConfig())


@pytest.mark.ray
def test_a_worker_sees_that_its_node_is_leaving(local_ray: None, tmp_path: Path) -> None:
    """Ray's notice, as its watcher leaves it with each worker; a real one takes the node away."""

    def work(settings: dict[str, Any]) -> None:
        from ray.train import PreemptionInfo

        before = is_node_leaving()
        preemption_context().preemption_info = PreemptionInfo(None, {"node": [0]})
        Path(settings["told"]).write_text(f"{before} {is_node_leaving()}")
        preemption_context().preemption_info = None

    settings = {"told": str(tmp_path / "told")}
    run_workers(work, settings, RayConfig(storage=str(tmp_path), max_failures=0), "going", HangConfig())
    assert (tmp_path / "told").read_text() == "False True"


@pytest.mark.ray
def test_workers_that_cannot_fit_fail_at_once(local_ray: None, tmp_path: Path) -> None:
    config = RayConfig(storage=str(tmp_path), workers=1, cpus_per_worker=1000)
    with pytest.raises(UserError, match=r"the workers ask for 1000 CPUs \(\d+ there\) on this machine\. Lower them"):
        run_workers(print, {}, config, "big", HangConfig())


@pytest.mark.ray
def test_a_range_of_workers_takes_what_there_is(local_ray: None, tmp_path: Path) -> None:
    """Three workers of half the machine each do not fit, and two do; what it asks for at the least must."""

    def work(settings: dict[str, Any]) -> None:
        from antdist.distributed.world import barrier, current_world

        world = current_world()
        (Path(settings["folder"]) / f"rank-{world.rank}-of-{world.size}").touch()
        barrier(world)

    import ray

    half = int(ray.cluster_resources()["CPU"]) // 2
    config = RayConfig(storage=str(tmp_path), workers=3, min_workers=1, cpus_per_worker=half)
    run_workers(work, {"folder": str(tmp_path)}, config, "range", HangConfig())
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0-of-2", "rank-1-of-2"]
    with pytest.raises(UserError, match=r"the workers ask for \d+ CPUs"):
        run_workers(work, {}, config.model_copy(update={"min_workers": 3}), "much", HangConfig())


@pytest.mark.ray
@pytest.mark.slow
def test_unconnected_workers_restart_up_to_max_failures(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a node is lost while they start. They ask for all CPUs, so what an earlier try kept would be lacking."""

    def work(settings: dict[str, Any]) -> None:
        from antdist.distributed.world import barrier, current_world

        barrier(current_world())
        (tmp_path / f"met-{current_world().rank}").touch()

    import ray

    faults = [{"fault": "raise", "at": "join", "rank": 1, "once": str(tmp_path / "raised")}]
    faults += [{"fault": "kill", "at": "join", "rank": 1, "once": str(tmp_path / "killed")}]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    half = int(ray.cluster_resources()["CPU"]) // 2
    config = RayConfig(storage=str(tmp_path), workers=2, cpus_per_worker=half, max_failures=0)
    message = (
        r"ray.max_failures 0: the workers cannot connect to each other \(.+\)\. Check that all nodes reach each other"
    )
    with pytest.raises(UserError, match=message):
        run_workers(work, {}, config, "apart", HangConfig())
    for once in ("raised", "killed"):
        (tmp_path / once).unlink(missing_ok=True)
    run_workers(work, {}, config.model_copy(update={"max_failures": 2}), "apart", HangConfig())
    assert (tmp_path / "raised").exists() and (tmp_path / "killed").exists()
    assert (tmp_path / "met-0").exists() and (tmp_path / "met-1").exists()


@pytest.mark.ray
def test_workers_connect_on_the_interface_of_rays_address(local_ray: None, tmp_path: Path) -> None:
    """A local Ray's is that of loopback, whatever the machine's own name stands for: gloo is told, and torch's store, which
    listens at all addresses by itself, is kept to it."""

    def work(settings: dict[str, Any]) -> None:
        listening = [each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
        write_json(tmp_path / "told", [os.environ["GLOO_SOCKET_IFNAME"], sorted({*listening})])

    run_workers(work, {}, RayConfig(storage=str(tmp_path), max_failures=0), "interface", HangConfig())
    interface, addresses = json.loads((tmp_path / "told").read_text())
    assert interface == "lo" and "127.0.0.1" in addresses
    assert {*addresses} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_the_interface_of_an_address() -> None:
    from antdist.distributed.process_group import find_interface

    assert find_interface("127.0.0.1") == find_interface("::1") == "lo"
    assert find_interface("192.0.2.1") is None


@pytest.mark.ray
def test_strict_spread_does_not_fit_on_one_machine(local_ray: None, tmp_path: Path) -> None:
    config = RayConfig(storage=str(tmp_path), workers=2, placement="STRICT_SPREAD")
    with pytest.raises(UserError, match=r"the workers ask for a node each, 2 in all \(1 there\) on this machine"):
        run_workers(print, {}, config, "spread", HangConfig())


@pytest.mark.ray
def test_the_reservation_of_a_killed_command_is_cancelled(local_ray: None, tmp_path: Path) -> None:
    """Ray would keep it for minutes, and a range of workers wait for it. What is noted for the next start is what Ray knows."""
    import ray

    note, told = tmp_path / "ray" / "run.reservation.json", tmp_path / "told.json"

    def work(settings: dict[str, Any]) -> None:
        noted = read_json(note)
        assert noted is not None
        write_json(
            told, {"killed": count_reserved_nodes("train-killed"), "mine": count_reserved_nodes(noted["requester"])}
        )

    reserve("train-killed", {"CPU": ray.cluster_resources()["CPU"]})
    assert count_reserved_nodes("train-killed") == 1
    note.parent.mkdir()
    write_json(note, {"requester": "train-killed"})
    run_workers(work, {}, RayConfig(storage=str(tmp_path)), "run", HangConfig())
    assert read_json(told) == {"killed": 0, "mine": 1}
    assert not note.exists()


@pytest.mark.ray
@pytest.mark.parametrize("sign", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_in_order(sign: int, tmp_path: Path) -> None:
    """Ctrl-C ends it at once, exit code 130; a scheduler's SIGTERM once the state is saved, 75. No traceback, no worker left."""
    make_domains(tmp_path / "data", ["aa"])
    overrides = [
        "name=long", f"data.root={tmp_path}/data", "data.domains=[aa]", f"ray.storage={tmp_path}/runs", "model.dim=8",
        "training.epochs=5000", "model.max_length=8", "stream.batch_size=64", "training.validate_every=5000",
    ]  # fmt: skip
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    }
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "antdist", "pretrain", *overrides],
            stdout=said,
            stderr=said,
            env=environment,
            # a shell's background jobs ignore Ctrl-C, and so would this one
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs/long").glob("checkpoints/step-*/COMPLETE.json")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.2)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(sign)
    assert process.wait(timeout=30) == {signal.SIGINT: 130, signal.SIGTERM: 75}[sign]
    told = (tmp_path / "said").read_text()
    last = {signal.SIGINT: "stopped", signal.SIGTERM: "run the same command to continue"}[sign]
    assert told.rstrip().endswith(last) and "Traceback" not in told
    left = psutil.wait_procs(started, timeout=20)[1]
    assert not left, left


INTERRUPTED = """
import time
from antdist.config.schema import RayConfig
from antdist.jobs.client import Cluster
from antdist.distributed.ray_session import local_head
with local_head(RayConfig()) as (jobs, _):
    print("started", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(2)
        print(*Cluster(jobs).table(), flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_leaves_the_local_job_server_up(tmp_path: Path) -> None:
    """It goes to all processes of the terminal's group; jobs are to be stopped through the server afterwards."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert command.stdout is not None and command.stdout.readline() == "started\n"
    os.killpg(command.pid, signal.SIGINT)
    assert command.communicate(timeout=120)[0].startswith("no job waits or runs") and command.returncode == 0
