"""A run's folder: one command and one leading worker at a time, the same run or none."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, Resume
from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.runs import folder as runs
from antdist.runs.folder import claimed, for_workers, leading, note_tracked, take_up_tracked

LONGER_AND_GENTLER: tuple[Resume, ...] = ("longer_ok", "gentler_ok")

logger = get_logger("antdist.tests")


def config(**training: Any) -> PretrainConfig:
    return check_config(PretrainConfig, {"training": training})


def test_a_second_command_on_the_same_run_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", config()), claimed(tmp_path / "other", config()):
        refused = pytest.raises(UserError, match="run: another command is working on this run")
        with refused, claimed(tmp_path / "run", config()):
            pass
    with claimed(tmp_path / "run", config()):
        pass


def test_trials_of_a_run_stand_beside_each_other_and_the_whole_run_stands_alone(tmp_path: Path) -> None:
    run, one, other = tmp_path / "run", tmp_path / "run/one", tmp_path / "run/other"
    whole = pytest.raises(UserError, match="run: another command is working on this run")
    with claimed(run, config(), parts=[one], whole=False):
        with claimed(run, config(), parts=[other], whole=False):
            pass
        again = pytest.raises(UserError, match="run/one: another command is working on this trial")
        with again, claimed(run, config(), parts=[one], whole=False):
            pass
        with whole, claimed(run, config(), parts=[one, other]):
            pass
    with claimed(run, config(), parts=[one, other]), whole, claimed(run, config(), parts=[one], whole=False):
        pass
    with (
        pytest.raises(UserError, match=r"another configuration: training\.weight_decay"),
        claimed(run, config(weight_decay=0.5), parts=[one], whole=False),
    ):
        pass


def test_the_whole_run_waits_for_the_workers_of_a_trial_that_was_killed_and_a_trial_for_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "EARLIER_WORKERS_SECONDS", 0.1)
    one = tmp_path / "one"
    one.mkdir()
    for at_work, whole in [(one, True), (one, False), (tmp_path, False)]:
        refused = pytest.raises(UserError, match="earlier workers of this run are still at work")
        with leading(at_work), refused, claimed(tmp_path, config(), parts=[one], whole=whole):
            pass


HOLDING = """
import sys, time
from pathlib import Path
from antdist.config.schema import PretrainConfig, Resume
from antdist.runs.folder import claimed, leading
with claimed(Path(sys.argv[1]), PretrainConfig()):
    print("claimed", flush=True)
    with leading(Path(sys.argv[1])):
        print("leading", flush=True)
        time.sleep(600)
"""


def test_a_second_command_is_refused_while_the_first_lives_and_goes_on_once_it_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "claimed\n"
        assert first.stdout.readline() == "leading\n"
        with pytest.raises(UserError, match="another command is working on this run"), claimed(tmp_path, config()):
            pass
    finally:
        first.kill()
        first.wait()
    with claimed(tmp_path, config()), leading(tmp_path):
        pass
    assert "exists: going on with that run" in capsys.readouterr().err


def test_a_command_waits_for_the_workers_of_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They write to the outbox that the next command's driver opens."""
    monkeypatch.setattr(runs, "EARLIER_WORKERS_SECONDS", 0.1)
    with leading(tmp_path):
        refused = pytest.raises(UserError, match="earlier workers of this run are still at work")
        with refused, claimed(tmp_path, config()):
            pass
    with claimed(tmp_path, config()):
        pass


def test_what_a_run_is_may_not_change_and_how_it_runs_may(tmp_path: Path) -> None:
    with claimed(tmp_path, config()):
        pass
    with claimed(tmp_path, config(engine="plain", checkpoint_every=5).model_copy(update={"profile": True})):
        pass
    same_result = {"loss": {"chunk": 100}, "model": {"activation_checkpointing": True}}
    with claimed(tmp_path, check_config(PretrainConfig, same_result)):
        pass
    elsewhere = config().data.model_copy(update={"cache": "/tmp/elsewhere", "cache_gb": 1.0})
    with claimed(tmp_path, config().model_copy(update={"data": elsewhere})):
        pass
    with (
        pytest.raises(UserError, match=r"another configuration: training.weight_decay was 0.0, is 0.5\. Choose"),
        claimed(tmp_path, config(weight_decay=0.5), LONGER_AND_GENTLER),
    ):
        pass


