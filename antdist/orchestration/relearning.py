"""`antdist relearn`: one target, one strategy or all, several seeds; the verdict and the choice on validation, the test once.

A *trial* is one (strategy, seed): a folder and an MLflow run of its own. All trials of a call share one group of workers.
Or each is trained by a command of its own, beside the others, and a last one concludes (`antdist fanout`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from antdist.config.load import check_config
from antdist.config.schema import RelearnConfig, Strategy
from antdist.errors import Preempted, UserError
from antdist.files import read_json, write_json
from antdist.orchestration.cards import model_card
from antdist.orchestration.checks import check_relearn, check_settings
from antdist.orchestration.inputs import Inputs, open_domains, open_inputs, rank_together
from antdist.orchestration.origins import bring, look_up
from antdist.orchestration.runs import (
    STOP,
    claimed,
    deliver_left,
    ending_runs,
    following,
    for_workers,
    led,
    note_tracked,
    remote_of,
    settling,
    take_up_tracked,
)
from antdist.orchestration.session import enter_worker, ray_session, run_workers, stoppable
from antdist.orchestration.worker import alone, best_model, check_features, learn, save_best
from antdist.progress import say
from antdist.serving.pyfunc import make_servable
from antdist.tracking.registry import Lineage, ResolvedModel, register, resolve
from antdist.tracking.run import TrackedRun, check_known, start_run, stored_run
from antdist.tracking.store import redact, tracking_uri

if TYPE_CHECKING:
    from antdist.data.domain import Domain
    from antdist.evaluation.report import Row
    from antdist.evaluation.results import Run, RunKey
    from antdist.evaluation.significance import Transfer, Verdict
    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender
    from antdist.training.loop import Metrics
    from antdist.training.world import World

AUTO: tuple[Strategy, ...] = ("scratch", "finetune", "relearn")
SPLITS = ("validation", "test")
VERDICT = "verdict.json"  # in the run's folder: what it ended with
Trial = tuple[Strategy, int]  # strategy, seed


@dataclass(frozen=True)
class Parent:
    """The pre-trained model that is adapted."""

    model: Recommender
    card: ModelCard
    uri: str


@dataclass(frozen=True)
class Judged:
    """What the trials show. `rows` are the test table's; `verdicts` those on validation, which decide on promotion."""

    target: str
    seeds: list[int]
    rows: list[Row]
    verdicts: Mapping[Strategy, Verdict]
    folder: Path
    notes: list[str]

    def lines(self) -> list[str]:
        from antdist.evaluation.report import results_table

        return [
            f"test users of {self.target}, best epoch of each trial by validation Recall@10:",
            results_table(self.rows),
            *self.notes,
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "seeds": self.seeds,
            "test": [asdict(row) for row in self.rows],
            "validation verdicts": {strategy: asdict(verdict) for strategy, verdict in self.verdicts.items()},
            "notes": self.notes,
            "folder": str(self.folder),
        }


@dataclass(frozen=True)
class Relearned(Judged):
    """What a call ended with."""

    chosen: Strategy
    model: str  # models:/NAME/VERSION of the chosen strategy's best seed
    champion: str  # what became of that alias, in words
    holder: str | None  # models:/NAME/VERSION that has it
    tracking_uri: str

    def lines(self) -> list[str]:
        return [
            *super().lines(),
            f"chosen on validation: {self.chosen}; registered {self.model} ({self.champion})",
            f"files in {self.folder}; MLflow: {redact(self.tracking_uri)}",
        ]

    def to_json(self) -> dict[str, Any]:
        told = {"chosen": self.chosen, "model": self.model, "champion": self.champion, "holder": self.holder}
        return {**super().to_json(), **told}


@dataclass(frozen=True)
class Trained:
    """A trial that is trained, and not judged yet. `figures`: the metrics on validation and test users."""

    trial: str
    figures: dict[str, Any]

    def lines(self) -> list[str]:
        return [f"{self.trial} is trained: validation Recall@10 {self.figures['validation']['Recall@10']:.4f}"]

    def to_json(self) -> dict[str, Any]:
        return {"trial": self.trial, **self.figures}


