"""A checkpoint counts once its marker is there; a damaged one is named and passed over (law 6)."""

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
    known_best,
    load_best,
    load_checkpoint,
    load_latest,
    save_checkpoint,
    steps_in,
    write_tensors,
)
from antdist.training.engines.plain import EngineState


def state(value: float) -> EngineState:
    weights = {"a": torch.full((3, 2), value), "b.c": torch.tensor([value])}
    moments = {m: {name: w * 2 for name, w in weights.items()} for m in ("exp_avg", "exp_avg_sq")}
    return EngineState(weights, moments, updates=int(value), scale=None)


def save(parent: Path, step: int, keep: int = 2, keep_every: int | None = None) -> Path:
    return save_checkpoint(parent, step, state(float(step)), {"progress": {"step": step}}, keep, keep_every)


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


def test_one_every_so_many_steps_is_kept_for_good(tmp_path: Path) -> None:
    """The first at or after each multiple, whatever steps are saved at."""
    for step in (4, 8, 12, 16, 20, 24, 41, 44, 48, 52):
        save(tmp_path, step, keep=2, keep_every=10)
    assert steps_in(tmp_path) == [12, 20, 41, 48, 52]


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
    tmp_path: Path, name: str, damage: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    corrupt(save(tmp_path, 2) / name, damage)
    newest = load_latest(tmp_path)
    assert newest is not None and newest.progress["progress"]["step"] == 1
    assert name in capsys.readouterr().err


def test_a_broken_marker_is_told(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "COMPLETE.json").write_text("{")
    with pytest.raises(UserError, match=r"COMPLETE\.json: the marker cannot be read"):
        load_checkpoint(folder)


def test_where_all_are_damaged_it_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        corrupt(save(tmp_path, step) / "moments.safetensors", "cut")
    with pytest.raises(
        UserError, match=rf"{tmp_path}: all checkpoints are damaged.*00001/moments.*[Bb]ring a whole one"
    ):
        load_latest(tmp_path)


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None


def save_with_best(folder: Path, step: int, best: dict[str, object]) -> Path:
    return save_checkpoint(
        folder / "checkpoints", step, state(float(step)), {"progress": {"step": step}, "best": best}, keep=3
    )


def test_a_damaged_note_of_the_best_weights_is_not_handed_on(tmp_path: Path) -> None:
    """A checkpoint whose progress.json is not what its marker says: the one before it tells what the best weights are."""
    path = best_weights(tmp_path, 3)
    path.parent.mkdir()
    write_tensors(path, state(1.0).weights)
    best = {"epoch": 3, "file": describe(path)}
    save_with_best(tmp_path, 1, best)
    later = save_with_best(tmp_path, 2, best) / "progress.json"
    later.write_text(later.read_text().replace(best["file"]["sha256"], "0" * 64))
    assert known_best(tmp_path / "checkpoints", 3) == best


def test_best_weights_that_are_damaged_are_no_model(tmp_path: Path) -> None:
    path = best_weights(tmp_path, 3)
    path.parent.mkdir()
    write_tensors(path, state(1.0).weights)
    save_with_best(tmp_path, 1, {"epoch": 3, "file": describe(path)})
    assert torch.equal(load_best(tmp_path, 3)["a"], state(1.0).weights["a"])
    corrupt(path, "flip")
    with pytest.raises(UserError, match=r"epoch-00003\.safetensors: missing, cut short or altered"):
        load_best(tmp_path, 3)
