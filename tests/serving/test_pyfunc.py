"""A registered model loads through MLflow without the training stack, and equals `recommend`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from antdist.config.schema import ModelConfig, TrackingConfig
from antdist.data.domain import Domain
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.model.io import FeatureSource, ModelCard, load_model, save_model
from antdist.model.recommender import build_recommender
from antdist.serving.apply import find_model, open_model, parse_history
from antdist.serving.pyfunc import _load_pyfunc, make_servable
from antdist.serving.top_n import recommend
from antdist.tracking.registry import Lineage, folder_digest, register
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from antdist.tracking.store import tracking_uri
from tests.worlds import make_domain

CONFIG = ModelConfig(modalities=["text", "price"], dim=16, inner=16, experts=2, max_length=4)
AWAY = ["ray", "deepspeed", "transformers", "webdataset", "optuna", "sentence_transformers"]
HISTORIES = [["food-3"], ["food-1", "food-2", "food-9", "food-4", "food-5"], ["food-7", "food-7"]]

# the arguments: model, histories, the packages to keep away
FRESH_PROCESS = """
import json, sys

sys.modules.update(dict.fromkeys(sys.argv[3:]))  # None: importing it raises ModuleNotFoundError
import mlflow, pandas

model = mlflow.pyfunc.load_model(sys.argv[1])
answer = model.predict(pandas.DataFrame({"history": json.loads(sys.argv[2]), "n": [4, 10, 100]}))
trained = [m for m in sys.modules if m.startswith(("antdist.training", "antdist.runs", "antdist.features"))]
print(json.dumps({**answer.to_dict("list"), "trained": trained}))
"""


def save(folder: Path, domain: Domain, *, target: str | None = "food", seed: int = 3) -> Path:
    catalogue = Catalogue([domain], CONFIG.modalities)
    model = build_recommender(CONFIG, catalogue.dims, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    card = ModelCard(
        kind="adapted" if target else "pretrained",
        config=CONFIG,
        dims=catalogue.dims,
        features={m: FeatureSource(identity=identity) for m, identity in catalogue.identities.items()},
        target=target,
        domains=["books"],
    )
    save_model(folder, model, card)
    return folder


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    return make_domain(tmp_path_factory.mktemp("data"), "food", missing=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, domain: Domain) -> Path:
    made = save(tmp_path_factory.mktemp("model"), domain)
    make_servable(made, domain)
    return made


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> str:
    """Make a store with `relearn-food`."""
    storage = tmp_path_factory.mktemp("storage")
    uri = tracking_uri(TrackingConfig(uri=f"sqlite:///{storage}/mlflow.db"), storage)
    run = start_run(uri, "serving", "run", storage / "run")
    assert run.finish() is None
    register(uri, run.run_id, folder, "relearn-food", Lineage({"food": "f"}, target="food"), validation=0.5)
    return uri


def expected(folder: Path, domain: Domain, history: list[str], n: int) -> list[tuple[str, float]]:
    opened, ids = open_model(str(folder), domain.folder, folder), domain.item_ids()
    best = recommend(opened.model, opened.item_embeddings, parse_history(domain, history), n)
    return [(ids[index], score) for index, score in best]


def environment(uri: str) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_an_alias_resolves_to_a_version_uri(uri: str, folder: Path) -> None:
    found = find_model("models:/relearn-food@champion", folder, uri)
    assert found.uri == "models:/relearn-food/1" and found.card.target == "food"
    assert (found.folder / "weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


def test_pyfunc_loads_without_the_training_stack(uri: str, folder: Path, domain: Domain) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, "models:/relearn-food@champion", json.dumps(HISTORIES), *AWAY],
        capture_output=True,
        text=True,
        env=environment(uri),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for row, (history, n) in enumerate(zip(HISTORIES, [4, 10, 100], strict=True)):
        wanted = expected(folder, domain, history, n)
        assert told["items"][row] == [item for item, _ in wanted]
        assert told["scores"][row] == pytest.approx([score for _, score in wanted], abs=1e-6)
    assert [len(items) for items in told["items"]] == [4, 10, 29]  # 30 items without the one of the history
    assert told["trained"] == []
    assert "WARNING" not in done.stderr and "warn" not in done.stderr.lower()
    assert resolve("models:/relearn-food@champion", uri).folder.is_dir()  # its digest is still the registered one


def test_a_pretrained_model_without_catalogue_is_refused(tmp_path: Path, domain: Domain) -> None:
    import mlflow.pyfunc

    folder = save(tmp_path / "pre", domain, target=None)
    make_servable(folder, None)
    with pytest.raises(
        UserError, match=r"a pre-trained model has no catalogue, so it cannot be served.*Re-learn it for a target"
    ):
        mlflow.pyfunc.load_model(str(folder))


def test_registered_files_contain_no_pickle(folder: Path) -> None:
    names = {"MLmodel", "catalogue.json", "catalogue.safetensors", "model.json", "weights.safetensors"}
    assert {path.name for path in folder.iterdir()} == names


def test_predict_columns_and_index(folder: Path, domain: Domain) -> None:
    model = _load_pyfunc(str(folder))
    asked = pd.DataFrame({"history": HISTORIES[:2]}, index=["ann", "bob"])
    answer = model.predict(asked)
    assert list(answer.index) == ["ann", "bob"] and [len(items) for items in answer["items"]] == [10, 10]
    few = model.predict(asked.assign(n=[3, 4]))
    assert few["items"]["ann"] == answer["items"]["ann"][:3] and few["items"]["bob"] == answer["items"]["bob"][:4]
    assert len(model.predict(asked[:0])) == 0


def test_predict_does_not_depend_on_batching(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load_pyfunc(str(folder))
    asked = pd.DataFrame({"history": HISTORIES * 3})
    whole = model.predict(asked)
    monkeypatch.setattr("antdist.serving.top_n.HISTORY_BATCH", 2)
    assert model.predict(asked)["items"].tolist() == whole["items"].tolist()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (
            {"history": [["food-1"], ["food-1", "fod-2"]]},
            "row 1: the catalogue has no item 'fod-2'; ids look like food-0",
        ),
        ({"history": [["food-1"], []]}, "row 1: the history is empty"),
        ({"history": [["food-1"]], "n": [0]}, "row 0: n is 0"),
        ({"history": [["food-1"]], "n": [1.5]}, "Failed to enforce schema"),
        ({"history": ["food-1"]}, "Failed to enforce schema"),
    ],
)
def test_invalid_requests_name_the_row(folder: Path, asked: dict[str, Any], told: str) -> None:
    import mlflow.pyfunc
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=told):
        mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame(asked))


def test_servable_folder_is_rebuilt_only_for_new_weights(tmp_path: Path, domain: Domain) -> None:
    folder = save(tmp_path / "m", domain)
    make_servable(folder, domain)
    digest, times = folder_digest(folder), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make_servable(folder, domain)
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    save(folder, domain, seed=4)
    make_servable(folder, domain)
    assert folder_digest(folder) != digest
    model, _ = load_model(folder)
    served = _load_pyfunc(str(folder))
    best = recommend(model, served.item_embeddings, [3], 4)
    assert served.predict(pd.DataFrame({"history": [["food-3"]], "n": [4]}))["items"][0] == [
        served.item_ids[index] for index, _ in best
    ]
    assert [score for _, score in best] == pytest.approx(
        [score for _, score in expected(folder, domain, ["food-3"], 4)], abs=1e-6
    )


@pytest.mark.parametrize("name", ["weights.safetensors", "catalogue.safetensors", "catalogue.json"])
def test_a_changed_or_missing_file_is_refused(tmp_path: Path, domain: Domain, name: str) -> None:
    folder = save(tmp_path / "m", domain)
    make_servable(folder, domain)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b" ")
    with pytest.raises(UserError, match=f"{name} is not the file that was registered"):
        _load_pyfunc(str(folder))
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is not the file that was registered"):
        _load_pyfunc(str(folder))


@pytest.mark.slow
def test_mlflow_serves_the_model_on_loopback(uri: str, folder: Path, domain: Domain) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    env = environment(uri)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    server = subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1", "--model-uri", "models:/relearn-food@champion"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        status, _ = wait_for(f"http://127.0.0.1:{port}/ping", server)
        assert status == 200
        rows = [{"history": history, "n": 4} for history in HISTORIES]
        status, answer = ask(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": rows})
        assert status == 200
        for history, told in zip(HISTORIES, answer["predictions"], strict=True):
            wanted = expected(folder, domain, history, 4)
            assert told["items"] == [item for item, _ in wanted]
            assert told["scores"] == pytest.approx([score for _, score in wanted], abs=1e-6)
        status, answer = ask(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": [{"history": ["no"]}]})
        assert status == 400 and "row 0: the catalogue has no item 'no'" in answer["message"]
    finally:
        os.killpg(server.pid, 15)
        server.communicate(timeout=30)


def wait_for(url: str, server: subprocess.Popen[str]) -> tuple[int, str]:
    for _ in range(600):
        assert server.poll() is None, server.communicate()[0]
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.status, answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the model server does not answer")


def ask(url: str, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(document).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