def relearn(config: RelearnConfig) -> Relearned:
    """Adapt to `target` (spec, section 6), judge the transfer (section 7), register the model chosen on validation.

    Trials that are finished under the same name are not run again.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: whatever `check_relearn` finds; a run of this name with another configuration, or at work; a loss that
            diverged; trials that `training.stop_after` ended early.
    """
    checked = check_relearn(config)
    checked.say_notes()
    folder = run_folder(config)
    with claimed(folder, shared(config), parts=[trial_folder(folder, *trial) for trial in trials_of(config)]):
        _train(config, folder, checked.start)
        parent = None if checked.start is None else checked.start.uri
        return _conclude(config, folder, store_of(config), _domain(config), parent)


def train_trial(config: RelearnConfig) -> Trained:
    """Train the one trial of `config` and judge nothing, beside commands that train others of the target.

    Raises:
        Preempted: SIGTERM came; the state is saved.
        UserError: more than one trial; whatever `relearn` raises.
    """
    if len(trials_of(config)) != 1:
        raise UserError(
            f"one trial is one strategy and one seed, not {len(trials_of(config))}",
            where="strategy, seeds",
            remedy="name one of each, or leave --only out",
        )
    checked = check_relearn(config)
    checked.say_notes()
    folder = run_folder(config)
    mine = trial_folder(folder, *trials_of(config)[0])
    with claimed(folder, shared(config), parts=[mine], whole=False):
        _train(config, mine, checked.start)
        return Trained(mine.name, read_json(mine / "outcome.json") or {})


def conclude(config: RelearnConfig) -> Judged:
    """Judge the trials that are trained, and train none. Only where all of them are is a model registered (`Relearned`):
    a champion chosen among some would stand in the way of a better one.

    Raises:
        UserError: no strategy has its trials of all seeds; another command is at work on this run.
    """
    check_settings(config)
    domain, folder = _domain(config), run_folder(config)
    trials = trials_of(config)
    with claimed(folder, shared(config), parts=[trial_folder(folder, *trial) for trial in trials]):
        missing = [trial for trial in trials if not is_trained(folder, trial)]
        if not missing:
            parents = [(read_json(trial_folder(folder, *trial) / "run.json") or {})["parent"] for trial in trials]
            parent = next(filter(None, parents), None)
            return _conclude(config, folder, store_of(config), domain, parent)
        whole = [s for s in strategies_of(config) if s not in {strategy for strategy, _ in missing}]
        if not whole:
            raise UserError("no strategy is trained with all seeds", where=folder, remedy="train the trials first")
        runs = _pooled(config, folder, whole)
        note = f"not registered, as these are not trained: {', '.join(f'{s}-seed{seed}' for s, seed in missing)}"
        return _judge(config, folder, runs, [note])


def run_folder(config: RelearnConfig) -> Path:
    return Path(config.ray.storage).resolve() / config.name / str(config.target)


def store_of(config: RelearnConfig) -> str:
    return tracking_uri(config.tracking, Path(config.ray.storage).resolve())


def shared(config: RelearnConfig) -> RelearnConfig:
    """What all trials of a run have in common: strategies, seeds and parents are their own."""
    return config.model_copy(update={"strategy": "auto", "seeds": [0], "parent": None})


def is_trained(folder: Path, trial: Trial) -> bool:
    outcome = read_json(trial_folder(folder, *trial) / "outcome.json")
    return outcome is not None and "error" not in outcome


def _domain(config: RelearnConfig) -> Domain:
    return open_domains(config.data, [config.target or ""], "target")[0]


