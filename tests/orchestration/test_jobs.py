"""The main job on a local Ray: DeepSpeed workers, the registry, resuming through it, re-learning, the verdict."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from antdist.cli import cli
from antdist.config.load import check_config
from antdist.config.schema import PretrainConfig, RayConfig, RelearnConfig
from antdist.errors import UserError
from antdist.model.io import read_card
from antdist.orchestration.pretraining import Pretrained, pretrain
from antdist.orchestration.relearning import relearn
from antdist.orchestration.session import ray_session
from antdist.serving.use import evaluate_model, open_model, recommend_items
from antdist.tracking.registry import resolve
from antdist.tracking.store import connect
from tests.worlds import make_domains

pytestmark = pytest.mark.ray

AUXILIARY = ["aa", "bbb", "cccc"]
SMALL_MODEL = {"dim": 16, "inner": 16, "experts": 2, "max_length": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    make_domains(folder / "data", [*AUXILIARY, "target"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_session(RayConfig(workers=2)):
            yield folder


def pretrain_config(world: Path, name: str, **changes: Any) -> PretrainConfig:
    tree: dict[str, Any] = {
        "name": name,
        "data": {"root": str(world / "data"), "domains": AUXILIARY},
        "model": {**SMALL_MODEL, **changes.pop("model", {})},
        "stream": {"batch_size": 200},
        "training": {"epochs": 2, "log_every": 1, **changes.pop("training", {})},
        "ray": {"workers": changes.pop("workers", 2), "storage": str(world / "runs"), "max_failures": 0},
        **changes,
    }
    return check_config(PretrainConfig, tree)


def relearn_config(world: Path, **changes: Any) -> RelearnConfig:
    tree: dict[str, Any] = {
        "name": "adapt",
        "target": "target",
        "strategy": "auto",
        "data": {"root": str(world / "data")},
        "model": SMALL_MODEL,
        "stream": {"batch_size": 200},
        "training": {"epochs": 2},
        "seeds": [0, 1],
        "ray": {"workers": 2, "storage": str(world / "runs"), "max_failures": 0},
        **changes,
    }
    return check_config(RelearnConfig, tree)


@pytest.fixture(scope="module")
def pretrained(world: Path) -> Pretrained:
    return pretrain(pretrain_config(world, "straight"))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "weights.safetensors")


def curve(run: Pretrained, metric: str = "train/loss") -> list[tuple[int, float]]:
    points = connect(run.tracking_uri).get_metric_history(run.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_pretraining_registers_a_model_with_lineage_curves_and_state(world: Path, pretrained: Pretrained) -> None:
    assert pretrained.model == "models:/straight/1" and pretrained.finished == "all epochs done"
    found = resolve("models:/straight@champion", pretrained.tracking_uri)
    assert found.uri == pretrained.model and found.tags["task"].startswith("pretrain:")
    card = read_card(found.folder)
    assert card.domains == AUXILIARY and card.dims == {"text": 12, "image": 10, "price": 6}
    steps = [step for step, _ in curve(pretrained)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 4
    assert len(curve(pretrained, "validation/Recall_at_10")) == 2
    run = connect(pretrained.tracking_uri).get_run(pretrained.run_id)
    assert run.data.params["training.epochs"] == "2" and run.info.status == "FINISHED"


def test_a_run_resumed_through_the_registry_alone_equals_the_uninterrupted_one(
    world: Path, pretrained: Pretrained
) -> None:
    """Law 3, with the first run's folder deleted: optimizer, schedule and stream come from the registered state."""
    first = pretrain(pretrain_config(world, "parts", training={"stop_after": 3}))
    assert first.finished is None
    shutil.rmtree(first.folder)
    second = pretrain(pretrain_config(world, "parts", resume="models:/parts/latest"))
    assert (second.model, second.finished) == ("models:/parts/2", "all epochs done")
    assert second.run_id == first.run_id
    assert curve(second) == curve(pretrained)
    straight, resumed = weights(pretrained.folder / "model"), weights(second.folder / "model")
    for name, weight in straight.items():
        np.testing.assert_array_equal(resumed[name], weight, err_msg=name)


