"""`pretrain continue=MODEL`: what a new run begins with, what it refuses, and its lineage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, RelearnConfig
from antdist.data.domain import open_domain
from antdist.data.ingest.append import append_to_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.distributed.ray_session import ray_session
from antdist.distributed.world import World
from antdist.errors import UserError
from antdist.features.featurize import featurize_domains
from antdist.model.io import read_card
from antdist.model.recommender import build_recommender
from antdist.runs.checks import check_pretrain
from antdist.runs.continuing import compare_data
from antdist.runs.folder import RunFolder
from antdist.runs.inputs import open_pretrain_inputs
from antdist.runs.pretrain import collect_training_state, pretrain
from antdist.runs.workers import pretrain as pretraining
from antdist.runs.workers.common import learn
from antdist.runs.workers.pretrain import PretrainSettings
from antdist.runs.workers.trial import AdaptSettings, open_inputs
from antdist.tracking.overview import load_overview
from antdist.tracking.resolve import ResolvedModel, resolve
from antdist.tracking.store import connect
from antdist.training.checkpoints.local import load_latest
from antdist.training.engines.plain import PlainEngine

SMALL = {"modalities": ["text"], "dim": 8, "inner": 8, "experts": 2, "max_length": 6, "layers": 1}


def source(folder: Path, name: str, items: range, first: int, days: int) -> Path:
    """Write walks of 40 users over items, one item a user and day."""
    folder.mkdir(parents=True)
    told = [{"item_id": f"{name}{i}", "text": f"{name} thing {i} of kind {i % 5}"} for i in items]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in told))
    lines = [
        f"u{u},{name}{(3 * u + 2 * day) % items.stop},{day}" for u in range(40) for day in range(first, first + days)
    ]
    (folder / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    return folder


def features(data: Path, names: list[str]) -> None:
    featurize_domains([open_domain(data / name) for name in names], text="hashed", text_dim=8, workers=0)


def grow(folder: Path) -> None:
    append_to_domain(source(folder / "more", "a", range(20, 25), 9, 6), domain="a", out=folder / "data", block_users=8)
    features(folder / "data", ["a", "b"])


def tree(folder: Path, name: str, **changes: Any) -> PretrainConfig:
    content: dict[str, Any] = {
        "name": name,
        "data": {"root": str(folder / "data"), "domains": changes.pop("domains", ["a"])},
        "model": {**SMALL, **changes.pop("model", {})},
        "stream": {"batch_size": 60},
        "training": {"engine": "plain", "epochs": 2, "log_every": 1, **changes.pop("training", {})},
        "ray": {"storage": str(folder / "runs"), "max_failures": 0},
        **changes,
    }
    return check_config(PretrainConfig, content)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Domain `a`, appended to since the run `parent` trained on it, and `b`, which that run did not have."""
    folder = tmp_path_factory.mktemp("continuing")
    for name in ("a", "b"):
        prepare_domain(source(folder / name, name, range(20), 0, 9), domain=name, out=folder / "data", block_users=8)
    features(folder / "data", ["a", "b"])
    place = folder / "runs" / "parent"
    place.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("antdist.runs.workers.common.is_node_leaving", lambda: False)  # asks Ray, which does not run
        train(tree(folder, "parent"), place)
        collect_training_state(RunFolder(place))
        grow(folder)
        yield folder


def train(config: PretrainConfig, folder: Path, **settings: Any) -> None:
    """Do a worker's work in this process."""
    pretraining.train_model(PretrainSettings(config, "", **settings), World(), RunFolder(folder), None)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_latest(folder / "checkpoints")
    assert found is not None
    return {**found.state.weights, **{f"moment {k}": v for k, v in found.state.moments["exp_avg_sq"].items()}}


