"""`antdist score` on a cluster of several nodes, one of which is lost in mid-run."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from antdist import faults
from antdist.serving.apply import find_model
from antdist.serving.score import score
from tests.serving.test_score import parts, save
from tests.worlds import make_domain

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_lost_node_does_not_change_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of a CPU each; the catalogue in five objects, some created on the node that is lost."""
    import ray
    from ray.cluster_utils import Cluster

    domain = make_domain(tmp_path, "food", users=100, missing=0.0, items_per_shard=7)
    found = find_model(str(save(tmp_path / "model", domain)), tmp_path)
    monkeypatch.setattr("antdist.serving.scorer.RANGE_ITEMS", 5)
    score(found, domain, str(tmp_path / "here"), workers=0)
    slow = [{"fault": "stall", "at": "score", "seconds": 1.0}]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(slow))  # nodes inherit it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    out, ran_on = tmp_path / "out", []
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        nodes: list[Any] = [cluster.add_node(num_cpus=1) for _ in range(2)]

        def remove() -> None:
            while len(list(out.glob("_parts/0*.json"))) < 4:
                time.sleep(0.05)
            ran_on.append(len(list(out.glob("_parts/0*.json"))))
            cluster.remove_node(nodes[0], allow_graceful=False)

        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        report = score(found, domain, str(out), workers=3, threads=1)
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert ran_on[0] < 12 and report.fresh_parts == 13
    assert parts(out) == parts(tmp_path / "here")
    assert (out / "_score.json").read_bytes() == (tmp_path / "here" / "_score.json").read_bytes()