def test_two_workers_equal_one_with_the_same_global_batch(world: Path) -> None:
    """Law 2, through Ray and DeepSpeed; no noise, as it is drawn a rank."""
    quiet = {"mixture": False, "dropout": 0.0}
    one = pretrain(pretrain_config(world, "one", model=quiet, workers=1))
    two = pretrain(pretrain_config(world, "two", model=quiet, workers=2))
    for (step, loss), (other_step, other) in zip(curve(one), curve(two), strict=True):
        assert step == other_step
        assert loss == pytest.approx(other, rel=1e-5)


def test_all_strategies_are_judged_and_one_is_chosen_on_validation(world: Path, pretrained: Pretrained) -> None:
    done = relearn(relearn_config(world, **{"from": pretrained.model}))
    assert [row.strategy for row in done.rows] == ["scratch", "finetune", "relearn"]
    assert all(row.verdict is not None and row.verdict.transfer != "unknown" for row in done.rows[1:])
    found = resolve(done.model, done.tracking_uri)
    assert found.tags["target"] == "target" and found.tags["strategy"] == done.chosen
    assert found.tags.get("parent") == (None if done.chosen == "scratch" else pretrained.model)
    table = "\n".join(done.lines())
    assert "Recall@10 to scratch" in table and "chosen on validation" in table
    # what the table says of a strategy is what evaluating its model says
    card = read_card(found.folder)
    assert card.strategy == done.chosen and card.seed in (0, 1)
    figures = evaluate_model(open_model(done.model, world / "data" / "target", world / "runs"), "test")
    assert figures["Recall@10"] == pytest.approx(card.made["test"]["Recall@10"])
    # run again: nothing is trained, the same conclusion, no new version
    assert relearn(relearn_config(world, **{"from": pretrained.model})).model == done.model


def test_the_frozen_transformer_is_the_parents_and_the_tower_is_not(world: Path, pretrained: Pretrained) -> None:
    relearn(relearn_config(world, strategy="relearn", seeds=[0], **{"from": pretrained.model}))
    parent, adapted = weights(pretrained.folder / "model"), weights(world / "runs/adapt/target/relearn-seed0/model")
    for name, weight in adapted.items():
        same = name in parent and parent[name].shape == weight.shape and np.array_equal(parent[name], weight)
        assert same == name.startswith("encoder."), name


def test_without_scratch_the_verdict_is_unknown_and_nothing_is_promoted(world: Path, pretrained: Pretrained) -> None:
    done = relearn(relearn_config(world, name="alone", strategy="relearn", **{"from": pretrained.model}))
    assert done.rows[0].verdict is not None and done.rows[0].verdict.transfer == "unknown"
    assert "kept from being champion" in done.champion
    with pytest.raises(UserError, match="has no alias 'champion'"):
        resolve("models:/alone-target@champion", done.tracking_uri)


def test_folders_may_be_relative_to_where_the_command_runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    config = pretrain_config(world, "relative", training={"epochs": 1})
    data, ray = config.data.model_copy(update={"root": "data"}), config.ray.model_copy(update={"storage": "runs"})
    done = pretrain(config.model_copy(update={"data": data, "ray": ray}))
    assert done.folder == world / "runs" / "relative"


def test_a_diverged_run_says_so_without_a_traceback(world: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is nan since step \d+"):
        pretrain(pretrain_config(world, "diverged", training={"learning_rate": 1e30}))


def test_another_configuration_under_the_same_name_is_refused(world: Path, pretrained: Pretrained) -> None:
    with pytest.raises(UserError, match=r"another configuration: training.learning_rate was 0.001, is 0.5"):
        pretrain(pretrain_config(world, "straight", training={"learning_rate": 0.5}))


def test_recommend_in_words_from_the_command_line(world: Path, pretrained: Pretrained) -> None:
    arguments = ["recommend", pretrained.model, str(world / "data/target"), "--storage", str(world / "runs")]
    told = CliRunner().invoke(cli, [*arguments, "--user", "user-3", "-n", "4"], catch_exceptions=False).output
    assert told.count("thing ") >= 4 + 3 and "  4  " in told
    opened = open_model(pretrained.model, world / "data/target", world / "runs")
    past, best = recommend_items(opened, user=None, history="target-3,target-5", n=5)
    assert [item.item_id for item in past] == ["target-3", "target-5"]
    assert len(best) == 5 and not {"target-3", "target-5"} & {item.item_id for item in best}
    with pytest.raises(UserError, match=r"no item 'target-99'.*[Dd]id you mean target-"):
        recommend_items(opened, user=None, history="target-99", n=5)