def test_continue_begins_with_weights_and_moments(world: Path, tmp_path: Path) -> None:
    """Bit for bit equal to loading both by hand and training on the appended domains, with the warm-up."""
    training = {"schedule": {"warmup_steps": 3}, "epochs": 1}
    config = tree(world, "later", domains=["a", "b"], training=training, **{"continue": str(world / "runs" / "parent")})
    state = world / "runs" / "parent" / "training_state"
    (tmp_path / "run").mkdir()
    train(config, tmp_path / "run", state=state, parent="models:/parent/1")

    (newest,) = (state / "checkpoints").iterdir()
    kept, moments = load_file(newest / "weights.safetensors"), load_file(newest / "moments.safetensors")
    updates = json.loads((newest / "progress.json").read_text())["engine"]["updates"]
    inputs, _ = open_pretrain_inputs(config, {})
    model = build_recommender(config.model, inputs.catalogue.dims, seed=99)
    model.load_state_dict(kept)

    class Loaded(PlainEngine):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            for name, parameter in self.model.named_parameters():
                both = {key: moments[f"{key}/{name}"].clone() for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(float(updates)), **both}

    (tmp_path / "hand").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("antdist.runs.workers.common.PlainEngine", Loaded)
        learn(
            model, inputs, config, world=World(), folder=RunFolder(tmp_path / "hand"), seed=config.seed, name="hand",
            evaluate=pretraining.make_evaluator(config, inputs, World()), tracked=None,
        )  # fmt: skip
    ours, by_hand = weights(tmp_path / "run"), weights(tmp_path / "hand")
    assert ours.keys() == by_hand.keys() and updates > 0
    for name, weight in ours.items():
        assert torch.equal(weight, by_hand[name]), name
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert found is not None
    assert found.document["progress"]["step"] == inputs.stream.steps_per_epoch
    assert found.state.updates == updates + inputs.stream.steps_per_epoch
    assert read_card(tmp_path / "run" / "model").made["parent"] == "models:/parent/1"


def test_continue_notes_how_the_data_changed(world: Path) -> None:
    state = ResolvedModel(world / "runs" / "parent" / "training_state", "models:/parent/1")
    a, b = (open_domain(world / "data" / name) for name in ("a", "b"))
    was, now = a.manifest.ancestors[0][:12], a.fingerprint[:12]
    assert compare_data(state, [a, b]) == {"a": f"a {was} -> {now} (grown)", "b": f"b {b.fingerprint[:12]} (new)"}
    assert compare_data(state, [b]) == {"a": f"a {was} (left out)", "b": f"b {b.fingerprint[:12]} (new)"}
    config = tree(
        world, "later", training={"schedule": {"warmup_steps": 7}}, **{"continue": str(world / "runs" / "parent")}
    )
    (note,) = check_pretrain(config).report.notes
    assert f"a {was} -> {now} (grown)" in note and "begin anew, the latter at 0.001 after 7 steps of warm-up" in note


