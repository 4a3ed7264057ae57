"""What is sent with a job, and what is refused before anything is sent; no Ray."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from antdist.cli.main import cli
from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.errors import UserError
from antdist.jobs.submission import (
    CONFIG_FILE,
    INSTALLED,
    Submission,
    package_root,
    read_submission,
    restore_submission,
    stage_files,
)

PLACES = ["data.root=/shared/data", "ray.storage=/shared/runs"]


def read(verb: str, *arguments: str, here: bool = False, code: str = INSTALLED) -> Submission:
    return read_submission(cli.commands[verb], arguments, here=here, code=code)


def received(entrypoint: str, folder: Path) -> list[str]:
    """The arguments that a shell hands to `python`, as Ray's does."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", entrypoint],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("before", ["", "RAY_ADDRESS=127.0.0.1:6379 "])
def test_a_signal_reaches_the_job_without_a_shell(before: str, tmp_path: Path) -> None:
    """Ray stops what it started and what that started. A shell dies at once, and its child is nobody's: where the container's
    first process reaps no orphans, Ray would see it for ever."""
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho $$ $RAY_ADDRESS\n")
    program.chmod(0o755)
    with subprocess.Popen(
        ["sh", "-c", before + read("pretrain", *PLACES).entrypoint],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    ) as shell:
        assert shell.communicate()[0].split() == [str(shell.pid), *before.strip().split("=")[1:]]


EVIL = ["x; touch X", "$(touch X)", "`touch X`", "a' ; touch X ; '", 'b" && touch X #', "two\ntouch X", "-n", "*"]


@pytest.mark.parametrize("evil", EVIL)
def test_no_shell_reads_what_a_user_typed(evil: str, tmp_path: Path) -> None:
    model = f"models:/{evil}"
    sent = read("evaluate", "--tracking-uri", evil, "--", model, f"/data/{evil}")
    assert received(sent.entrypoint, tmp_path) == [
        "-m", "antdist", "evaluate", f"--tracking-uri={evil}", "--", model, f"/data/{evil}",
    ]  # fmt: skip
    sent = read("prepare", f"/in/{evil}", f"--domain={evil}", "--out=/data", f"--column=item_id={evil}")
    assert received(sent.entrypoint, tmp_path)[3:] == [
        f"--domain={evil}", "--out=/data", f"--column=item_id={evil}", "--", f"/in/{evil}",
    ]  # fmt: skip
    assert not (tmp_path / "X").exists()


NASTY = st.text(
    st.one_of(st.sampled_from("'\"`$\\;&|<>(){}[]*?!#~= \t\n-%/.,:@"), st.characters(exclude_categories=["Cs"])),
    max_size=30,
).filter(lambda text: "\0" not in text)  # which no command line can hold


@settings(max_examples=100, deadline=None)
@given(text=NASTY, other=NASTY)
def test_the_entry_point_survives_a_shell_unchanged(text: str, other: str) -> None:
    model, path = f"models:/{text}", Path(f"/data/x{other}")
    typed = ["evaluate", f"--tracking-uri={other}", "--", model, str(path)]
    try:
        sent = read(typed[0], *typed[1:])
    except UserError as error:  # what looks like credentials is refused
        assert "password" in error.what
        return
    words = ["exec", "python", "-m", "antdist", *typed]
    assert shlex.split(sent.entrypoint) == words
    command = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {sent.entrypoint}"
    if len(text) % 4 == 0:  # and a real one
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == words
    assert set(sent.new_id()) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


@pytest.mark.parametrize("evil", EVIL[:-1])
def test_overrides_never_stand_in_the_entry_point(evil: str, tmp_path: Path) -> None:
    sent = read(
        "relearn", f"target={json.dumps(evil)}", "strategy=scratch", f"tracking.experiment={json.dumps(evil)}", *PLACES
    )
    assert sent.entrypoint == f"exec python -m antdist relearn --config {CONFIG_FILE}"
    assert stage_files(sent, tmp_path)
    config = load_config(RelearnConfig, tmp_path / CONFIG_FILE)
    assert (config.target, config.tracking.experiment) == (evil, evil)
    assert set(sent.new_id()) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_a_trial_of_a_target_is_a_run_of_its_own(tmp_path: Path) -> None:
    sent = read("relearn", "--only", "trial", "target=food", "strategy=scratch", "seeds=[3]", *PLACES)
    assert sent.metadata["run"] == "relearn/food/scratch-seed3"
    assert received(sent.entrypoint, tmp_path)[2:] == ["relearn", "--config", CONFIG_FILE, "--only=trial"]
    whole = read("relearn", "target=food", "strategy=scratch", "seeds=[3]", *PLACES)
    assert whole.metadata["run"] == "relearn/food"


