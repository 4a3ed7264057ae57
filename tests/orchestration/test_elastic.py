"""A cluster whose nodes come and go: the run shrinks, goes on, grows, and trains on the same batches (laws 1 and 2)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig
from antdist.orchestration.pretraining import pretrain
from antdist.tracking.store import connect
from tests.worlds import make_domains

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EPOCHS = 100


def config(folder: Path, name: str, **ray: Any) -> PretrainConfig:
    tree = {
        "name": name,
        "data": {"root": str(folder / "data"), "domains": ["aa", "bbb"]},
        "model": {"dim": 16, "inner": 16, "experts": 2, "max_length": 8, "mixture": False, "dropout": 0.0},
        "stream": {"batch_size": 100},
        "training": {
            "epochs": EPOCHS,
            "log_every": 5,
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


def test_a_run_shrinks_with_a_lost_node_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_domains(tmp_path / "data", ["aa", "bbb"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        saved = tmp_path / "runs" / "elastic" / "checkpoints"

        def lose() -> None:
            until(lambda: len(list(saved.glob("step-*/COMPLETE.json"))) >= 2, 120)
            cluster.remove_node(node, allow_graceful=False)

        losing = threading.Thread(target=lose)
        losing.start()
        elastic = pretrain(config(tmp_path, "elastic", workers=2, min_workers=1))
        losing.join()
        straight = pretrain(config(tmp_path, "straight", workers=1))
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
    told = (tmp_path / "runs" / "elastic" / "log.txt").read_text()
    assert "1 worker, from" in told, told

    def curve(run: Any) -> dict[int, float]:
        points = connect(run.tracking_uri).get_metric_history(run.run_id, "train/loss")
        return {point.step: point.value for point in points}

    mine, theirs = curve(elastic), curve(straight)
    assert mine.keys() == theirs.keys() and len(mine) > 50
    for step, loss in list(theirs.items())[:50]:
        assert mine[step] == pytest.approx(loss, rel=1e-4), step
    assert elastic.finished == straight.finished == "all epochs done"