def test_a_key_with_credentials_is_written_without_and_still_the_same_at_the_next_start(tmp_path: Path) -> None:
    begun = check_config(PretrainConfig, {"data": {"root": "s3://me:hidden@host/data"}})
    for _ in range(2):
        with claimed(tmp_path, begun):
            assert "hidden" not in (tmp_path / "config.yaml").read_text()


def test_only_who_may_adjust_goes_on_longer_or_slower_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(tmp_path, config()):
        pass
    changed = config(epochs=400, learning_rate=1e-4)
    with (
        pytest.raises(UserError, match=r"training.epochs was 300, is 400; training.learning_rate was 0.001, is 0.0001"),
        claimed(tmp_path, changed),
    ):
        pass
    with claimed(tmp_path, changed, LONGER_AND_GENTLER):
        pass
    assert "going on with that run; training.epochs was 300, is 400; training.learning_rate" in capsys.readouterr().err
    with claimed(tmp_path, changed):
        pass


def test_the_copy_of_a_run_is_of_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its configuration, also where the folder is gone, or another's."""

    def begun(there: str = "there", **training: Any) -> PretrainConfig:
        ray = {"storage": str(tmp_path / "runs"), "remote_storage": there}
        return check_config(PretrainConfig, {"training": training, "ray": ray})

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    with claimed(run, begun()):
        pass
    assert (tmp_path / "there" / "one" / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()
    assert for_workers(begun())["ray"]["remote_storage"] == str(tmp_path / "there")
    (run / "config.yaml").unlink()
    refused = r"there/one: a run of this name exists .*weight_decay was 0.0, is 0.5"
    with pytest.raises(UserError, match=refused), claimed(run, begun(weight_decay=0.5)):
        pass
    with claimed(run, begun("elsewhere", weight_decay=0.5)):
        pass
    with pytest.raises(UserError, match=refused), claimed(run, begun(weight_decay=0.5)):
        pass


def test_a_run_whose_folder_is_gone_keeps_its_mlflow_run_if_the_store_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = {"storage": str(tmp_path / "runs"), "remote_storage": f"file://{tmp_path}/there"}
    asked, store = check_config(PretrainConfig, {"ray": ray}), set[str]()

    def check_known(uri: str, run_id: str) -> None:
        if run_id not in store:
            raise UserError(f"the tracking store knows no run {run_id!r}")

    monkeypatch.setattr("antdist.tracking.run.check_known", check_known)
    trial = tmp_path / "runs" / "name" / "target" / "scratch-seed0"
    trial.mkdir(parents=True)
    assert take_up_tracked(trial, asked, "x") is None
    note_tracked(trial, asked, {"run_id": "abc", "parent": "p"})
    (trial / "run.json").unlink()
    assert take_up_tracked(trial, asked, "x") == {"run_id": None, "parent": "p"} and not (trial / "run.json").exists()
    assert "knows no run 'abc'. The run goes on with a new MLflow run" in capsys.readouterr().err
    store.add("abc")
    assert take_up_tracked(trial, asked, "x") == {"run_id": "abc", "parent": "p"} and (trial / "run.json").is_file()


def test_a_leader_waits_until_the_one_before_it_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    entered, leave = threading.Event(), threading.Event()

    def earlier() -> None:
        with leading(tmp_path):
            entered.set()
            leave.wait()
            order.append("earlier ends")

    thread = threading.Thread(target=earlier)
    thread.start()
    entered.wait()
    monkeypatch.setattr(runs, "EARLIER_WORKERS_SECONDS", 0.1)
    with pytest.raises(UserError, match="earlier workers of this run are still at work"), leading(tmp_path):
        pass
    monkeypatch.setattr(runs, "EARLIER_WORKERS_SECONDS", 20.0)
    monkeypatch.setattr(runs, "TELL_SECONDS", 0.1)
    threading.Timer(0.5, leave.set).start()
    with leading(tmp_path):
        order.append("later begins")
        logger.info("here")
    thread.join()
    assert order == ["earlier ends", "later begins"]
    told = (tmp_path / "log.txt").read_text().splitlines()
    assert told[-1] == "here" and told[-2].endswith(
        "earlier workers of this run are still at work: waiting until they have ended"
    )


def test_time_is_not_lost_on_a_free_folder(tmp_path: Path) -> None:
    start = time.monotonic()
    with leading(tmp_path):
        assert time.monotonic() - start < 0.2
