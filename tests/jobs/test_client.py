"""Jobs as a user submits, lists, follows, stops and resumes them, over HTTP, against a head that asks for a token."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from antdist.errors import UserError
from antdist.io.files import write_json
from antdist.jobs import client as cluster_module
from antdist.jobs.client import STOP_SECONDS, Cluster, _row
from antdist.tracking.store import connect
from tests.heads import PROJECT, Head, ray_head
from tests.worlds import make_domains

STEP_SECONDS, SAVE_SECONDS = 0.4, 6  # Ray's own patience with a job that it stops is 3 s
RUN = [
    "name=shop", "data.domains=[aa,bbb]", "ray.workers=1", "ray.max_failures=0", "model.dim=16", "model.inner=16",
    "model.experts=2", "model.max_length=8", "stream.batch_size=8", "training.epochs=2", "training.log_every=4",
    "training.validate_every=2", "training.checkpoint_every=100000",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", ["aa", "bbb"])
    return folder


@pytest.fixture(scope="module")
def head(world: Path) -> Iterator[Head]:
    """Training on it takes its time, and so does its first save."""
    faults = [
        {"fault": "stall", "at": "step", "seconds": STEP_SECONDS},
        {
            "fault": "stall",
            "at": "save",
            "file": "weights.safetensors",
            "seconds": SAVE_SECONDS,
            "once": f"{world}/once",
        },
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTDIST_FAULTS", json.dumps(faults))
        with ray_head() as started:
            yield started


def antdist(head: Head, *arguments: str, address: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    to = ["--address", head.jobs] if address else []
    return subprocess.run(
        [sys.executable, "-m", "antdist", *arguments, *to], env={**head.environment, **environment}, cwd=PROJECT,
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip


def submitted(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    found = re.match(r"job (\S+)\n", done.stdout)
    assert found, done.stdout
    return found[1]


def until(come: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_is_submitted_listed_stopped_and_resumed(head: Head, world: Path) -> None:
    places = [f"data.root={world}/data", f"ray.storage={world}/runs"]
    run = world / "runs" / "shop"
    submit = antdist(head, "submit", "pretrain", *RUN, *places)
    job = submitted(submit)
    assert job.startswith("pretrain-shop-") and f"antdist logs {job} -f --address {head.jobs}" in submit.stdout
    until((run / "live.json").is_file)

    # RAY_ADDRESS will do, and what was typed counts more
    titles, row = antdist(head, "jobs", address=False, RAY_ADDRESS=head.jobs).stdout.splitlines()
    assert titles.split()[:4] == ["job", "state", "verb", "run"]
    assert re.match(rf"{job} +runs +pretrain +shop +\d+/\d+ +[\d,]+ +\d+\.\d{{4}} +[\d.]+ min +[0-9a-f]{{32}}$", row), (
        row
    )
    refused = antdist(head, "resume", job, RAY_ADDRESS="127.0.0.1:9")
    assert refused.returncode == 2 and f"error: {job}: the job runs. Stop it first" in refused.stderr

    stopped = antdist(head, "stop", job)
    assert stopped.returncode == 0, stopped.stderr
    found = re.search(
        rf"{job}: stopped\nlast line of its log: shop: stopped after step (\d+); run the same command",
        stopped.stdout,
    )
    assert found, stopped.stdout
    step = int(found[1])
    assert (run / f"checkpoints/step-{step:08d}/COMPLETE.json").is_file()
    listed = antdist(head, "jobs").stdout
    assert listed == "no job waits or runs; --all lists those that ended\n"

    resumed = antdist(head, "resume", job, "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumes at step {step}" in resumed.stdout and "registered models:/shop/1" in resumed.stdout
    again = re.match(r"job (\S+)\n", resumed.stdout)
    assert again and again[1] != job
    states = [line.split()[:2] for line in antdist(head, "jobs", "--all").stdout.splitlines()[1:]]
    assert states == [[job, "stopped"], [again[1], "done"]]
    assert f"resumes at step {step}" in antdist(head, "logs", again[1]).stdout
    known = json.loads((run / "run.json").read_text())["run_id"]
    assert connect(f"sqlite:///{world}/runs/mlflow.db").get_run(known).info.status == "FINISHED"


@pytest.mark.ray
@pytest.mark.slow
def test_the_job_refuses_bad_data_before_it_starts_workers(head: Head, world: Path) -> None:
    job = submitted(
        antdist(
            head, "submit", "pretrain", *RUN, "name=lost", f"data.root={world}/nowhere", f"ray.storage={world}/lost"
        )
    )
    sly = f"models:/x; touch {world}/X"
    evaluate = antdist(head, "submit", "evaluate", sly, f"{world}/data/aa", f"--storage={world}/lost", "--wait")
    assert evaluate.returncode == 2 and "error:" in evaluate.stdout and "Traceback" not in evaluate.stdout
    assert not (world / "X").exists()
    told = antdist(head, "logs", job, "-f")
    assert told.returncode == 2, told.stdout + told.stderr
    assert "error: data.domains: no prepared domain 'aa'" in told.stdout
    assert not (world / "lost" / "ray").exists()  # where the workers' records would be


@pytest.mark.ray
@pytest.mark.slow
def test_wrong_token_job_or_address_is_a_one_line_error(head: Head, tmp_path: Path) -> None:
    shutil.copy(head.environment["RAY_AUTH_TOKEN_PATH"], tmp_path / "token")
    (tmp_path / "token").write_text("0" * 64)
    wrong = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    # without one Ray looks for ~/.ray/auth_token
    missing = {"RAY_AUTH_TOKEN_PATH": "", "HOME": str(tmp_path)}
    nothing = ["submit", "featurize", f"{tmp_path}/data/aa"]
    for done, message in [
        (antdist(head, "jobs", **wrong), "the cluster refuses the token"),
        (antdist(head, *nothing, **wrong), "the cluster refuses the token"),
        (antdist(head, "jobs", **missing), "RAY_AUTH_TOKEN_PATH"),
        (antdist(head, *nothing, **missing), "RAY_AUTH_TOKEN_PATH"),
        (antdist(head, "jobs", RAY_AUTH_MODE="disabled"), "RAY_AUTH_TOKEN_PATH"),
        (antdist(head, "stop", "nobody"), "error: nobody: no such job"),
        (antdist(head, "logs", "nobody", "-f"), "error: nobody: no such job"),
        (antdist(head, "jobs", "--address", "http://127.0.0.1:9", address=False), "error: http://127.0.0.1:9: "),
    ]:
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def info(**facts: Any) -> Any:
    metadata = {"verb": "pretrain", "run": "shop", "storage": "", "mlflow": ""}
    return SimpleNamespace(
        **{
            "submission_id": "j",
            "status": "RUNNING",
            "start_time": 0,
            **facts,
            "metadata": metadata | facts["metadata"],
        }
    )


def test_a_row_shows_this_jobs_status_and_no_earlier_one(tmp_path: Path) -> None:
    live = {"name": "shop", "step": 7, "steps": 20, "loss": 1.25, "rate": 1234.5, "wait": 0.0, "left": 90.0}
    (tmp_path / "shop").mkdir()
    write_json(tmp_path / "shop/live.json", live)
    write_json(tmp_path / "shop/run.json", {"run_id": "abc"})
    seen = {"storage": str(tmp_path), "mlflow": "http://mlflow:5000"}
    link = "http://mlflow:5000/#/runs/abc"
    assert _row(info(metadata=seen)) == ("j", "runs", "pretrain", "shop", "7/20", "1,234", "1.2500", "1.5 min", link)
    later = int((time.time() + 60) * 1000)
    assert _row(info(metadata=seen, start_time=later))[4:] == ("", "", "", "", link)
    assert _row(info(metadata=seen, status="STOPPED"))[1:5] == ("stopped", "pretrain", "shop", "")
    elsewhere = {"storage": "/not/here", "mlflow": "http://mlflow:5000"}
    assert _row(info(metadata=elsewhere))[4:] == ("", "", "", "", "http://mlflow:5000")
    for damaged in ("", "{}", '{"step": 1}'):  # the other jobs are listed all the same
        (tmp_path / "shop/live.json").write_text(damaged)
        (tmp_path / "shop/run.json").write_text(damaged)
        assert _row(info(metadata=seen))[4:] == ("", "", "", "", "http://mlflow:5000")


def test_logs_follow_polls_the_job_when_the_head_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A connection whose packets get lost is not closed; a job that is merely silent is followed on, no line twice."""
    from ray.job_submission import JobStatus

    monkeypatch.setattr(cluster_module, "SILENCE_SECONDS", 0.05)
    answers = iter([info(metadata={}, status=JobStatus.RUNNING)] * 3)

    async def tail(job: str) -> AsyncIterator[str]:
        yield "one\n"
        yield "two\n"
        await asyncio.sleep(60)

    def ask(job: str) -> Any:
        found = next(answers, None)
        if found is None:
            raise ConnectionError("no route to host")
        return found

    cluster = Cluster.__new__(Cluster)
    cluster.address, cluster._client = "http://head:8265", SimpleNamespace(tail_job_logs=tail, get_job_info=ask)
    with pytest.raises(UserError, match=r"job server failed \(no route to host\)"):
        cluster.follow("j")
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_is_given_time_to_save_its_state() -> None:
    assert STOP_SECONDS >= 300
