"""A cluster whose nodes come and go: the run shrinks, goes on, grows, and trains on the same batches (laws 1 and 2)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig
from antdist.distributed import ray_session as session
from antdist.runs.pretrain import PretrainedModel, pretrain
from antdist.tracking.store import connect
from tests.heads import RAY
from tests.ranks import free_port
from tests.worlds import make_domains

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 14


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head with one CPU; tests add nodes."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        # nodes that are gone are noticed late: not so long a wait for workers on them
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        patch.setattr(session, "GROW_SECONDS", 3.0)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    make_domains(folder / "data", ["aa", "bbb"])
    return folder


@pytest.fixture(scope="module")
def straight(cluster: Any, folder: Path) -> PretrainedModel:
    """One worker from the start to the end."""
    return pretrain(config(folder, "straight", workers=1))


def config(folder: Path, name: str, **ray: Any) -> PretrainConfig:
    tree = {
        "name": name,
        "data": {"root": str(folder / "data"), "domains": ["aa", "bbb"]},
        "model": {"dim": 16, "inner": 16, "experts": 2, "max_length": 8, "mixture": False, "dropout": 0.0},
        "stream": {"batch_size": 100},
        "training": {
            "epochs": EPOCHS,
            "log_every": 2,
            "validate_every": EPOCHS,
            "engine": "plain",
            "checkpoint_every": 20,
        },
        "ray": {"storage": str(folder / "runs"), "max_failures": 5, **ray},
    }
    return check_config(PretrainConfig, tree)


def until(come: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stalls(monkeypatch: pytest.MonkeyPatch, folder: Path, seconds_by_step: dict[int, float]) -> Path:
    """The leader waits at these steps, once, for what the cluster is about to do; a file of each in the folder tells that it
    waits."""
    stalled = Path(tempfile.mkdtemp(dir=folder))
    faults = [
        {"fault": "stall", "rank": 0, "step": step, "seconds": seconds, "once": str(stalled / str(step))}
        for step, seconds in seconds_by_step.items()
    ]
    monkeypatch.setenv("ANTDIST_FAULTS", json.dumps(faults))
    return stalled


def assert_same_curve(mine: PretrainedModel, theirs: PretrainedModel) -> None:
    """Each step once, with the loss of the other run."""

    def curve(run: PretrainedModel) -> list[tuple[int, float]]:
        points = connect(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
        return [(point.step, point.value) for point in points]

    ours, others = curve(mine), curve(theirs)
    assert [step for step, _ in ours] == [step for step, _ in others] and len(others) > 30
    for (step, loss), (_, other) in zip(ours, others, strict=True):
        assert loss == pytest.approx(other, rel=1e-5), step
    assert mine.finished == theirs.finished == "all epochs done"


def assert_same_weights(mine: Path, theirs: Path) -> None:
    """Two runs' models to 1e-5, but for the biases of the keys: softmax does not see them, so their gradients are rounding
    alone, and Adam takes rounding for steps of full length."""
    ours, others = (load_file(run / "model" / "weights.safetensors") for run in (mine, theirs))
    assert ours.keys() == others.keys()
    for name, weights in others.items():
        seen = np.ones(len(weights), bool)
        if name.endswith("qkv.bias"):
            seen[len(seen) // 3 : 2 * len(seen) // 3] = False
        np.testing.assert_allclose(ours[name][seen], weights[seen], rtol=1e-5, atol=1e-5, err_msg=name)


@contextlib.contextmanager
def node(cluster: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A node with one CPU, as a machine joins: its own process group."""
    command = [RAY, "start", "--address", cluster.address, "--num-cpus=1", "--block"]
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={100 * 1024**2}"]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield started
    finally:
        lose(started)


def lose(node: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


def second_node() -> str:
    """The id of the living node that is not the head."""
    import ray

    (found,) = [each for each in ray.nodes() if each["Alive"] and "node:__internal_head__" not in each["Resources"]]
    return str(found["NodeID"])


def drain(cluster: Any, seconds: int) -> None:
    """What the notice of a spot instance's end does."""
    command = [RAY, "drain-node", "--address", cluster.address, "--node-id", second_node()]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
    subprocess.run([*command, f"--deadline-remaining-seconds={seconds}"], check=True)


def restarts(run: Path) -> list[tuple[int, int]]:
    """From which step the run went on, and with how many workers."""
    told = re.findall(r"resumes at step (\d+), .* (\d+) workers?, from", (run / "log.txt").read_text())
    return [(int(step), int(workers)) for step, workers in told]


def test_a_run_shrinks_with_a_lost_node_and_goes_on(
    cluster: Any, folder: Path, straight: PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stalled = folder / "runs" / "shrinking", stalls(monkeypatch, folder, {53: 300})
    with node(cluster) as second, ThreadPoolExecutor(1) as thread:
        import ray

        ray.init(log_to_driver=False)
        until(lambda: ray.cluster_resources().get("CPU") == 2, 60)
        ray.shutdown()

        def nodes() -> None:
            until((stalled / "53").exists, 500)
            lose(second)

        doing = thread.submit(nodes)
        shrunk = pretrain(config(folder, "shrinking", workers=2, min_workers=1))
        doing.result()
    assert restarts(run) == [(50, 1)]
    assert_same_curve(shrunk, straight)


def test_a_run_grows_with_a_node_and_saves_before_a_drain(
    cluster: Any, folder: Path, straight: PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with one worker. Of what was done before the second comes, at step 32, the steps since the last checkpoint
    are repeated. The checkpoint of step 54 is in no plan: the drain's notice asks for it."""
    run, stalled = folder / "runs" / "growing", stalls(monkeypatch, folder, {32: 300, 52: 25, 54: 300})
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1) as thread:

        def nodes() -> None:
            until((stalled / "32").exists, 500)
            stack.enter_context(node(cluster))
            until((stalled / "52").exists, 500)
            drain(cluster, seconds=45)

        doing = thread.submit(nodes)
        elastic = pretrain(config(folder, "growing", workers=2, min_workers=1))
        doing.result()
    assert restarts(run) == [(30, 2), (54, 1)]
    assert "a checkpoint of step 54, as a node is about to go" in (run / "log.txt").read_text()
    assert_same_curve(elastic, straight)
