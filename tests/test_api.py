"""`import antdist`: the verbs as functions, results as objects, a model in memory."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import antdist
from antdist.errors import UserError
from antdist.evaluation.metrics import METRICS
from antdist.evaluation.report import Row
from antdist.runs.verdict import Judgement

SIZES = {
    "domains": ["books", "food"],
    "users": 60,
    "items": 40,
    "target_users": 60,
    "target_items": 40,
    "with_images": False,
}
SMALL: dict[str, Any] = {
    "model": {"modalities": ["text"], "dim": 8, "inner": 8, "experts": 2, "max_length": 8, "layers": 1},
    "training": {"engine": "plain", "epochs": 2},
    "stream": {"batch_size": 128},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated world with text features."""
    world = tmp_path_factory.mktemp("api")
    folder = world / "data"
    report = antdist.synth(world / "exports", **SIZES)
    for name in report.to_frame()["name"]:
        antdist.prepare(world / "exports" / name, domain=name, out=folder)
    antdist.featurize([folder / "books", folder / "food"], text="hashed", text_dim=8, workers=0)
    return folder


@pytest.fixture(scope="module")
def target(data: Path) -> antdist.LoadedModel:
    """An untrained model over the items of `food`, saved and loaded again."""
    from antdist.config.schema import ModelConfig
    from antdist.data.domain import open_domain
    from antdist.features.catalogue import Catalogue
    from antdist.model.io import FeatureSource, ModelCard, save_model
    from antdist.model.recommender import build_recommender

    catalogue = Catalogue([open_domain(data / "food")], ["text"])
    config = ModelConfig(**SMALL["model"])
    sources = {m: FeatureSource(identity=identity) for m, identity in catalogue.identities.items()}
    card = ModelCard(kind="adapted", config=config, dims=dict(catalogue.dims), features=sources, target="food")
    save_model(data.parent / "model", build_recommender(config, catalogue.dims, seed=1), card)
    return antdist.load(data.parent / "model", domain=data / "food")


def test_import_is_light_and_lists_what_it_offers() -> None:
    code = "import sys, antdist; print('load' in dir(antdist), [m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True []\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        antdist.nothing
    assert all(callable(getattr(antdist, name)) for name in importlib.import_module("antdist.api").__all__)


def test_reports_are_readable_and_become_frames(data: Path) -> None:
    report = antdist.verify(data / "food")
    assert report.ok and repr(report) == "\n".join(report.lines())
    frame = antdist.featurize(data / "food", text="hashed", text_dim=8, workers=0, projection=None).to_frame()
    assert frame["modality"].tolist() == ["text"]


def test_a_judgement_prints_as_the_command_line_shows_it(tmp_path: Path) -> None:
    row = Row("scratch", dict.fromkeys(METRICS, 0.25), None, None)
    judgement = Judgement(target="food", seeds=[0], rows=[row], verdicts={}, notes=["a note"], folder=tmp_path)
    assert str(judgement) == repr(judgement) == "\n".join(judgement.lines())
    assert judgement.to_frame()["Recall@10"].tolist() == [0.25]


def test_prepare_refuses_options_that_append_does_not_take(data: Path) -> None:
    with pytest.raises(UserError, match=r"^--k-core: does not go with --append.* Leave it out\.$"):
        antdist.prepare(data, domain="food", out=data, append=True, k_core=5)


def test_configurations_are_objects_dictionaries_files_or_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  epochs: 7\n")
    tree = {"training": {"epochs": 7}}
    whole = antdist.pretrain_config(tree)
    for given in (tree, file, str(file), whole):
        assert antdist.pretrain_config(given) == whole
        changed = antdist.pretrain_config(given, ["training.epochs=9", "name=other"])
        assert (changed.training.epochs, changed.name) == (9, "other")
    assert tree == {"training": {"epochs": 7}} and antdist.pretrain_config().training.epochs == 300
    with pytest.raises(UserError, match=r"unknown key training.epoch. Did you mean training.epochs"):
        antdist.adapt_config({"training": {"epoch": 1}})


def test_a_configuration_of_another_kind_is_refused() -> None:
    assert isinstance(antdist.run_config({"target": "food"}), antdist.RelearnConfig)
    assert isinstance(antdist.run_config({}, ["strategy=scratch"]), antdist.RelearnConfig)
    assert isinstance(antdist.run_config(), antdist.PretrainConfig)
    with pytest.raises(
        UserError, match=r"^config: RelearnConfig is not a configuration. Give a PretrainConfig, a dict"
    ):
        antdist.pretrain(antdist.RelearnConfig())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: antdist.adapt({}, only="verdit"), r"^adapt: only is 'verdit'\. Give trial, verdict"),  # type: ignore[call-overload]
        (lambda: antdist.evaluate("m", "d", "Test"), r"^evaluate: no split 'Test'\. Give validation or test"),  # type: ignore[arg-type]
        (lambda: antdist.fanout({}, parallel=0), r"^fanout: parallel is 0\. Allow at least one job"),
        (lambda: antdist.prune(keep=0), r"^prune: keep is 0\. Keep at least one version"),
        (lambda: antdist.recommend("m", "d", user="u", n=0), r"^recommend: n is 0\. Ask for at least one item"),
        (lambda: antdist.recommend("m", "d"), r"^recommend: it takes either a user or a history"),
        (lambda: antdist.featurize([]), r"^featurize: no domain is named\. Name prepared domains"),
    ],
)
def test_values_that_make_no_sense_are_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


