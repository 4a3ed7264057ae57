"""Records in a run's folder: those of earlier versions load, lost ones come back from the copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from antdist.config.load import check_config
from antdist.config.schema import RelearnConfig
from antdist.errors import UserError
from antdist.io.files import write_json
from antdist.runs.folder import RunFolder
from antdist.runs.mlflow_runs import restore_record
from antdist.runs.records import PretrainResult, RunRecord, TrialResult
from antdist.runs.trials import trials_of
from antdist.runs.verdict import AdaptedModel, read_judgement
from antdist.training.status import Status

KEPT = Path(__file__).parents[1] / "golden" / "kept"


def same_file(path: Path, content: dict[str, object]) -> bool:
    return json.loads(path.read_text()) == content


def test_kept_pretrain_folder_loads_and_is_written_alike() -> None:
    folder = RunFolder(KEPT / "kept-pretrain")
    record, result = folder.read_record(), folder.read_result(PretrainResult)
    assert record is not None and record.data is not None and record.data.keys() == {"aa", "bb"}
    assert same_file(folder.record_file, record.to_json())
    assert result is not None and (result.finished, result.error, result.history[0]["epoch"]) == (None, None, 1)
    assert same_file(folder.result_file, result.to_json())


def test_kept_adaptation_folder_loads_and_is_written_alike() -> None:
    folder = RunFolder(KEPT / "kept-relearn" / "shop")
    for strategy in ("scratch", "relearn"):
        trial = folder.trial(strategy, 0)
        record, result = trial.read_record(), trial.read_result(TrialResult)
        assert record is not None and record.parent == ("models:/plain-pretrain/1" if strategy == "relearn" else None)
        assert result is not None and result.error is None and result.validation["users"] == 48
        assert same_file(trial.record_file, record.to_json()) and same_file(trial.result_file, result.to_json())
    (source,) = folder.read_sources().values()
    assert source.uri == "models:/plain-pretrain/1" and folder.source(source.digest).is_dir()
    judgement = read_judgement(folder.judgement_file)
    assert isinstance(judgement, AdaptedModel) and judgement.chosen == "scratch"
    assert same_file(folder.judgement_file, judgement.to_json())


def test_sources_are_written_as_they_were(tmp_path: Path) -> None:
    kept = RunFolder(KEPT / "kept-relearn" / "shop")
    for model, source in kept.read_sources().items():
        RunFolder(tmp_path).write_source(model, source)
    assert (tmp_path / "from.json").read_bytes() == (kept.path / "from.json").read_bytes()


def test_records_of_other_versions_keep_what_is_known(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_json(folder.record_file, {"run_id": "abc", "parent": None, "later": 1})
    assert folder.read_record() == RunRecord(run_id="abc", parent=None)
    write_json(folder.record_file, {"run_id": 7})
    with pytest.raises(UserError, match=r"run\.json: the file is damaged: run_id: Input should be a valid string"):
        folder.read_record()


def test_status_round_trips(tmp_path: Path) -> None:
    folder, status = RunFolder(tmp_path), Status("a", 1, 2, 0.5, 10.0, 0.1, 3.0)
    assert folder.read_status() is None
    folder.write_status(status)
    assert folder.read_status() == status


def test_a_lost_record_comes_back_if_the_store_knows_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = {"storage": str(tmp_path / "runs"), "remote_storage": f"file://{tmp_path}/there"}
    config = check_config(RelearnConfig, {"name": "name", "target": "target", "strategy": "scratch", "ray": ray})
    known = set[str]()

    def check_run_exists(uri: str, run_id: str) -> None:
        if run_id not in known:
            raise UserError(f"the tracking store knows no run {run_id!r}")

    monkeypatch.setattr("antdist.runs.mlflow_runs.check_run_exists", check_run_exists)
    trial, record = trials_of(config)[0].folder, RunRecord(run_id="abc", parent="p")
    trial.path.mkdir(parents=True)
    assert restore_record(trial, "x") is None
    trial.write_record(record)
    trial.record_file.unlink()
    assert restore_record(trial, "x") == RunRecord(run_id=None, parent="p") and not trial.record_file.exists()
    assert "knows no run 'abc'. The run continues with a new MLflow run" in capsys.readouterr().err
    known.add("abc")
    assert restore_record(trial, "x") == record and trial.record_file.is_file()
