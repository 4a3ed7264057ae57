"""A checkpoint counts once its marker is there; a damaged one is named and passed over (law 6)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from antdist.errors import UserError
from antdist.training.checkpoint import load_checkpoint, load_latest, save_checkpoint, steps_in
from antdist.training.engine import EngineState


def state(value: float) -> EngineState:
    weights = {"a": torch.full((3, 2), value), "b.c": torch.tensor([value])}
    moments = {m: {name: w * 2 for name, w in weights.items()} for m in ("exp_avg", "exp_avg_sq")}
    return EngineState(weights, moments, updates=int(value), scale=None)


def save(parent: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(parent, step, state(float(step)), {"progress": {"step": step}}, keep)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    found = load_checkpoint(save(tmp_path, 7))
    assert found.progress == {"progress": {"step": 7}}
    assert found.state.updates == 7 and found.state.scale is None
    for name, weight in state(7.0).weights.items():
        assert torch.equal(found.state.weights[name], weight)
        assert torch.equal(found.state.moments["exp_avg_sq"][name], weight * 2)


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 20, 100):
        save(tmp_path, step, keep=2)
    assert steps_in(tmp_path) == [20, 100]
    newest = load_latest(tmp_path)
    assert newest is not None and newest.progress["progress"]["step"] == 100


def test_a_folder_without_marker_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "COMPLETE.json").unlink()
    newest = load_latest(tmp_path)
    assert newest is not None and newest.progress["progress"]["step"] == 1
    with pytest.raises(UserError, match=r"not a checkpoint: there is no COMPLETE\.json"):
        load_checkpoint(tmp_path / "step-00000002")


@pytest.mark.parametrize("name", ["weights.safetensors", "moments.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    newest = load_latest(tmp_path)
    assert newest is not None and newest.progress["progress"]["step"] == 1
    assert name in capsys.readouterr().err


def test_a_broken_marker_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "COMPLETE.json").write_text("{")
    with pytest.raises(UserError, match=r"COMPLETE\.json: the marker cannot be read"):
        load_checkpoint(folder)
    assert load_latest(tmp_path) is None


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