def _train(config: RelearnConfig, desk: Path, parent: ResolvedModel | None) -> None:
    """Train the trials of `config` that are not trained. At `desk`, the run's folder or a trial's, command and workers tell
    each other how it goes."""
    folder, uri, trials = run_folder(config), store_of(config), trials_of(config)
    parent_uri = None if parent is None else parent.uri
    fingerprint = _domain(config).fingerprint
    for strategy, seed in trials:
        _open_trial(config, strategy, seed, folder, uri, lineage_of(config, fingerprint, strategy, parent_uri))
    outcomes = [trial_folder(folder, *trial) / "outcome.json" for trial in trials]
    preempted = desk / "preempted.json"
    if all(outcome.is_file() for outcome in outcomes):
        say("all trials are finished: nothing is trained")
    else:
        with settling(folder):
            place = bring(config.parent, parent, folder) if config.parent and parent else None
        settings = {
            "config": for_workers(config),
            "uri": uri,
            "folder": str(folder),
            "desk": str(desk),
            "parent": {"folder": str(place), "uri": parent_uri} if place else None,
        }
        preempted.unlink(missing_ok=True)
        trial_folders = [outcome.parent for outcome in outcomes]
        name = "-".join(desk.relative_to(folder.parents[1]).parts)
        with ending_runs(uri, trial_folders), ray_session(config.ray), following(desk), stoppable(desk / STOP):
            run_workers(relearn_worker, settings, config.ray, name, config.training.hang)
        if told := read_json(preempted):
            raise Preempted(told["preempted"])
    deliver_left(uri, [outcome.parent for outcome in outcomes if outcome.is_file()])
    _refuse_unfinished(outcomes)


def _refuse_unfinished(outcomes: list[Path]) -> None:
    """Raises UserError if trials diverged (they are tried again by the next start) or were ended early."""
    errors = {outcome: error for outcome in outcomes if (error := (read_json(outcome) or {}).get("error"))}
    for outcome in errors:
        outcome.unlink()
    for error in errors.values():
        raise UserError(
            error["what"],
            where=error["where"],
            remedy="lower training.learning_rate, set training.clip, or run in fp32; and choose another name",
        )
    stopped = [outcome.parent.name for outcome in outcomes if not outcome.is_file()]
    if stopped:
        raise UserError(
            f"ended early: {', '.join(stopped)}",
            where="training.stop_after",
            remedy="the same command goes on; without the key to the end",
        )


def strategies_of(config: RelearnConfig) -> list[Strategy]:
    """The strategies that a call runs, in the order in which they win ties."""
    if config.strategy == "auto":
        return list(AUTO)
    if isinstance(config.strategy, list):
        return [strategy for strategy in get_args(Strategy) if strategy in config.strategy]
    return [config.strategy]


def trials_of(config: RelearnConfig) -> list[Trial]:
    return [(strategy, seed) for strategy in strategies_of(config) for seed in config.seeds]


def trial_folder(folder: Path, strategy: Strategy, seed: int) -> Path:
    return folder / f"{strategy}-seed{seed}"


def find_parent(config: RelearnConfig, uri: str, tell: Callable[[str], None]) -> ResolvedModel | None:
    """Where the model lies that `from` names, or None.

    Raises:
        UserError: as `look_up`; a strategy needs one and none is named.
    """
    from antdist.training.adaptation import needs_parent

    if config.parent is None:
        if needing := [strategy for strategy in strategies_of(config) if needs_parent(strategy)]:
            raise UserError(
                f"strategy {needing[0]} starts from a pre-trained model",
                where="from",
                remedy="give one, e.g. from=models:/NAME/latest",
            )
        return None
    return look_up(config.parent, uri, run_folder(config), resolve, offline_ok=config.tracking.offline_ok, tell=tell)


def open_parent(found: ResolvedModel | None) -> Parent | None:
    """The pre-trained model in memory."""
    from antdist.model.io import load_model

    if found is None:
        return None
    model, card = load_model(found.folder)
    return Parent(model, card, found.uri)


