"""The jobs as a cluster runs them: `launch/*.py` submitted to a Ray head, which attaches them to itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from antdist.config.load import load_config
from antdist.config.schema import ModelConfig, PretrainConfig
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.model.io import ModelCard, read_card, save_model
from antdist.model.recommender import build_recommender
from antdist.runs.checks import check_pretrain
from antdist.tracking.resolve import resolve
from antdist.tracking.store import tracking_uri
from tests.heads import PROJECT, Head, ray_head
from tests.ray_internals import create_package
from tests.worlds import make_domains

pytestmark = pytest.mark.ray

AUXILIARY = ["aa", "bbb"]
SMALL = [
    "model.dim=16", "model.inner=16", "model.experts=2", "model.max_length=8", "model.initial_shift=zero",
    "stream.batch_size=200", "training.epochs=2", "training.validate_every=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as started:
        yield started


def test_both_jobs_run_on_the_head_that_they_were_submitted_to(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    make_domains(tmp_path / "data", [*AUXILIARY, "target"])
    places = [f"data.root={tmp_path}/data", f"ray.storage={tmp_path}/runs"]
    uri = tracking_uri(load_config(PretrainConfig, None, places).tracking, tmp_path / "runs")

    first = head.submit(
        "python", "launch/pretrain.py", "--config", "configs/demo.yaml",
        f"data.domains=[{','.join(AUXILIARY)}]", *places, *SMALL,
    )  # fmt: skip
    assert first.succeeded, first.logs
    assert "epoch 2/2" in first.logs and "registered models:/demo/1" in first.logs
    parent = resolve("models:/demo@champion", uri)
    assert read_card(parent.folder).domains == AUXILIARY

    second = head.submit(
        "python", "launch/relearn.py", "--config", "configs/demo-relearn.yaml",
        "target=target", "strategy=relearn", "seeds=[0]", *places, *SMALL,
    )  # fmt: skip
    assert second.succeeded, second.logs
    adapted = resolve("models:/demo-relearn-target/latest", uri)
    assert (adapted.tags["strategy"], adapted.tags["parent"]) == ("relearn", parent.uri)

    # on this head: its workers' logs lie below its folder; and its token is in none
    logs = {path: path.read_text(errors="replace") for path in head.folder.glob("session_latest/logs/**/*.log")}
    assert any(path.match("logs/train/*worker*") for path in logs), sorted(map(str, logs))
    token = (head.folder / "token").read_text()
    assert not any(token in text for text in [first.logs, second.logs, *logs.values()])


@pytest.mark.slow
def test_scoring_runs_on_the_head_that_it_was_submitted_to(head: Head, tmp_path: Path) -> None:
    (domain,) = make_domains(tmp_path / "data", ["food"])
    catalogue = Catalogue([domain], ["text"])
    model = build_recommender(ModelConfig(modalities=["text"], dim=16, inner=16), catalogue.dims)
    save_model(tmp_path / "model", model, ModelCard(kind="pretrained", config=model.config, dims=catalogue.dims))
    job = head.submit(
        "python", "launch/score.py", f"{tmp_path}/model", str(domain.folder), "--out", f"{tmp_path}/out", "--top", "3"
    )
    assert job.succeeded, job.logs
    assert "120 items for 40 users in 5 files" in job.logs and "2 workers" in job.logs
    assert pq.read_table(tmp_path / "out").num_rows == 40
    again = head.submit(
        "python", "launch/score.py", f"{tmp_path}/model", str(domain.folder), "--out", f"{tmp_path}/out", "--top", "4"
    )
    assert not again.succeeded and "holds scores of other inputs: n was 3, now it is 4" in again.logs


def test_a_user_error_fails_the_job_with_one_line(head: Head) -> None:
    job = head.submit("python", "launch/pretrain.py", "--config", "configs/demo.yaml", "training.epoch=3")
    assert not job.succeeded and "exit code 2" in job.logs
    assert "error: configs/demo.yaml: unknown key training.epoch. Did you mean training.epochs." in job.logs
    assert "Traceback" not in job.logs


def test_a_job_keeps_nothing_in_its_copy_of_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"ray.storage: 'demo-out/runs' would lie in .*absolute path"):
        check_pretrain(load_config(PretrainConfig, PROJECT / "configs/demo.yaml"))


def test_a_job_takes_the_code_along_and_little_else(tmp_path: Path) -> None:
    from zipfile import ZipFile

    package = tmp_path / "package.zip"
    create_package(PROJECT, package)
    names = ZipFile(package).namelist()
    assert {"launch/pretrain.py", "configs/demo.yaml", "antdist/data/stream/stream.py"} <= set(names)
    assert not any(name.startswith((".git/", ".venv/", "data/", "tests/", "demo-out/", "runs/")) for name in names)
    assert package.stat().st_size < 2 * 1024**2
