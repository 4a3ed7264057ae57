from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.errors import UserError
from antdist.tracking.overview import Version, load_versions
from antdist.tracking.pruning import prune, select_prunable
from antdist.tracking.registry import Lineage, register
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from antdist.tracking.store import connect
from tests.tracking.versions import make_version, version

DATA = Lineage({"books": "f1"})


def goes(versions: list[Version], keep: int, pattern: str = "*") -> list[str]:
    return sorted(v.uri.removeprefix("models:/") for v in select_prunable(versions, keep, pattern))


def test_newest_versions_and_those_with_an_alias_stay() -> None:
    many = [version("a", n) for n in range(1, 8)] + [version("b", 1), version("a", 9, aliases=["champion"])]
    assert goes(many, 5) == ["a/1", "a/2", "a/3"]
    many[1] = version("a", 2, aliases=["mine"])
    assert goes(many, 1) == ["a/1", "a/3", "a/4", "a/5", "a/6", "a/7"]
    assert goes(many, 100) == [] and goes(many, 1, "b") == []


def test_ancestors_of_kept_versions_stay() -> None:
    pre = [
        version("pre", 1),
        version("pre", 2, "models:/pre/1"),
        version("pre", 3),
        version("pre", 4),
        version("pre", 5),
    ]
    old, new = version("food", 1, "models:/pre/3"), version("food", 2, "models:/pre/2")
    assert goes([*pre, old, new], 1) == [
        "food/1",
        "pre/3",
        "pre/4",
    ]  # pre/1 is a grandparent; food/1 goes, so does pre/3
    assert goes([*pre, old, new], 1, "pre") == ["pre/4"]  # food/1 does not match, so its parent stays
    gone = version("food", 3, "models:/pre/9")
    assert goes([*pre, gone], 1) == ["pre/1", "pre/2", "pre/3", "pre/4"]


def test_foreign_and_copied_versions_stay() -> None:
    foreign = version("a", 1, digest=None)
    original, newest = version("a", 2), version("a", 3)
    copy = version("b", 1, source="models:/a/2", digest=original.digest)
    assert goes([foreign, original, newest], 1) == ["a/2"]
    assert goes([foreign, original, newest, copy], 1) == []


def test_prune_removes_versions_and_files_and_reports(uri: str, tmp_path: Path) -> None:
    for _ in range(3):
        state = tmp_path / "state"
        state.mkdir(exist_ok=True)
        (state / "x").write_text("s")
        make_version(uri, tmp_path, "pruned", DATA, training_state=state)
    folders = [resolve(f"models:/pruned/{n}", uri).folder for n in (1, 2, 3)]
    states = [folder.parents[1] / "training_state" for folder in folders]
    told = CliRunner().invoke(
        cli, ["models", "--name", "pruned", "--prune", "--keep", "2", "--dry-run", "--tracking-uri", uri]
    )
    assert told.output.splitlines()[0].startswith("would remove models:/pruned/1 (registered 20")
    assert told.output.splitlines()[-1] == "would remove 1 version, 2 stay" and folders[0].is_dir()
    file = tmp_path / "pruned.json"
    CliRunner().invoke(
        cli, ["models", "--prune", "--keep", "1", "--tracking-uri", uri, "--json", str(file)], catch_exceptions=False
    )
    assert json.loads(file.read_text())["removed"] == ["models:/pruned/2", "models:/pruned/1"]
    assert [v.uri for v in load_versions(uri) if v.name == "pruned"] == ["models:/pruned/3"]
    assert [folder.exists() for folder in folders] == [False, False, True]
    assert [any(place.iterdir()) for place in states] == [False, False, True]
    assert resolve("models:/pruned@newest", uri).version == 3


def test_shared_files_stay_until_the_last_version_goes(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("shared")
    run = start_run(uri, "registry", "run", tmp_path / "run")
    assert run.finish() is None
    for name in ("share-a", "share-b"):
        register(uri, run.run_id, folder, name, DATA)
        make_version(uri, (tmp_path / name).parent, name, DATA)
    shared = resolve("models:/share-b/1", uri).folder
    assert shared == resolve("models:/share-a/1", uri).folder
    assert [v.uri for v in prune(uri, pattern="share-a", keep=1).removed] == ["models:/share-a/1"] and shared.is_dir()
    assert [v.uri for v in prune(uri, pattern="share-b", keep=1).removed] == ["models:/share-b/1"]
    assert not shared.exists()


def test_prune_works_after_mlflow_gc_removed_the_run(uri: str, tmp_path: Path) -> None:
    for _ in range(2):
        make_version(uri, tmp_path, "collected", DATA)
    oldest, client = resolve("models:/collected/1", uri), connect(uri)
    client.delete_run(oldest.run_id)
    client._tracking_client.store._hard_delete_run(oldest.run_id)  # as `mlflow gc` does
    assert [v.uri for v in prune(uri, pattern="collected", keep=1).removed] == ["models:/collected/1"]
    assert not oldest.folder.exists()


def test_an_alias_set_meanwhile_keeps_its_version(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        make_version(uri, tmp_path, "late", DATA)
    known = load_versions(uri)
    monkeypatch.setattr("antdist.tracking.pruning.load_versions", lambda uri: known)
    connect(uri).set_registered_model_alias("late", "mine", "1")
    done = prune(uri, pattern="late", keep=1)
    assert not done.removed and resolve("models:/late@mine", uri).version == 1


def test_files_that_cannot_be_removed_keep_their_version(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    for _ in range(2):
        make_version(uri, tmp_path, "stuck", DATA)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(LocalArtifactRepository, "delete_artifacts", refuse)
        with pytest.raises(UserError, match="models:/stuck/1: its files cannot be removed"):
            prune(uri, pattern="stuck", keep=1)
    assert resolve("models:/stuck/1", uri).folder.is_dir()
    assert [v.uri for v in prune(uri, pattern="stuck", keep=1).removed] == ["models:/stuck/1"]


def test_options_of_prune_require_prune() -> None:
    told = CliRunner().invoke(cli, ["models", "--dry-run"])
    assert told.exit_code == 2 and "belong to --prune" in told.output