def parent_notes(config: RelearnConfig, parent: Parent) -> list[str]:
    """What a user should know of this parent for this target, though it may be adapted."""
    from antdist.training.adaptation import treatments

    notes = []
    if config.target in parent.card.domains:
        notes.append(f"the target {config.target} is one of the parent's auxiliary domains: its gain is no transfer")
    if any(treatments(strategy)["theta"].inherited for strategy in strategies_of(config)):
        unknown = [modality for modality in parent.card.dims if modality not in parent.card.features]
        if unknown:
            notes.append(f"{parent.uri} does not say which encoders made its {', '.join(unknown)} features: see to it")
    return notes


def relearn_inputs(config: RelearnConfig, strategy: Strategy, parent: Parent | None) -> Inputs:
    """The target's data as a strategy reads them: of `model.modalities` those that the parent has, of its encoders, where
    the item tower is inherited; else those that the target has."""
    from antdist.features.table import Catalogue
    from antdist.training.adaptation import treatments

    domains = open_domains(config.data, [config.target or ""], "target")
    if parent is not None and treatments(strategy)["theta"].inherited:
        identities = {m: source.identity for m, source in parent.card.features.items()}
        shared = [m for m in parent.card.dims if m in config.model.modalities]
        if not shared:
            raise UserError(
                f"the parent reads {', '.join(parent.card.dims)} and nothing else",
                where="model.modalities",
                remedy="name one of these, or choose strategy=relearn",
            )
        dims: dict[str, int] = {modality: parent.card.dims[modality] for modality in shared}
        catalogue = Catalogue(domains, shared, config.data.feature_dtype, dims=dims, identities=identities)
    else:
        catalogue = Catalogue(domains, available(config, domains[0]), config.data.feature_dtype)
    return open_inputs(
        domains,
        catalogue,
        config.stream,
        max_length=config.model.max_length,
        seed=config.seeds[0],
        workers=config.ray.workers,
        accumulation=config.training.accumulation,
    )


def available(config: RelearnConfig, domain: Domain) -> list[str]:
    """Those of `model.modalities` that the target has. Raises UserError if it has none."""
    from antdist.features.table import table_if_any

    tables = {modality: table_if_any(domain, modality) for modality in config.model.modalities}
    kept: list[str] = [modality for modality, table in tables.items() if table is not None and table.meta.present]
    if not kept:
        raise UserError(
            f"{domain.name} has none of {', '.join(config.model.modalities)}",
            where="model.modalities",
            remedy=f"run `antdist featurize {domain.folder}`, or name a modality that it has",
        )
    return kept


def lineage_of(config: RelearnConfig, fingerprint: str, strategy: Strategy, parent: str | None) -> Lineage:
    from antdist.training.adaptation import needs_parent

    assert config.target is not None
    inherited = parent if needs_parent(strategy) else None
    return Lineage({config.target: fingerprint}, target=config.target, strategy=strategy, parent=inherited)


def _open_trial(config: RelearnConfig, strategy: Strategy, seed: int, folder: Path, uri: str, lineage: Lineage) -> None:
    """A trial's folder and MLflow run, kept over restarts."""
    mine = trial_folder(folder, strategy, seed)
    mine.mkdir(parents=True, exist_ok=True)
    known = take_up_tracked(mine, config, uri)
    refuse_other_origin(mine, known, lineage)
    if known is not None and known["run_id"] is not None:
        note_tracked(mine, config, known)  # to a copy that is new
        if not (mine / "outcome.json").is_file():
            check_known(uri, known["run_id"])
        return
    shown = {**config.model_dump(mode="json", by_alias=True), "strategy": strategy, "seeds": [seed]}
    name = f"{config.name}-{config.target}-{strategy}-seed{seed}"
    tags = {**lineage.tags(), "seed": str(seed)}
    tracked = start_run(
        uri, config.tracking.experiment, name, mine, config=shown, tags=tags, offline_ok=config.tracking.offline_ok
    )
    tracked.finish(status=None)
    note_tracked(mine, config, {"run_id": tracked.run_id, "parent": lineage.parent})


