"""Three nodes: each worker on its own, nodes that go and come, features made on all of them; the same results everywhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antdist.config.schema import PretrainConfig
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.writing import write_domain
from antdist.distributed import ray_session as session
from antdist.errors import UserError
from antdist.features.featurize import featurize_domains
from antdist.runs.pretrain import PretrainedModel, pretrain
from tests.distributed import test_elastic as elastic
from tests.distributed.test_elastic import assert_same_curve, assert_same_weights, restarts, stalls, until
from tests.items import some_items
from tests.ray_internals import list_actors
from tests.worlds import make_domains

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NODE = {"num_cpus": 2, "object_store_memory": 80 * 1024**2}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of two CPUs each. Tests that take one away put another in its place."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(session, "GROW_SECONDS", 3.0)
        # nodes are added in a thread, which may set no handlers of signals
        head = {**NODE, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
        try:
            patch.setenv("RAY_ADDRESS", cluster.address)
            for _ in range(2):
                cluster.add_node(**NODE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    make_domains(folder / "data", ["aa", "bbb"])
    return folder


def config(folder: Path, name: str, **ray: Any) -> PretrainConfig:
    return elastic.config(folder, name, **{"workers": 3, "wait_minutes": 3, **ray})


class Seen:
    """On which nodes the actors of a class were at work, by looking again and again while the block runs."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.nodes: dict[str, str] = {}  # by actor, in the order of their coming
        self._over = threading.Event()

    def __enter__(self) -> Seen:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.3):
            with contextlib.suppress(Exception):  # no session begun, or just ended
                for actor, facts in list_actors().items():
                    if facts["State"] == "ALIVE" and self.kind in facts["ActorClassName"]:
                        self.nodes.setdefault(actor, facts["Address"]["NodeID"])

    @property
    def distinct(self) -> int:
        return len(set(self.nodes.values()))


@pytest.fixture(scope="module")
def straight(cluster: Any, folder: Path) -> PretrainedModel:
    """Three workers, each on a node of its own, from the start to the end. Packed, two would share one."""
    with Seen("RayTrainWorker") as seen:
        done = pretrain(config(folder, "straight", placement="STRICT_SPREAD"))
    assert len(seen.nodes) == 3 and seen.distinct == 3
    return done


def swap_at(stalled: Path, steps: list[int], cluster: Any) -> None:
    """A node goes at the first of these steps, and another comes at the second, or at once if there is none."""
    import ray

    until((stalled / str(steps[0])).exists, 500)
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    if len(steps) > 1:
        until((stalled / str(steps[1])).exists, 500)
    else:
        until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 100)
        time.sleep(session.CHECK_SECONDS + 2)  # so that the lack is logged
    cluster.add_node(**NODE)


def test_a_spread_run_waits_for_a_node_and_resumes_bit_for_bit(
    cluster: Any,
    folder: Path,
    straight: PretrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stalled = stalls(monkeypatch, folder, {53: 300})
    with ThreadPoolExecutor(1) as thread, Seen("RayTrainWorker") as seen:
        doing = thread.submit(swap_at, stalled, [53], cluster)
        done = pretrain(config(folder, "strict", placement="STRICT_SPREAD"))
        doing.result()
    assert restarts(done.folder) == [(50, 3)]
    assert len(set(list(seen.nodes.values())[-3:])) == 3 and seen.distinct == 4
    told = capsys.readouterr().err
    assert "the workers ask for a node each, 3 in all (2 there): waiting until nodes join the cluster" in told
    assert "the missing nodes have joined" in told
    assert_same_curve(done, straight)
    assert (done.folder / "model/weights.safetensors").read_bytes() == (
        straight.folder / "model/weights.safetensors"
    ).read_bytes()


def test_a_run_of_three_nodes_shrinks_to_two_and_grows_back(
    cluster: Any, folder: Path, straight: PretrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that asks for all CPUs of a node has one to itself."""
    stalled = stalls(monkeypatch, folder, {33: 300, 53: 300})
    with ThreadPoolExecutor(1) as thread, Seen("RayTrainWorker") as seen:
        doing = thread.submit(swap_at, stalled, [33, 53], cluster)
        done = pretrain(config(folder, "range", min_workers=2, cpus_per_worker=2))
        doing.result()
    assert [workers for _, workers in restarts(done.folder)] == [2, 3]
    assert len(set(list(seen.nodes.values())[:3])) == 3 and len(set(list(seen.nodes.values())[-3:])) == 3
    assert_same_curve(done, straight)
    assert_same_weights(done.folder, straight.folder)


def test_missing_nodes_are_reported_and_waited_for_in_time(
    cluster: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"ray.wait_minutes: the workers ask for a node each, 4 in all \(3 there\), and no"
    ):
        pretrain(config(folder, "many", placement="STRICT_SPREAD", workers=4, wait_minutes=0.1))
    assert "4 in all (3 there): waiting until nodes join the cluster" in capsys.readouterr().err


def domain_of_items(folder: Path) -> Domain:
    write_domain(
        folder, "things", some_items(48), Sequences(np.array([0, 3]), np.arange(3), np.arange(3)), ["user"],
        {"format": "test"}, items_per_shard=6,
    )  # fmt: skip
    return open_domain(folder)


def test_features_of_several_nodes_equal_those_of_one_process(cluster: Any, tmp_path: Path) -> None:
    kinds: dict[str, Any] = {"text": "hashed", "text_dim": 16, "image": "histogram", "price": "log"}
    alone, shared = domain_of_items(tmp_path / "one" / "things"), domain_of_items(tmp_path / "three" / "things")
    featurize_domains([alone], workers=0, **kinds)
    with Seen("MapWorker") as seen:
        report = featurize_domains([shared], workers=3, threads=2, **kinds)
    assert report.workers == 3 and seen.distinct >= 2
    parts = sorted(path.name for path in (alone.folder / "features").glob("*.npy"))
    assert len(parts) > 16
    for part in parts:
        assert (shared.folder / "features" / part).read_bytes() == (alone.folder / "features" / part).read_bytes(), part