class TestLoadedModel:
    def test_recommends_what_the_command_line_ranks(self, data: Path, target: antdist.LoadedModel) -> None:
        from antdist.data.domain import open_domain
        from antdist.serving.top_n import recommend

        history = list(target.item_ids[3:6])
        found = target.recommend([history, history[:1]], n=4)
        expected = recommend(target.model, target.item_embeddings, [3, 4, 5], 4)
        assert found.items[0] == [open_domain(data / "food").item_ids()[index] for index, _ in expected]
        np.testing.assert_allclose(found.scores[0], [score for _, score in expected], rtol=1e-5)
        assert not set(found.items[0]) & set(history)
        frame = found.to_frame()
        assert frame.columns.tolist() == ["history", "rank", "item_id", "score"] and len(frame) == 8
        assert history[2] in target.recommend([history], n=len(target.item_ids), exclude_history=False).items[0]

    def test_scores_are_cosines_of_its_embeddings(self, target: antdist.LoadedModel) -> None:
        history = list(target.item_ids[:3])
        user, found = target.embed_users([history])[0], target.recommend([history], n=3)
        items = target.embed_items(found.items[0])
        cosines = items @ user / np.linalg.norm(items, axis=1) / np.linalg.norm(user)
        np.testing.assert_allclose(cosines, found.scores[0], rtol=1e-5)
        assert target.embed_items().shape == (40, 8)

    def test_saved_it_loads_alike_here_and_in_mlflow(self, tmp_path: Path, target: antdist.LoadedModel) -> None:
        import mlflow.pyfunc
        import pandas as pd

        folder = target.save_pretrained(tmp_path / "saved")
        again = antdist.LoadedModel.from_pretrained(folder)
        histories = [list(target.item_ids[:3]), list(target.item_ids[5:6])]
        assert again.recommend(histories, n=5) == target.recommend(histories, n=5)
        assert again.fingerprint == target.fingerprint and antdist.load(folder).item_ids == again.item_ids
        served = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"history": histories, "n": [5, 5]}))
        assert served["items"].tolist() == target.recommend(histories, n=5).items
        with pytest.raises(UserError, match="the folder is not empty"):
            target.save_pretrained(folder)
        assert "adapted for food" in repr(again) and "40 items" in repr(again)

    @pytest.mark.parametrize(
        ("histories", "n", "message"),
        [
            ([["fo0000"]], 3, "the catalogue has no item 'fo0000'. Did you mean"),
            ([["fo00000"], []], 3, "histories: history 1 is empty. Name at least one item."),
            (["fo00000"], 3, "history 0 is one text, 'fo00000'"),
            ([["fo00000"]], 0, "recommend: n is 0. Ask for at least one item."),
        ],
    )
    def test_bad_histories_are_refused(self, target: antdist.LoadedModel, histories: Any, n: int, message: str) -> None:
        with pytest.raises(UserError) as refused:
            target.recommend(histories, n=n)
        assert message in str(refused.value)

    def test_a_pretrained_model_needs_a_domain(self, data: Path, tmp_path: Path, target: antdist.LoadedModel) -> None:
        from antdist.model.io import save_model

        card = target.card.model_copy(update={"kind": "pretrained", "target": None})
        save_model(tmp_path / "pretrained", target.model, card)
        with pytest.raises(UserError, match="a pre-trained model has no catalogue"):
            antdist.load(tmp_path / "pretrained")
        assert len(antdist.load(tmp_path / "pretrained", domain=data / "food").item_ids) == 40


@pytest.mark.ray
def test_the_whole_flow_without_the_command_line(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = {**SMALL, "data": {"root": "data"}}
    first = antdist.pretrain({**given, "data": {"root": "data", "domains": ["books"]}})
    assert first.to_frame()["epoch"].tolist() == [1, 2] and first.model in repr(first)
    done = antdist.adapt({**given, "target": "food", "strategy": "auto", "from": first.model})
    assert set(done.to_frame()["strategy"]) == {"scratch", "finetune", "relearn"}
    model = antdist.load(done.model)
    assert len(model.recommend([model.item_ids[:2]], n=5).items[0]) == 5
    figures = antdist.evaluate(done.model, "data/food")
    chosen = done.to_frame().set_index("strategy").loc[done.chosen]
    assert figures.metrics["Recall@10"] == pytest.approx(chosen["Recall@10"], abs=1e-6)
    assert set(antdist.models().to_frame()["name"]) == {"pretrain", "relearn-food"}
    assert antdist.score(done.model, "data/food", "scores", n=3, workers=0).users == 60
