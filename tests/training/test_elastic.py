"""One run resumed on other numbers of ranks: the same global batches (law 1), the same losses (law 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ranks import on_ranks
from tests.training.runs import assert_same, run


def _run(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(data, folder, epochs=2, checkpoint_every=1, **options)


@pytest.mark.parametrize(("engine", "sizes"), [("plain", (2, 1, 2, 3)), ("deepspeed", (2, 1, 3))])
def test_resume_on_other_world_sizes_keeps_batches_and_losses(
    data: Path, tmp_path: Path, engine: str, sizes: tuple[int, ...]
) -> None:
    """DeepSpeed partitions the optimizer (ZeRO 1); nothing is converted between two starts."""
    straight = _run(data, tmp_path / "straight", {})
    parts = []
    for place, size in enumerate(sizes):
        last = place == len(sizes) - 1
        options = {"engine": engine, "zero_stage": 1, **({} if last else {"stop_after": 3})}
        ranks = on_ranks(size, _run, data, tmp_path / "elastic", options)
        assert all(peer["users"] == ranks[0]["users"] for peer in ranks)
        parts.append(ranks[0])
    assert [len(part["curve"]) for part in parts[:-1]] == [3] * (len(sizes) - 1) and parts[-1]["curve"]
    whole = {**parts[-1], "curve": [point for part in parts for point in part["curve"]]}
    assert [users for part in parts for users in part["users"]] == straight["users"]
    assert_same(straight, whole, 1e-5)
    losses = np.array([entry["loss"] for entry in straight["history"]])
    np.testing.assert_allclose([entry["loss"] for entry in whole["history"]], losses, rtol=1e-5)
