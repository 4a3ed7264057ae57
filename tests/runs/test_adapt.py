"""Transfer that does not help is not preferred to training from scratch, and never promoted."""

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
from antdist.runs.adapt import Relearned, _conclude, _refuse_unfinished, train_trial
from antdist.runs.trials import trial_folder, trials_of
from antdist.runs.verdict import choose
from antdist.runs.workers.trial import _open_trial
from antdist.tracking.registry import Lineage, resolve
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
        ({"relearn": 0.12}, {"relearn": "positive"}, "relearn", True),  # against scratch trials of an earlier command
        ({"relearn": 0.12}, {"relearn": "none"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "negative"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "unknown"}, "relearn", False),
        ({"scratch": 0.10}, {}, "scratch", True),
        ({"scratch": 0.10, "relearn": 0.10}, {"relearn": "positive"}, "scratch", True),
    ],
)
def test_transfer_must_show_that_it_helps(
    validation: dict[Any, float], transfers: dict[Any, Any], chosen: str, promoted: bool
) -> None:
    assert choose(validation, transfers) == (chosen, promoted)


def test_several_strategies_are_taken_in_the_order_in_which_they_win_ties() -> None:
    config = check_config(RelearnConfig, {"strategy": ["relearn", "scratch"], "seeds": [1, 0]})
    assert trials_of(config) == [("scratch", 1), ("scratch", 0), ("relearn", 1), ("relearn", 0)]
    for strategies in ([], ["scratch", "scratch"]):
        with pytest.raises(UserError, match="must name at least one strategy, and each once"):
            check_config(RelearnConfig, {"strategy": strategies})
    for wrong in ("magic", ["scratch", "magic"]):
        with pytest.raises(UserError, match="configuration: strategy: input should be 'scratch', 'finetune'"):
            check_config(RelearnConfig, {"strategy": wrong})


def test_a_trial_is_one() -> None:
    for changes in ({"seeds": [0, 1]}, {"strategy": "auto"}):
        config = check_config(RelearnConfig, {"target": "t", "strategy": "scratch", **changes})
        with pytest.raises(UserError, match="strategy, seeds: one trial is one strategy and one seed, not "):
            train_trial(config)


USERS = 200
PARENT = "models:/parent/1"


def trial(uri: str, folder: Path, strategy: Any, hits: int, seed: int = 0) -> None:
    """A finished trial whose model puts the targets of the first `hits` users among the ten best."""
    mine = trial_folder(folder, strategy, seed)
    run = start_run(uri, "e", strategy, mine)
    assert run.finish() is None
    write_json(mine / "run.json", {"run_id": run.run_id, "parent": None if strategy == "scratch" else PARENT})
    (mine / "model").mkdir()
    (mine / "model" / "weights").write_text(f"{strategy} {seed} {hits}")
    ranks = Ranks(np.arange(USERS), np.where(np.arange(USERS) < hits, 1, 99), np.zeros(USERS, bool))
    for split in ("validation", "test"):
        key = RunKey(target="t", manifest="f", features={}, seeds=(seed,), epochs=1, budget="b", split=split)
        save_ranks(mine / f"{split}.npz", Run(key, [ranks]))


def conclude(uri: str, folder: Path, strategy: str, seeds: tuple[int, ...] = (0,)) -> Relearned:
    asked = {"name": folder.name, "target": "t", "strategy": strategy, "seeds": list(seeds)}
    config = check_config(RelearnConfig, asked)
    domain: Any = SimpleNamespace(fingerprint="f")
    with pytest.MonkeyPatch.context() as patch:  # the trials' models are no models
        patch.setattr(relearning, "make_servable", lambda folder, domain: None)
        return _conclude(config, folder, uri, domain, PARENT)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    return tracking_uri(TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"), folder)


def test_a_gain_that_may_be_chance_leaves_scratch_the_champion(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "chance"
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


def test_a_gain_that_is_no_chance_makes_the_champion(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "gain"
    for strategy, hits in (("scratch", 60), ("finetune", 40), ("relearn", 80)):
        trial(uri, folder, strategy, hits)
    done = conclude(uri, folder, "auto")
    assert (done.chosen, done.verdicts["relearn"].transfer) == ("relearn", "positive")
    champion = resolve("models:/gain-t@champion", uri)
    assert (champion.uri, champion.tags["parent"]) == (done.model, PARENT)
    harmed = conclude(uri, folder, "finetune")
    assert harmed.verdicts["finetune"].transfer == "negative" and "kept from being champion" in harmed.champion
    assert resolve("models:/gain-t@champion", uri).uri == done.model


def test_a_champion_whose_gain_more_seeds_do_not_show_is_told(uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "doubt"
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
    folder = tmp_path / "alone"
    trial(uri, folder, "relearn", 80)
    assert conclude(uri, folder, "relearn").verdicts["relearn"].transfer == "unknown"
    with pytest.raises(UserError, match="has no alias 'champion'"):
        resolve("models:/alone-t@champion", uri)


def test_a_trial_that_ended_on_older_data_is_refused_before_others_are_trained(uri: str, tmp_path: Path) -> None:
    trial(uri, tmp_path, "scratch", 60)
    config = check_config(RelearnConfig, {"target": "t", "strategy": "scratch"})
    _open_trial(config, "scratch", 0, tmp_path, uri, Lineage({"t": "f"}, target="t", strategy="scratch"))
    anew = Lineage({"t": "prepared anew"}, target="t", strategy="scratch")
    with pytest.raises(UserError, match=r"scratch-seed0: this trial ended on other data of t \(fingerprint f\)"):
        _open_trial(config, "scratch", 0, tmp_path, uri, anew)


def test_all_trials_that_diverged_are_tried_again(tmp_path: Path) -> None:
    outcomes = [tmp_path / name for name in ("a", "b", "c")]
    for number, outcome in enumerate(outcomes):
        told = {"error": {"what": f"diverged {number}", "where": "w", "remedy": "r"}} if number < 2 else {"epoch": 1}
        write_json(outcome, told)
    with pytest.raises(UserError, match="w: diverged 0"):
        _refuse_unfinished(outcomes)
    assert [outcome.is_file() for outcome in outcomes] == [False, False, True]