def test_the_configuration_arrives_as_it_was_resolved_here(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: books\ntraining: {epochs: 3, learning_rate: 1e-3}\n")
    overrides = ["training.epochs=5", "data.domains=[aa, bbb]", "resume=models:/books/latest", *PLACES]
    sent = read("pretrain", "--config", str(tmp_path / "run.yaml"), *overrides)
    assert sent.metadata["run"] == "books" and sent.metadata["storage"] == "/shared/runs"
    stage_files(sent, tmp_path)
    assert load_config(PretrainConfig, tmp_path / CONFIG_FILE) == load_config(
        PretrainConfig, tmp_path / "run.yaml", overrides
    )
    # what the user left open, the cluster's version decides
    assert "keep_checkpoints" not in sent.metadata["config"]
    assert restore_submission(sent.entrypoint, {**sent.metadata, "job_submission_id": "x"}).metadata == sent.metadata


def test_a_local_submission_resolves_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sent = read("relearn", "target=food", "from=runs/pretrain/model", here=True)
    stage_files(sent, tmp_path)
    config = load_config(RelearnConfig, tmp_path / CONFIG_FILE)
    assert (config.data.root, config.ray.storage) == (f"{tmp_path}/data", f"{tmp_path}/runs")
    assert config.parent == f"{tmp_path}/runs/pretrain/model"
    assert sent.metadata["mlflow"] == f"sqlite:///{tmp_path}/runs/mlflow.db"
    words = shlex.split(read("evaluate", "models:/m@champion", "data/food", here=True).entrypoint)
    assert words[:2] == ["exec", sys.executable]
    assert words[5:] == [f"--storage={tmp_path}/runs", "--", "models:/m@champion", f"{tmp_path}/data/food"]


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("pretrain", ["training.epoch=3", *PLACES], "unknown key training.epoch. Did you mean training.epochs."),
        ("pretrain", ["--config", "absent.yaml"], "absent.yaml: no such file"),
        ("pretrain", ["ray.storage=/shared/runs"], r"data.root: 'data' would be resolved in the job's temporary copy"),
        ("pretrain", ["data.root=/shared/data"], r"ray.storage: 'runs' would be resolved"),
        ("pretrain", [*PLACES, "ray.remote_storage=copies"], r"ray.remote_storage: 'copies' would be resolved"),
        ("pretrain", [*PLACES, "data.cache=cache"], r"data.cache: 'cache' would be resolved"),
        ("pretrain", ["data.root=s3://key:secret@b/data", "ray.storage=/s"], "a URI contains a user name, password or token"),
        ("pretrain", [*PLACES, "resume=runs/old/model"], r"resume: 'runs/old/model' would be resolved"),
        ("pretrain", [*PLACES, "continue=runs/old"], r"continue: 'runs/old' would be resolved"),
        ("pretrain", [*PLACES, "continue=models:/a/1", "resume=models:/a/1"], "give one of the two"),
        ("pretrain", [*PLACES, "ray.address=head:6379"], r"ray.address: a job runs on the cluster that it is submitted to"),
        ("pretrain", [*PLACES, "training.precision=fp16"], "training.precision: fp16 needs a GPU"),
        ("pretrain", [*PLACES, "tracking.uri=http://me:secret@mlflow"], "a URI contains a user name, password or token"),
        ("pretrain", [*PLACES, "--json", "/shared/f.json"], "--json: a job cannot write to a file"),
        ("relearn", PLACES, "target: no target is named"),
        ("evaluate", ["models:/m/1", "data/food"], r"DATA/NAME: 'data/food' would be resolved"),
        ("evaluate", ["runs/m/model", "/data/food"], r"MODEL: 'runs/m/model' would be resolved"),
        ("evaluate", ["models:/m/1", "/data/food", "--tracking-uri=http://me:secret@mlflow"], "a user name, password or token"),
        ("score", ["models:/m/1", "/data/food", "--out", "scores"], r"out: 'scores' would be resolved"),
        ("featurize", ["/data/a", "data/b"], r"'data/b' would be resolved"),
    ],
)  # fmt: skip
def test_visible_errors_are_refused_before_submission(verb: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        read(verb, *arguments)
    assert "secret" not in str(told.value)


def test_a_data_uri_is_submitted_unchanged(tmp_path: Path) -> None:
    sent = read("pretrain", "data.root=s3://bucket/data", "data.cache=/nvme/cache", "ray.storage=/shared/runs")
    stage_files(sent, tmp_path)
    assert load_config(PretrainConfig, tmp_path / CONFIG_FILE).data.root == "s3://bucket/data"
    sent = read("evaluate", "models:/m@champion", "s3://bucket/data/food")
    assert shlex.split(sent.entrypoint)[-2:] == ["models:/m@champion", "s3://bucket/data/food"]
    assert sent.metadata["run"] == "food"


def test_an_output_uri_is_submitted_unchanged() -> None:
    sent = read("score", "models:/m@champion", "/data/food", "--out=s3://bucket/food", "--include-seen", "-n", "5")
    assert shlex.split(sent.entrypoint)[4:] == [
        "score", "--out=s3://bucket/food", "--top=5", "--include-seen", "--", "models:/m@champion", "/data/food",
    ] and sent.metadata["run"] == "food"  # fmt: skip


def test_arguments_that_the_verb_does_not_take_are_refused() -> None:
    with pytest.raises(click.UsageError, match=r"No such option.*--txt"):
        read("featurize", "/data/a", "--txt", "hashed")
    with pytest.raises(click.UsageError, match=r"Missing (argument|parameter)"):
        read("evaluate", "models:/m/1")


def test_the_package_is_sent_unless_installed(tmp_path: Path) -> None:
    sent, installed, neither = tmp_path / "sent", tmp_path / "installed", tmp_path / "neither"
    for folder in (sent, installed, neither):
        folder.mkdir()
    assert stage_files(read("pretrain", *PLACES, code=package_root()), sent)
    assert (sent / "antdist/cli/main.py").is_file() and (sent / CONFIG_FILE).is_file()
    assert not list(sent.rglob("__pycache__"))
    assert stage_files(read("pretrain", *PLACES), installed)
    assert [path.name for path in installed.iterdir()] == [CONFIG_FILE]
    assert not stage_files(read("featurize", "/data/a"), neither)
    with pytest.raises(UserError, match="there is no folder antdist with the package"):
        stage_files(read("featurize", "/data/a", code=str(tmp_path)), neither)