def test_resume_on_appended_data_suggests_continue(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    state = world / "runs" / "parent" / "training_state"
    with pytest.raises(
        UserError, match=r"domain 'a' was appended to .*[Cc]ontinue from the model .*name=NEW continue=MODEL"
    ):
        train(tree(world, "resumed", resume="runs/parent"), tmp_path / "run", state=state)


def test_continue_refusals(world: Path, tmp_path: Path) -> None:
    parent = str(world / "runs" / "parent")

    def refused(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_pretrain(tree(world, "later", **{"continue": parent, **changes}))
        return str(caught.value)

    assert "give one of the two" in refused(resume=parent)
    assert "model.heads: is 4, but 2 in" in refused(model={"heads": 4})
    assert "model.temperature: is 0.5, but 0.07 in" in refused(model={"temperature": 0.5})
    assert "neither an existing folder nor a reference to a model" in refused(**{"continue": str(tmp_path / "nowhere")})
    assert "no folder training_state here" in refused(**{"continue": str(world / "data")})
    shutil.copytree(world / "runs" / "parent", tmp_path / "copy")
    (tmp_path / "copy" / "training_state" / "model.json").unlink()
    assert "does not record its model and features" in refused(**{"continue": str(tmp_path / "copy")})
    check_pretrain(tree(world, "later", model={"dropout": 0.1}, **{"continue": parent}))

    shutil.copytree(world / "data" / "b", tmp_path / "other" / "b")
    featurize_domains([open_domain(tmp_path / "other" / "b")], text="hashed", text_dim=4, workers=0)
    told = refused(data={"root": str(tmp_path / "other"), "domains": ["b"]})
    assert told.startswith("features: the text features of the domains are from another encoder (text digest=")


def test_resume_uses_the_data_the_run_began_with(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped in mid-epoch, then its data appended to: bit for bit equal to an undisturbed run."""
    monkeypatch.setattr("antdist.runs.workers.common.is_node_leaving", lambda: False)
    for place in ("alone", "grown"):
        for name in ("a", "b"):
            prepare_domain(
                source(tmp_path / place / name, name, range(20), 0, 9), domain=name, out=tmp_path / place / "data"
            )
        features(tmp_path / place / "data", ["a", "b"])
        (tmp_path / place / "run").mkdir()
    train(tree(tmp_path / "alone", "run"), tmp_path / "alone" / "run")
    folder = tmp_path / "grown"
    data = {"a": open_domain(folder / "data" / "a").fingerprint}
    train(tree(folder, "run", training={"stop_after": 3}), folder / "run", data=data)
    grow(folder)
    train(tree(folder, "run"), folder / "run", data=data)
    ours, alone = weights(folder / "run"), weights(tmp_path / "alone" / "run")
    assert all(torch.equal(weight, alone[name]) for name, weight in ours.items())

    (folder / "runs" / "run").mkdir(parents=True)
    (folder / "runs" / "run" / "run.json").write_text(json.dumps({"run_id": "x", "data": data}))
    (note,) = check_pretrain(tree(folder, "run")).report.notes
    assert note.startswith(
        f"domain a was appended to since this run began; the run goes on with the data it began with ({data['a'][:12]})"
    )


@pytest.mark.slow
@pytest.mark.ray
def test_continue_through_ray_and_registry_with_lineage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("a", "b"):
        prepare_domain(
            source(tmp_path / name, name, range(20), 0, 9), domain=name, out=tmp_path / "data", block_users=8
        )
    features(tmp_path / "data", ["a", "b"])
    deepspeed = {"engine": "deepspeed"}
    first = tree(tmp_path, "shop", domains=["a", "b"], training=deepspeed)
    with ray_session(first.ray):
        was = pretrain(first)
        grow(tmp_path)
        with pytest.raises(UserError, match=r"domain 'a' was appended to.*continue=MODEL"):
            pretrain(first.model_copy(update={"name": "elsewhere", "resume": was.model}))
        # under the same name and in the same folder the run goes on with the data it began with
        longer = pretrain(first.model_copy(update={"training": first.training.model_copy(update={"epochs": 3})}))
        start = {"continue": longer.model, "tracking": {"registered_model": "shop"}, "domains": ["a", "b"]}
        with pytest.raises(UserError, match="a run of this name exists with another configuration: continue was None"):
            pretrain(tree(tmp_path, "shop", training=deepspeed, **start))
        later = tree(tmp_path, "later", training={**deepspeed, "stop_after": 2}, **start)
        stopped = pretrain(later)
        done = pretrain(tree(tmp_path, "later", training=deepspeed, **start))

    assert longer.model in ("models:/shop/1", "models:/shop/2") and done.model not in (was.model, longer.model)
    assert longer.run_id == was.run_id and len(longer.history) == 3
    assert done.run_id == stopped.run_id != was.run_id and done.finished == "all epochs done"
    found = resolve(done.model, done.tracking_uri)
    a = open_domain(tmp_path / "data" / "a")
    assert found.tags["parent"] == longer.model
    assert found.tags["continued.a"] == f"a {a.manifest.ancestors[0][:12]} -> {a.fingerprint[:12]} (grown)"
    assert connect(done.tracking_uri).get_run(done.run_id).data.tags["parent"] == longer.model
    lineage = load_overview(done.tracking_uri).lineage[done.model]
    assert lineage[1] == longer.model and a.fingerprint[:8] in lineage[0] and a.manifest.ancestors[0][:8] in lineage[2]
    assert "it stays" in done.champion  # metrics on other data are not compared
    then, now = load_latest(was.folder / "checkpoints"), load_latest(done.folder / "checkpoints")
    assert then is not None and now is not None and now.state.updates > then.state.updates
    assert np.isfinite([entry["loss"] for entry in done.history]).all()


def test_workers_adapt_to_the_target_as_the_driver_opened_it(tmp_path: Path) -> None:
    prepare_domain(source(tmp_path / "a", "a", range(20), 0, 9), domain="a", out=tmp_path / "data", block_users=8)
    before = open_domain(tmp_path / "data/a").fingerprint
    append_to_domain(source(tmp_path / "more", "a", range(20, 25), 9, 6), domain="a", out=tmp_path / "data")
    config = check_config(RelearnConfig, {"target": "a", "data": {"root": str(tmp_path / "data")}})
    settings = AdaptSettings(config, "", RunFolder(tmp_path / "run"), None, before)
    assert open_inputs(settings).domain.fingerprint == before
    with pytest.raises(UserError, match=r"prepared anew since the command started.*was 0123.*another name"):
        open_inputs(replace(settings, fingerprint="0123"))
