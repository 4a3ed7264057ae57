"""Checkpoints on disk: one exists once its marker does; a damaged one is reported and skipped (law 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.training.checkpoints.local import (
    best_weights,
    describe,
    load_best,
    load_checkpoint,
    load_latest,
    recorded_best,
    save_checkpoint,
    steps_in,
    write_tensors,
)
from antdist.training.engines.base import EngineState


def state(value: float) -> EngineState:
    weights = {"a": torch.full((3, 2), value), "b.c": torch.tensor([value])}
    moments = {m: {name: w * 2 for name, w in weights.items()} for m in ("exp_avg", "exp_avg_sq")}
    return EngineState(weights, moments, updates=int(value), scale=None)


def save(parent: Path, step: int, keep: int = 2, keep_every: int | None = None) -> Path:
    return save_checkpoint(parent, step, state(float(step)), {"progress": {"step": step}}, keep, keep_every)


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    found = load_checkpoint(save(tmp_path, 7))
    assert found.document == {"progress": {"step": 7}}
    assert found.state.updates == 7 and found.state.scale is None
    for name, weight in state(7.0).weights.items():
        assert torch.equal(found.state.weights[name], weight)
        assert torch.equal(found.state.moments["exp_avg_sq"][name], weight * 2)


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 20, 100):
        save(tmp_path, step, keep=2)
    assert steps_in(tmp_path) == [20, 100]
    newest = load_latest(tmp_path)
    assert newest is not None and newest.document["progress"]["step"] == 100


def test_keep_every_retains_checkpoints_permanently(tmp_path: Path) -> None:
    """The first at or after each multiple is kept, at any interval of saves."""
    for step in (4, 8, 12, 16, 20, 24, 41, 44, 48, 52):
        save(tmp_path, step, keep=2, keep_every=10)
    assert steps_in(tmp_path) == [12, 20, 41, 48, 52]


def test_folder_without_marker_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "COMPLETE.json").unlink()
    newest = load_latest(tmp_path)
    assert newest is not None and newest.document["progress"]["step"] == 1
    with pytest.raises(UserError, match=r"not a checkpoint: no COMPLETE\.json"):
        load_checkpoint(tmp_path / "step-00000002")


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_load_falls_back_from_a_damaged_file(
    tmp_path: Path, name: str, damage: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    corrupt(save(tmp_path, 2) / name, damage)
    newest = load_latest(tmp_path)
    assert newest is not None and newest.document["progress"]["step"] == 1
    assert name in capsys.readouterr().err


def test_invalid_marker_is_reported(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "COMPLETE.json").write_text("{")
    with pytest.raises(UserError, match=r"COMPLETE\.json: the marker cannot be read"):
        load_checkpoint(folder)


def test_load_refuses_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        corrupt(save(tmp_path, step) / "moments.safetensors", "cut")
    with pytest.raises(
        UserError, match=rf"{tmp_path}: all checkpoints are damaged.*00001/moments.*[Rr]estore a complete one"
    ):
        load_latest(tmp_path)


def test_missing_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


def save_with_best(folder: Path, step: int, best: dict[str, object]) -> Path:
    return save_checkpoint(
        folder / "checkpoints", step, state(float(step)), {"progress": {"step": step}, "best": best}, keep=3
    )


def test_damaged_record_of_best_weights_is_ignored(tmp_path: Path) -> None:
    """If a `progress.json` is damaged, the previous checkpoint's record of the best weights counts."""
    path = best_weights(tmp_path, 3)
    path.parent.mkdir()
    write_tensors(path, state(1.0).weights)
    best = {"epoch": 3, "file": describe(path)}
    save_with_best(tmp_path, 1, best)
    later = save_with_best(tmp_path, 2, best) / "progress.json"
    later.write_text(later.read_text().replace(best["file"]["sha256"], "0" * 64))
    assert recorded_best(tmp_path / "checkpoints", 3) == best


def test_damaged_best_weights_are_refused(tmp_path: Path) -> None:
    path = best_weights(tmp_path, 3)
    path.parent.mkdir()
    write_tensors(path, state(1.0).weights)
    save_with_best(tmp_path, 1, {"epoch": 3, "file": describe(path)})
    assert torch.equal(load_best(tmp_path, 3)["a"], state(1.0).weights["a"])
    corrupt(path, "flip")
    with pytest.raises(UserError, match=r"epoch-00003\.safetensors: missing, truncated or modified"):
        load_best(tmp_path, 3)