def refuse_other_origin(trial: Path, known: Mapping[str, Any] | None, lineage: Lineage) -> None:
    """Raises UserError if a trial, of which `run.json` tells what is `known`, began with another parent, or if the target was
    prepared anew since it ended: its result is not one on these data."""
    from antdist.evaluation.results import load_ranks

    if known is not None and known["parent"] != lineage.parent:
        raise UserError(
            f"this trial started from {known['parent']}, not from {lineage.parent}",
            where=trial,
            remedy="choose another name=..., name that parent, or remove the folder",
        )
    if not (trial / "validation.npz").is_file():
        return
    key = load_ranks(trial / "validation.npz").key
    if lineage.fingerprints != {key.target: key.manifest}:
        raise UserError(
            f"this trial ended on other data of {key.target} (fingerprint {key.manifest[:12]})",
            where=trial,
            remedy="choose another name=..., or remove the folder to train it on those that are there",
        )


# -- the worker ------------------------------------------------------------------------------------------------------


def relearn_worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: all trials of the call that are not finished, one after the other."""
    config = check_config(RelearnConfig, settings["config"])
    enter_worker(config.ray.cpus_per_worker)

    from antdist.training.world import agree, current_world

    world, folder, desk = current_world(), Path(settings["folder"]), Path(settings["desk"])
    told = settings["parent"]
    parent = open_parent(None if told is None else ResolvedModel(Path(told["folder"]), told["uri"]))
    with alone(world, desk):
        for strategy, seed in trials_of(config):
            mine = trial_folder(folder, strategy, seed)
            if agree(world, (mine / "outcome.json").is_file()):
                continue
            try:
                with led(mine) if world.leader and mine != desk else contextlib.nullcontext():
                    _run_trial(config, strategy, seed, mine, desk, parent, world, settings["uri"])
            except Preempted as preempted:
                if world.leader:
                    write_json(desk / "preempted.json", {"preempted": str(preempted)})
                return


def _run_trial(
    config: RelearnConfig,
    strategy: Strategy,
    seed: int,
    folder: Path,
    desk: Path,
    parent: Parent | None,
    world: World,
    uri: str,
) -> None:
    from antdist.training.loop import Diverged

    tracked = None
    if world.leader:
        run_id = (read_json(folder / "run.json") or {})["run_id"]
        tracked = TrackedRun(uri, run_id, folder, resumed=True)
    outcome, status = None, "FAILED"
    try:
        outcome = _train_trial(config, strategy, seed, folder, desk, parent, world, tracked)
        status = "FINISHED" if outcome is not None else "KILLED"
    except Preempted:
        status = "KILLED"
        raise
    except Diverged as error:  # on all ranks alike: a restart by Ray would only repeat it
        outcome = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
    finally:
        if tracked is not None:
            tracked.finish(status)
    if world.leader and outcome is not None:
        write_json(folder / "outcome.json", outcome)


def _train_trial(
    config: RelearnConfig,
    strategy: Strategy,
    seed: int,
    folder: Path,
    desk: Path,
    parent: Parent | None,
    world: World,
    tracked: Any,
) -> dict[str, Any] | None:
    from antdist.evaluation import ranking
    from antdist.evaluation.metrics import summary
    from antdist.evaluation.results import Run, save_ranks
    from antdist.training.adaptation import adapt

    # the order of examples, the noise and the fresh weights are all of the trial's seed
    inputs = relearn_inputs(config.model_copy(update={"seeds": [seed]}), strategy, parent)
    check_features(inputs.catalogue)
    model = adapt(
        strategy,
        config.model,
        inputs.catalogue.dims,
        parent=parent.model if parent else None,
        variants=config.variants,
        catalogue_size=inputs.catalogue.size if config.model.item_embeddings else None,
        means=inputs.catalogue.means() if config.model.initial_shift == "mean" else None,
        seed=seed,
    )
    sequences, longest = inputs.domains[0].sequences(), config.model.max_length
    watched = ranking.validation_queries(sequences, longest, limit=config.training.validation_users, seed=0)
    my_watched = watched.shard(world.rank, world.size)

    def evaluate(candidate: Recommender) -> Metrics:
        found = summary(rank_together(candidate, inputs.catalogue, 0, my_watched, world))
        return {name: value for name, value in found.items() if "@" in name}

    progress = learn(
        model,
        inputs,
        loss=config.loss,
        training=config.training,
        world=world,
        folder=folder,
        seed=seed,
        name=f"{config.target} {strategy} seed {seed}",
        evaluate=evaluate,
        tracked=tracked,
        log_folder=desk,
        remote=remote_of(folder, config.ray) if world.leader else None,
        profile=config.profile,
    )
    if progress.finished is None:
        return None
    best = best_model(model, folder, progress, world)
    queries = {
        "validation": ranking.validation_queries(sequences, longest),
        "test": ranking.test_queries(sequences, longest),
    }
    outcome: dict[str, Any] = {"epoch": progress.best_epoch, "epochs": progress.epoch, "finished": progress.finished}
    for split in SPLITS:
        ranks = rank_together(best, inputs.catalogue, 0, queries[split].shard(world.rank, world.size), world)
        outcome[split] = summary(ranks)
        if world.leader:
            save_ranks(folder / f"{split}.npz", Run(_key(config, inputs, seed, split), [ranks]))
    if tracked is not None:
        tracked.log({f"best/{s}/{name}": value for s in SPLITS for name, value in outcome[s].items()}, progress.step)
    origin = {"parent": parent.uri if parent else None, "fingerprint": inputs.domains[0].fingerprint}
    card = model_card(
        "adapted",
        config.model,
        inputs,
        seed=seed,
        domains=parent.card.domains if parent else [],
        made={**outcome, **origin},
        target=config.target,
        strategy=strategy,
    )
    save_best(best, folder / "model", card, world)
    return outcome


# -- the conclusion --------------------------------------------------------------------------------------------------


def _key(config: RelearnConfig, inputs: Inputs, seed: int, split: Any) -> RunKey:
    """What a trial's result may be compared with: same target, encoders, budget; features that the target lacks do not
    count, as they are zero for every strategy."""
    from antdist.evaluation.results import RunKey, budget_digest

    domain = inputs.domains[0]
    present = available(config, domain)
    return RunKey(
        target=domain.name,
        manifest=domain.fingerprint,
        features={m: inputs.catalogue.identities[m] for m in present if m in inputs.catalogue.identities},
        seeds=(seed,),
        epochs=config.training.epochs,
        budget=budget_digest(config),
        split=split,
    )


def _pooled(config: RelearnConfig, folder: Path, strategies: list[Strategy]) -> dict[tuple[str, str], Run]:
    """What trials reached, by strategy and split, with all seeds."""
    from antdist.evaluation.results import load_ranks, pool

    return {
        (strategy, split): pool([load_ranks(trial_folder(folder, strategy, s) / f"{split}.npz") for s in config.seeds])
        for strategy in strategies
        for split in SPLITS
    }


def _judge(config: RelearnConfig, folder: Path, runs: Mapping[tuple[str, str], Run], notes: list[str]) -> Judged:
    from antdist.evaluation.report import results_row
    from antdist.evaluation.significance import judge

    scratch = {split: runs.get(("scratch", split)) or _known_scratch(folder, config, split) for split in SPLITS}
    if scratch["test"] is None:
        say(f"no scratch trials with the same seeds in {folder}: the transfer is unknown (strategy=scratch makes them)")
    strategies = [s for s in strategies_of(config) if (s, "test") in runs]
    verdicts: dict[Strategy, Verdict] = {
        s: judge(runs[s, "validation"], scratch["validation"]) for s in strategies if s != "scratch"
    }
    rows = [
        results_row(s, runs[s, "test"], None if s == "scratch" else judge(runs[s, "test"], scratch["test"]))
        for s in strategies
    ]
    return Judged(str(config.target), config.seeds, rows, verdicts, folder, notes)


def _conclude(config: RelearnConfig, folder: Path, uri: str, domain: Domain, parent_uri: str | None) -> Relearned:
    from antdist.evaluation.significance import metric_of

    strategies = strategies_of(config)
    runs = _pooled(config, folder, strategies)
    judged = _judge(config, folder, runs, [])
    verdicts = judged.verdicts
    validation = {s: float(metric_of(runs[s, "validation"], "Recall@10").mean()) for s in strategies}
    chosen, promote = choose(validation, {strategy: verdict.transfer for strategy, verdict in verdicts.items()})
    per_seed = metric_of(runs[chosen, "validation"], "Recall@10").mean(1)
    seed = runs[chosen, "validation"].key.seeds[int(np.argmax(per_seed))]  # pooled runs are in the order of their seeds
    mine = trial_folder(folder, chosen, seed)
    transfer = verdicts[chosen].transfer if chosen in verdicts else "ground truth"
    notes = [
        f"{s} reached {validation[s]:.4f} on validation, {chosen} {validation[chosen]:.4f}; its transfer is {verdicts[s].transfer}"
        for s in strategies
        if validation[s] > validation[chosen]
    ]
    if not promote:
        notes.append(f"not promoted: on validation the transfer of {chosen} is {transfer}")
    seen = int(runs[chosen, "test"].ranks[0].seen.sum())
    notes.append(f"{seen} of {len(runs[chosen, 'test'].ranks[0].users)} test targets stood in the history: misses")
    make_servable(mine / "model", domain)
    version = register(
        uri,
        stored_run(uri, (read_json(mine / "run.json") or {})["run_id"], mine),
        mine / "model",
        config.tracking.registered_model or f"{config.name}-{config.target}",
        lineage_of(config, domain.fingerprint, chosen, parent_uri),
        validation=float(per_seed.max()),
        promote=promote,
        tags={"transfer": transfer, "seed": str(seed), "seeds": " ".join(map(str, config.seeds))},
    )
    doubted = next((s for s in verdicts if s == version.holder_strategy and verdicts[s].transfer != "positive"), None)
    if doubted is not None and promote:  # it won with other seeds, and by more than this model reaches
        notes.append(
            f"{version.holder}, a {doubted} model, stays champion by its validation, but with these seeds the transfer of "
            f"{doubted} is {verdicts[doubted].transfer}: `antdist promote {version.uri} champion --force` moves it"
        )
    done = Relearned(
        judged.target, judged.seeds, judged.rows, verdicts, folder, notes,
        chosen=chosen, model=version.uri, champion=version.champion, holder=version.holder, tracking_uri=uri,
    )  # fmt: skip
    write_json(folder / VERDICT, done.to_json())
    return done


def choose(validation: Mapping[Strategy, float], transfers: Mapping[Strategy, Transfer]) -> tuple[Strategy, bool]:
    """The strategy whose model is registered, and whether it may become champion.

    Transfer must show that it helps: the best on validation is taken from `scratch` and those whose transfer is positive.
    Where neither is at hand it is the best of all, and not promoted. The first wins a tie.

    Args:
        validation: Recall@10 on validation of each strategy that ran.
        transfers: the verdicts on all of them but `scratch`.
    """
    sound = [s for s in validation if s == "scratch" or transfers[s] == "positive"]
    return max(sound or validation, key=lambda s: validation[s]), bool(sound)


def _known_scratch(folder: Path, config: RelearnConfig, split: str) -> Run | None:
    """The `scratch` trials that this run's folder holds from an earlier call, if for all of the same seeds."""
    from antdist.evaluation.results import load_ranks, pool

    files = [trial_folder(folder, "scratch", seed) / f"{split}.npz" for seed in config.seeds]
    return pool([load_ranks(file) for file in files]) if all(file.is_file() for file in files) else None
