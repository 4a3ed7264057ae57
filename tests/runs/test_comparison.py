"""A start under an existing name goes on with the same run, or is refused with the keys that differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, Resume
from antdist.errors import UserError
from antdist.runs.comparison import record_config
from antdist.runs.context import with_absolute_paths
from antdist.runs.folder import RunFolder, run_folder

LONGER_AND_GENTLER: tuple[Resume, ...] = ("longer_ok", "gentler_ok")


def config(**training: Any) -> PretrainConfig:
    return check_config(PretrainConfig, {"training": training})


def test_free_keys_may_change_on_resume_and_others_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record_config(folder, config())
    record_config(folder, config(engine="plain", checkpoint_every=5).model_copy(update={"profile": True}))
    same_result = {"loss": {"chunk": 100}, "model": {"activation_checkpointing": True}}
    record_config(folder, check_config(PretrainConfig, same_result))
    elsewhere = config().data.model_copy(update={"cache": "/tmp/elsewhere", "cache_gb": 1.0})
    record_config(folder, config().model_copy(update={"data": elsewhere}))
    with pytest.raises(UserError, match=r"another configuration: training.weight_decay was 0.0, is 0.5\. Choose"):
        record_config(folder, config(weight_decay=0.5), LONGER_AND_GENTLER)


def test_credentials_are_redacted_and_configs_still_equal(tmp_path: Path) -> None:
    given = check_config(PretrainConfig, {"data": {"root": "s3://me:hidden@host/data"}})
    for _ in range(2):
        record_config(RunFolder(tmp_path), given)
        assert "hidden" not in (tmp_path / "config.yaml").read_text()


def test_longer_and_gentler_resumes_need_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, changed = RunFolder(tmp_path), config(epochs=400, learning_rate=1e-4)
    record_config(folder, config())
    with pytest.raises(
        UserError, match=r"training.epochs was 300, is 400; training.learning_rate was 0.001, is 0.0001"
    ):
        record_config(folder, changed)
    record_config(folder, changed, LONGER_AND_GENTLER)
    assert "continuing that run; training.epochs was 300, is 400; training.learning_rate" in capsys.readouterr().err
    record_config(folder, changed)


def test_the_remote_copy_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the folder is gone or holds another run."""

    def given(remote: str = "there", **training: Any) -> PretrainConfig:
        ray = {"storage": str(tmp_path / "runs"), "remote_storage": remote}
        return check_config(PretrainConfig, {"name": "one", "training": training, "ray": ray})

    def record(given: PretrainConfig) -> None:
        folder = run_folder(given)
        folder.path.mkdir(parents=True, exist_ok=True)
        record_config(folder, given)

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    record(given())
    assert (tmp_path / "there" / "one" / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert with_absolute_paths(given()).ray.remote_storage == str(tmp_path / "there")
    (run / "config.yaml").unlink()
    refused = r"there/one: a run of this name exists .*weight_decay was 0.0, is 0.5"
    with pytest.raises(UserError, match=refused):
        record(given(weight_decay=0.5))
    record(given("elsewhere", weight_decay=0.5))
    with pytest.raises(UserError, match=refused):
        record(given(weight_decay=0.5))
