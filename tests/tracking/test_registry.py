from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from antdist.errors import UserError
from antdist.tracking import store
from antdist.tracking.registry import Lineage, compare_with_holder, folder_digest, register
from antdist.tracking.resolve import resolve, resolve_training_state
from antdist.tracking.run import start_run
from antdist.tracking.store import connect

PRETRAIN = Lineage({"books": "f1", "movies": "f2"})


def model_folder(folder: Path, content: str) -> Path:
    (folder / "deeper").mkdir(parents=True)
    (folder / "weights.safetensors").write_text(content)
    (folder / "deeper" / "model.json").write_text("{}")
    return folder


def new_run(uri: str, folder: Path) -> str:
    run = start_run(uri, "registry", "run", folder)
    assert run.finish() is None
    return run.run_id


@pytest.fixture(scope="module")
def known(uri: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Register `known-model` with one version that has training state."""
    folder = tmp_path_factory.mktemp("known")
    model, state = model_folder(folder / "m", "known"), model_folder(folder / "s", "state")
    run_id = new_run(uri, folder / "run")
    return register(
        uri, run_id, model, "known-model", PRETRAIN, validation=0.1, training_state=state, tags={"config": "x"}
    )


def test_registering_again_updates_tags_of_the_version(uri: str, tmp_path: Path) -> None:
    run_id, folder = new_run(uri, tmp_path / "run"), model_folder(tmp_path / "m", "later")
    first = register(uri, run_id, folder, "later", PRETRAIN, promote=False, tags={"transfer": "unknown", "seed": "1"})
    again = register(uri, run_id, folder, "later", PRETRAIN, tags={"transfer": "positive"})
    assert again.version == first.version
    tags = resolve("models:/later/1", uri).tags
    assert (tags["transfer"], tags["seed"]) == ("positive", "1")


def test_a_version_is_resolved_with_its_lineage(uri: str, tmp_path: Path) -> None:
    run_id = new_run(uri, tmp_path / "run")
    parent = register(uri, run_id, model_folder(tmp_path / "p", "p"), "whole", PRETRAIN, validation=0.5)
    lineage = Lineage({"toys": "f3"}, target="toys", strategy="relearn", parent=parent.uri)
    folder = model_folder(tmp_path / "c", "c")
    child = register(uri, run_id, folder, "whole", lineage, validation=0.9, aliases=["toys"])
    assert (parent.version, child.version) == (1, 2) and child.uri == "models:/whole/2"
    assert "another task" in child.champion and "it stays" in child.champion
    for reference in ("models:/whole/2", "models:/whole/latest", "models:/whole@newest", "models:/whole@toys"):
        found = resolve(reference, uri)
        assert found.uri == "models:/whole/2" and found.version == 2 and found.run_id == run_id
        assert folder_digest(found.folder) == folder_digest(folder) == found.tags["digest"]
    assert found.tags["parent"] == "models:/whole/1" and found.tags["fingerprint.toys"] == "f3"
    assert found.tags["strategy"] == "relearn" and found.tags["task"] == "target:f3"
    assert resolve("models:/whole@champion", uri).version == 1
    # Both versions of one run keep their content, though they have the same file names.
    assert (resolve("models:/whole/1", uri).folder / "weights.safetensors").read_text() == "p"


def test_registering_again_creates_no_second_version(uri: str, tmp_path: Path) -> None:
    run_id = new_run(uri, tmp_path / "run")
    a, b = model_folder(tmp_path / "a", "a"), model_folder(tmp_path / "b", "b")
    first = register(uri, run_id, a, "again", PRETRAIN, validation=0.2)
    second = register(uri, run_id, b, "again", PRETRAIN, validation=0.1)
    assert register(uri, run_id, a, "again", PRETRAIN, validation=0.2).version == first.version == 1
    assert second.version == 2 and resolve("models:/again/latest", uri).version == 2
    assert resolve("models:/again@newest", uri).version == 2
    assert resolve("models:/again@champion", uri).version == 1
    other = new_run(uri, tmp_path / "run")
    assert register(uri, other, a, "again", PRETRAIN).version == 3


def test_registering_resumes_after_an_interruption(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id, folder = new_run(uri, tmp_path / "run"), model_folder(tmp_path / "a", "a")

    def away(*_: Any, **__: Any) -> None:
        raise MlflowException("API request to http://me:hidden@host failed")

    for step in ("create_model_version", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step, away)
            with pytest.raises(UserError, match="run the command again") as error:
                register(uri, run_id, folder, "cut", PRETRAIN, validation=0.2)
            assert "hidden" not in str(error.value)
    assert register(uri, run_id, folder, "cut", PRETRAIN, validation=0.2).version == 1
    assert resolve("models:/cut@newest", uri).version == resolve("models:/cut@champion", uri).version == 1


@pytest.mark.parametrize("then", ["register retries", "the command runs again"])
@pytest.mark.parametrize(
    "step", ["log_artifacts", "create_registered_model", "create_model_version", "set_registered_model_alias"]
)
def test_a_lost_answer_never_registers_a_version_twice(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, then: str
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id, folder = new_run(uri, tmp_path / "run"), model_folder(tmp_path / "a", "a")
    name = f"lost {step} {then}"
    whole, calls = getattr(MlflowClient, step), []

    def done_and_lost(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        answer = whole(*arguments, **named)
        if len(calls) == 1:
            raise MlflowException("API request to http://host failed")
        return answer

    monkeypatch.setattr(MlflowClient, step, done_and_lost)
    if then == "the command runs again":
        with monkeypatch.context() as patch:
            patch.setattr(store, "WAITS", ())
            with pytest.raises(UserError, match="run the command again"):
                register(uri, run_id, folder, name, PRETRAIN, validation=0.2, aliases=["mine"])
    assert register(uri, run_id, folder, name, PRETRAIN, validation=0.2, aliases=["mine"]).version == 1
    assert [v.version for v in connect(uri).search_model_versions(f"name = '{name}'")] == [1]
    for alias in ("newest", "champion", "mine"):
        found = resolve(f"models:/{name}@{alias}", uri)
        assert found.version == 1 and found.tags["digest"] == folder_digest(folder)


def version(number: int, metric: float | None, task: str = "t") -> SimpleNamespace:
    tags = {"task": task} | ({} if metric is None else {"validation_recall_at_10": repr(metric)})
    return SimpleNamespace(version=str(number), tags=tags)


@pytest.mark.parametrize(
    ("holder", "candidate", "moves", "told"),
    [
        (None, version(1, 0.1), True, "the first"),
        (None, version(1, None), False, "no validation metric"),
        (version(1, 0.1), version(2, 0.2), True, "0.2000 against 0.1000 of version 1"),
        (version(1, 0.1), version(2, 0.1), False, "not champion"),
        (version(1, 0.1), version(2, 0.05), False, "not champion"),
        (version(1, 0.1), version(2, 0.9, "other"), False, "not comparable"),
        (version(1, 0.1), version(1, 0.1), False, "champion already"),
        (version(1, None), version(1, None), False, "champion already"),
        (None, version(1, math.nan), False, "no validation metric"),
        (version(1, math.nan), version(2, 0.1), False, "was not validated"),
        (version(1, None), version(2, 0.9), False, "not comparable"),
    ],
)
def test_champion_rule(holder: Any, candidate: Any, moves: bool, told: str) -> None:
    verdict, words = compare_with_holder("champion", holder, candidate)
    assert verdict is moves and told in words


def test_task_ignores_the_order_of_domains_and_the_parent() -> None:
    assert PRETRAIN.task == Lineage({"movies": "f2", "books": "f1"}).task != Lineage({"books": "f1"}).task
    assert Lineage({"toys": "f3"}, target="toys", parent="models:/a/1").task == "target:f3"


def test_a_folder_is_a_model(uri: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "x")
    assert resolve(str(folder), uri).folder == folder and resolve(str(folder), uri).version is None
    with pytest.raises(UserError, match="no folder training_state"):
        resolve_training_state(str(folder), uri)
    state = model_folder(folder / "training_state", "s")
    assert resolve_training_state(str(folder), uri).folder == state


def test_artifacts_of_a_run_are_a_model(uri: str, known: Any, tmp_path: Path) -> None:
    run_id = resolve("models:/known-model/1", uri).run_id
    assert resolve(f"runs:/{run_id}/model", uri).uri == "models:/known-model/1"
    run = start_run(uri, "registry", "unregistered", tmp_path)
    run.log_artifacts(model_folder(tmp_path / "m", "x"), "by/hand")
    assert run.finish() is None
    found = resolve(f"runs:/{run.run_id}/by/hand", uri)
    assert found.version is None and (found.folder / "weights.safetensors").read_text() == "x"
    with pytest.raises(UserError, match="no artifacts at 'model'; it has: by"):
        resolve(f"runs:/{run.run_id}/model", uri)


def test_training_state_is_resolved_and_checked(uri: str, known: Any, tmp_path: Path) -> None:
    state = resolve_training_state("models:/known-model/1", uri).folder
    assert (state / "weights.safetensors").read_text() == "state"
    run_id = new_run(uri, tmp_path / "run")
    register(uri, run_id, model_folder(tmp_path / "m", "x"), "imported", PRETRAIN)
    with pytest.raises(UserError, match="no training state") as error:
        resolve_training_state("models:/imported/latest", uri)
    assert str(error.value).startswith("models:/imported/1: ") and "imported" in str(error.value)
    (state / "weights.safetensors").write_text("other")
    with pytest.raises(UserError, match="digest differs"):
        resolve_training_state("models:/known-model/1", uri)
    (state / "weights.safetensors").write_text("state")


def test_resume_uses_the_later_state_of_the_same_best_model(uri: str, tmp_path: Path) -> None:
    run_id, model = new_run(uri, tmp_path / "run"), model_folder(tmp_path / "m", "best")
    for epoch in ("early", "late"):
        state = model_folder(tmp_path / epoch, epoch)
        version = register(uri, run_id, model, "longer", PRETRAIN, training_state=state)
    assert version.version == 1
    found = resolve_training_state("models:/longer/1", uri).folder
    assert (found / "weights.safetensors").read_text() == "late"


@pytest.mark.parametrize("damage", ["change", "add", "remove", "gone"])
def test_a_damaged_version_is_refused(uri: str, tmp_path: Path, damage: str) -> None:
    register(uri, new_run(uri, tmp_path / "run"), model_folder(tmp_path / "m", damage), f"damaged-{damage}", PRETRAIN)
    reference = f"models:/damaged-{damage}/1"
    folder = resolve(reference, uri).folder
    if damage == "change":
        (folder / "weights.safetensors").write_text("changf")
    elif damage == "add":
        (folder / "more").write_text("")
    elif damage == "remove":
        (folder / "deeper/model.json").unlink()
    else:
        folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="files are gone" if damage == "gone" else "digest differs") as error:
        resolve(reference, uri)
    assert str(error.value).startswith(f"{reference}: ")


@pytest.mark.parametrize("left", [[], ["deeper/model.json"]])
def test_an_incomplete_cached_download_is_not_used(uri: str, known: Any, tmp_path: Path, left: list[str]) -> None:
    swept = tmp_path / known.digest
    (swept / "deeper").mkdir(parents=True)
    for name in left:
        (swept / name).write_text("{}")
    found = resolve(known.uri, uri, tmp_path).folder
    assert found != swept and folder_digest(found) == known.digest


def test_loading_through_mlflow_keeps_the_digest(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.artifacts

    folder = model_folder(tmp_path / "m", "pyfunc")
    (folder / "MLmodel").write_text("flavors: {}")
    register(uri, new_run(uri, tmp_path / "run"), folder, "loaded", PRETRAIN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.artifacts.download_artifacts("models:/loaded/1")
    found = resolve("models:/loaded/1", uri).folder
    assert (found / "registered_model_meta").exists() and not (folder / "registered_model_meta").exists()


def test_a_version_without_a_digest_is_refused(uri: str, known: Any, tmp_path: Path) -> None:
    client, found = connect(uri), resolve("models:/known-model/1", uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", found.folder.as_uri(), found.run_id)
    with pytest.raises(UserError, match="has no digest, so antdist did not register it"):
        resolve("models:/foreign/1", uri)


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("models:/known-modle/1", "no registered model 'known-modle'; known names: known-model"),
        ("models:/known-model/7", "'known-model' has no version 7; it has: 1"),
        ("models:/known-model@best", "has no alias 'best'; it has: champion (version 1), newest (version 1)"),
        ("models:/known-model", "not a reference to a registered model"),
        ("models:/known-model/one", "Write it as models:/NAME@ALIAS, models:/NAME/VERSION"),
        ("models:/a'b/1", "not a reference"),
        ("models:/m-0123456789/x/y", "not a reference"),
        ("runs:/0123", "not a reference to a run's artifacts"),
        ("runs:/0123/../../etc", "not a reference to a run's artifacts"),
        ("runs:/0123/model", "no run '0123' in the tracking store"),
        ("s3://bucket/model", "neither an existing folder nor a reference to a model"),
        ("no/such/folder", "neither an existing folder nor a reference to a model"),
    ],
)
def test_invalid_references_are_refused(uri: str, known: Any, reference: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        resolve(reference, uri)
    assert str(error.value).startswith(f"{reference}: ") and told in str(error.value)
    if told.partition(" ")[0] in ("no", "has", "'known-model'"):  # the store was searched
        assert uri in str(error.value)


def test_an_empty_registry_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the registry is empty"):
        resolve("models:/any/1", f"sqlite:///{tmp_path}/mlflow.db")


def test_invalid_model_folders_are_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        register(uri, "0", tmp_path / "absent", "n", PRETRAIN)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty"):
        register(uri, "0", tmp_path / "empty", "n", PRETRAIN)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "weights").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="links are not"):
        register(uri, "0", tmp_path / "linked", "n", PRETRAIN)
    with pytest.raises(UserError, match="Leave out / : @"):
        register(uri, "0", tmp_path, "a/b", PRETRAIN)


def test_digest_depends_on_names_and_contents(tmp_path: Path) -> None:
    a = model_folder(tmp_path / "a", "x")
    assert folder_digest(a) == folder_digest(model_folder(tmp_path / "b", "x"))
    assert folder_digest(a) != folder_digest(model_folder(tmp_path / "c", "y"))
    before = folder_digest(a)
    (a / "weights.safetensors").rename(a / "weights")
    assert folder_digest(a) != before
