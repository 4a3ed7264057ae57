"""Golden runs: weights, curves, MLflow records, registered models and verdicts are those that were recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.golden import kept
from tests.golden.record import run_all
from tests.golden.records import differences, processor, world_record
from tests.golden.world import EXPECTED, World, local_ray, make_world

pytestmark = pytest.mark.ray

RUNS = ("plain-pretrain", "deepspeed-pretrain", "plain-relearn", "deepspeed-relearn", "default")


@dataclass(frozen=True)
class Golden:
    """The world with the runs in it, and what is compared: bit for bit on the kind of processor that recorded."""

    world: World
    runs: dict[str, Any]
    expected: dict[str, Any]

    def check(self, actual: Any, *keys: str) -> None:
        expected = self.expected
        for key in keys:
            expected = expected[key]
        found = differences(expected, actual, exact=self.expected["processor"] == processor())
        assert not found, "\n".join(found[:40])


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    with local_ray():
        world = make_world(tmp_path_factory.mktemp("golden"))
        yield Golden(world, run_all(world), json.loads(EXPECTED.read_text()))


def test_golden_world_is_unchanged(golden: Golden) -> None:
    golden.check(world_record(golden.world), "world")


@pytest.mark.parametrize("name", RUNS)
def test_golden_run_is_unchanged(golden: Golden, name: str) -> None:
    golden.check(golden.runs[name], "runs", name)


def test_golden_budget_digests_differ(golden: Golden) -> None:
    """The recorded digests say something: small and default configurations have different ones, strategies the same."""
    found = {
        name: {ranks["key"]["budget"] for ranks in golden.runs[name]["ranks"].values()}
        for name in ("plain-relearn", "deepspeed-relearn", "default")
    }
    assert [len(digests) for digests in found.values()] == [1, 1, 1]
    assert found["plain-relearn"] == found["deepspeed-relearn"] != found["default"]


def test_golden_kept_pretraining_resumes_to_the_recorded_end(golden: Golden) -> None:
    resumed = kept.resume(golden.world)
    golden.check(resumed, "kept", "resumed")
    straight = golden.runs["plain-pretrain"]
    golden.check(resumed["history"], "runs", "plain-pretrain", "document", "history")
    if golden.expected["processor"] == processor():
        assert resumed["model"] == straight["weights"]["model/weights.safetensors"]


def test_golden_kept_relearning_is_not_trained_again(golden: Golden) -> None:
    folder = kept.restore(golden.world, kept.RELEARN)
    before = _stamps(folder)
    document = golden.world.relearn(kept.RELEARN, strategies=kept.STRATEGIES)
    assert len(before) > 10 and _stamps(folder) == before
    recorded = golden.expected["runs"]["plain-relearn"]["document"]
    assert document["test"] == [row for row in recorded["test"] if row["strategy"] in kept.STRATEGIES]
    assert document["chosen"] == "scratch" and document["model"] == "models:/kept-relearn-shop/1"


def test_golden_kept_model_is_loaded_and_served(golden: Golden) -> None:
    golden.check(kept.use_model(golden.world), "kept", "used")


def _stamps(folder: Path) -> dict[Path, int]:
    """When the files that training and ranking write were last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".npz")}
