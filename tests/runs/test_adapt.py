"""Negative or insignificant transfer is not chosen over training from scratch, and never promoted."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from antdist.config.load import check_config
from antdist.config.schema import RelearnConfig, TrackingConfig
from antdist.errors import UserError
from antdist.evaluation.ranking import Ranks
from antdist.evaluation.results import Run, RunKey, save_ranks
from antdist.io.files import write_json
from antdist.runs import adapt as relearning
from antdist.runs.adapt import _begin_trial, _register_chosen, refuse_unfinished, train_trial
from antdist.runs.context import AdaptContext, CheckReport
from antdist.runs.folder import RunFolder
from antdist.runs.lineage import lineage_of
from antdist.runs.records import TrialResult
from antdist.runs.trials import Trial, trials_of
from antdist.runs.verdict import AdaptedModel, choose_strategy
from antdist.tracking.resolve import resolve
from antdist.tracking.run import start_run
from antdist.tracking.store import tracking_uri


@pytest.mark.parametrize(
    ("validation", "transfers", "chosen", "promoted"),
    [
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "positive"}, "relearn", True),
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "none"}, "scratch", True),  # the gain may be chance
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "unknown"}, "scratch", True),  # not comparable
        ({"scratch": 0.10, "relearn": 0.08}, {"relearn": "negative"}, "scratch", True),
        (
            {"scratch": 0.10, "finetune": 0.13, "relearn": 0.12},
            {"finetune": "none", "relearn": "positive"},
            "relearn",
            True,
        ),
        (
            {"scratch": 0.10, "finetune": 0.13, "relearn": 0.12},
            {"finetune": "positive", "relearn": "positive"},
            "finetune",
            True,
        ),
        (
            {"relearn": 0.12},
            {"relearn": "positive"},
            "relearn",
            True,
        ),  # compared with scratch trials of an earlier command
        ({"relearn": 0.12}, {"relearn": "none"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "negative"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "unknown"}, "relearn", False),
        ({"scratch": 0.10}, {}, "scratch", True),
        ({"scratch": 0.10, "relearn": 0.10}, {"relearn": "positive"}, "scratch", True),
    ],
)
def test_only_positive_transfer_is_chosen_over_scratch(
    validation: dict[Any, float], transfers: dict[Any, Any], chosen: str, promoted: bool
) -> None:
    assert choose_strategy(validation, transfers) == (chosen, promoted)


def test_strategies_run_in_the_order_in_which_they_win_ties() -> None:
    config = check_config(RelearnConfig, {"strategy": ["relearn", "scratch"], "seeds": [1, 0]})
    trials = [(trial.strategy, trial.seed) for trial in trials_of(config)]
    assert trials == [("scratch", 1), ("scratch", 0), ("relearn", 1), ("relearn", 0)]
    for strategies in ([], ["scratch", "scratch"]):
        with pytest.raises(UserError, match="must name at least one strategy, and each once"):
            check_config(RelearnConfig, {"strategy": strategies})
    for wrong in ("magic", ["scratch", "magic"]):
        with pytest.raises(UserError, match="configuration: strategy: input should be 'scratch', 'finetune'"):
            check_config(RelearnConfig, {"strategy": wrong})


def test_train_trial_refuses_several_trials() -> None:
    for changes in ({"seeds": [0, 1]}, {"strategy": "auto"}):
        config = check_config(RelearnConfig, {"target": "t", "strategy": "scratch", **changes})
        with pytest.raises(UserError, match="strategy, seeds: one trial is one strategy and one seed, not "):
            train_trial(config)


USERS = 200
PARENT = "models:/parent/1"


def trial(uri: str, folder: Path, strategy: Any, hits: int, seed: int = 0) -> None:
    """A finished trial whose model puts the targets of the first `hits` users among the ten best."""
    files = RunFolder(folder).trial(strategy, seed)
    mine = files.path
    run = start_run(uri, "e", strategy, mine)
    assert run.finish() is None
    write_json(mine / "run.json", {"run_id": run.run_id, "parent": None if strategy == "scratch" else PARENT})
    (mine / "model").mkdir()
    (mine / "model" / "weights").write_text(f"{strategy} {seed} {hits}")
    ranks = Ranks(np.arange(USERS), np.where(np.arange(USERS) < hits, 1, 99), np.zeros(USERS, bool))
    for split in ("validation", "test"):
        key = RunKey(target="t", manifest="f", features={}, seeds=(seed,), epochs=1, budget="b", split=split)
        save_ranks(files.ranks_file(split), Run(key, [ranks]))


def context_of(uri: str, folder: Path, strategy: str, seeds: tuple[int, ...] = (0,)) -> AdaptContext:
    """An adaptation in `folder`, which is STORAGE/NAME/t."""
    tree = {"name": folder.parent.name, "target": "t", "strategy": strategy, "seeds": list(seeds)}
    config = check_config(RelearnConfig, {**tree, "ray": {"storage": str(folder.parents[1])}})
    domain: Any = SimpleNamespace(fingerprint="f")
    return AdaptContext(config, uri, RunFolder(folder), None, CheckReport(), domain)


def conclude(uri: str, folder: Path, strategy: str, seeds: tuple[int, ...] = (0,)) -> AdaptedModel:
    with pytest.MonkeyPatch.context() as patch:  # the trials' models are text files
        patch.setattr(relearning, "make_servable", lambda folder, domain: None)
        return _register_chosen(context_of(uri, folder, strategy, seeds), PARENT)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    return tracking_uri(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), folder)


def test_insignificant_gain_leaves_scratch_champion(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "chance" / "t"
    for strategy, hits in (("scratch", 60), ("finetune", 40), ("relearn", 62)):
        trial(uri, folder, strategy, hits)
    done = conclude(uri, folder, "auto")
    assert done.verdicts["relearn"].transfer == "none" and done.chosen == "scratch"
    assert "relearn reached 0.3100 on validation, scratch 0.3000; its transfer is none" in done.notes
    assert resolve("models:/chance-t@champion", uri).tags["strategy"] == "scratch"
    alone = conclude(uri, folder, "relearn")  # with the same scratch trials at hand, and a better metric
    assert alone.chosen == "relearn" and "not promoted: on validation the transfer of relearn is none" in alone.notes
    assert resolve(alone.model, uri).tags["transfer"] == "none"
    assert resolve("models:/chance-t@champion", uri).tags["strategy"] == "scratch"


def test_significant_gain_makes_the_champion(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "gain" / "t"
    for strategy, hits in (("scratch", 60), ("finetune", 40), ("relearn", 80)):
        trial(uri, folder, strategy, hits)
    done = conclude(uri, folder, "auto")
    assert (done.chosen, done.verdicts["relearn"].transfer) == ("relearn", "positive")
    champion = resolve("models:/gain-t@champion", uri)
    assert (champion.uri, champion.tags["parent"]) == (done.model, PARENT)
    harmed = conclude(uri, folder, "finetune")
    assert harmed.verdicts["finetune"].transfer == "negative" and "kept from being champion" in harmed.champion
    assert resolve("models:/gain-t@champion", uri).uri == done.model


def test_champion_refuted_by_more_seeds_is_noted(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "doubt" / "t"
    hits = {"scratch": (60, 78), "finetune": (20, 20), "relearn": (80, 40)}
    for strategy, seed in itertools.product(hits, (0, 1)):
        trial(uri, folder, strategy, hits[strategy][seed], seed)
    first = conclude(uri, folder, "auto")
    assert first.holder == first.model and not any("stays champion" in note for note in first.notes)
    more = conclude(uri, folder, "auto", (0, 1))
    assert (more.chosen, more.holder) == ("scratch", first.model)
    assert (
        f"{first.model}, a relearn model, stays champion by its validation, but with these seeds the transfer of relearn is "
        f"negative: `antdist promote {more.model} champion --force` moves it"
    ) in more.notes


def test_without_scratch_nothing_becomes_champion(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "alone" / "t"
    trial(uri, folder, "relearn", 80)
    assert conclude(uri, folder, "relearn").verdicts["relearn"].transfer == "unknown"
    with pytest.raises(UserError, match="has no alias 'champion'"):
        resolve("models:/alone-t@champion", uri)


def test_trial_on_older_data_is_refused_before_training(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "older" / "t"
    trial(uri, folder, "scratch", 60)
    context = context_of(uri, folder, "scratch")
    (scratch,) = context.trials
    _begin_trial(context, scratch, lineage_of(scratch, "f", None))
    with pytest.raises(UserError, match=r"scratch-seed0: this trial ended on other data of t \(fingerprint f\)"):
        _begin_trial(context, scratch, lineage_of(scratch, "prepared anew", None))


def test_diverged_trials_are_trained_again(tmp_path: Path) -> None:
    trials = [Trial("t", "scratch", seed, RunFolder(tmp_path).trial("scratch", seed)) for seed in range(3)]
    for number, trial in enumerate(trials):
        error = {"error": {"what": f"diverged {number}", "where": "w", "remedy": "r"}}
        trial.folder.path.mkdir()
        TrialResult.model_validate(error if number < 2 else {"epoch": 1}).write(trial.folder.result_file)
    with pytest.raises(UserError, match="w: diverged 0"):
        refuse_unfinished(trials)
    assert [trial.folder.result_file.is_file() for trial in trials] == [False, False, True]
