"""What `import antdist` offers in a script or notebook: the verbs of the command line as functions.

A configuration is a `PretrainConfig` or `RelearnConfig`, a nested dictionary, the path of a YAML file, or None for the defaults;
`overrides` are `key=value` texts on top of it, as on the command line. Results print as the command line shows them;
`to_frame()` gives their table as a data frame, `to_json()` all of it. A mistake raises `UserError`. Nothing heavy is imported
before a function needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from antdist.errors import Preempted, UserError
from antdist.report import Report

if TYPE_CHECKING:
    from antdist.config.schema import PretrainConfig, RelearnConfig
    from antdist.data.domain import Domain
    from antdist.data.ingest.append import AppendReport
    from antdist.data.ingest.prepare import PrepareReport
    from antdist.data.synthetic.world import WorldReport
    from antdist.data.verify import VerifyReport
    from antdist.features.featurize import FeaturizeReport
    from antdist.jobs.fanout import FanoutResult
    from antdist.jobs.survey import Survey
    from antdist.model.io import ModelCard
    from antdist.planning.calibration import Calibration
    from antdist.planning.report import PlanReport
    from antdist.runs.adapt import AdaptedModel, TrainedTrial
    from antdist.runs.context import CheckReport
    from antdist.runs.pretrain import PretrainedModel
    from antdist.runs.verdict import Judgement
    from antdist.serving.apply import Evaluation, RecommendedItems
    from antdist.serving.loaded import LoadedModel
    from antdist.serving.score import ScoreReport
    from antdist.tracking.overview import Overview
    from antdist.tracking.promotion import Promotion
    from antdist.tracking.pruning import Pruning

    Configuration = PretrainConfig | RelearnConfig

STORAGE = "runs"


# -- data ------------------------------------------------------------------------------------------------------------


def synth(out: str | Path, **options: Any) -> WorldReport:
    """Generate a world of domains below the folder `out`; see `antdist.data.synthetic.world.generate_world` for the options."""
    from antdist.data.synthetic.world import generate_world

    return generate_world(out, **options)


def prepare(
    source: str | Path | None = None, *, domain: str, out: str | Path, append: bool = False, **options: Any
) -> PrepareReport | AppendReport:
    """Read a domain from `source`, filter, order, split and pack it into `out/domain`: shards and a manifest.

    Args:
        source: folder with the source files; `interactions=` and `items=` may name them instead.
        append: add later interactions to a domain that is prepared.
        options: `format`, `interactions`, `items`, `images`, `columns`, `drop_unknown`, `max_bad`, `block_users`; without
            `append` also `k_core`, `max_sequence`, `overwrite`, as `antdist prepare --help` describes them.

    Raises:
        UserError: a source that cannot be read, with file and line; a domain that exists, or with `append` does not.
    """
    if append:
        from antdist.data.ingest.append import append_to_domain

        for option in ("k_core", "max_sequence", "overwrite"):
            if options.pop(option, None):
                raise UserError(
                    "does not go with --append: the filters and data of the domain are kept",
                    where=f"--{option.replace('_', '-')}",
                    remedy="leave it out",
                )
        return append_to_domain(source, domain=domain, out=out, **options)
    from antdist.data.ingest.prepare import prepare_domain

    return prepare_domain(source, domain=domain, out=out, **options)


def verify(domain: str | Path) -> VerifyReport:
    """Check every size, digest, count and reference of a prepared domain and of its features; `problems` lists what is wrong."""
    from antdist.data.verify import verify_domain

    return verify_domain(domain)


def featurize(domains: str | Path | Sequence[str | Path], **options: Any) -> FeaturizeReport:
    """Run frozen encoders over the items of prepared domains, into their feature tables; continues where it stopped.

    Args:
        domains: folders or URIs; domains that will be trained together belong in one call.
        options: `text`, `image`, `price`, `workers` and others, as `antdist featurize --help` describes them.
    """
    from antdist.features.featurize import featurize_domains

    named = [domains] if isinstance(domains, str | Path) else domains
    _check(bool(named), "no domain is named", "featurize", "name prepared domains")
    return featurize_domains([_open(domain) for domain in named], **options)


# -- runs ------------------------------------------------------------------------------------------------------------


def pretrain_config(
    config: PretrainConfig | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()
) -> PretrainConfig:
    """Resolve and check the configuration of a pre-training. Raises UserError that names the first wrong key."""
    from antdist.config.schema import PretrainConfig

    return _resolve(PretrainConfig, config, overrides)


def adapt_config(
    config: RelearnConfig | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()
) -> RelearnConfig:
    """Resolve and check the configuration of an adaptation. Raises UserError that names the first wrong key."""
    from antdist.config.schema import RelearnConfig

    return _resolve(RelearnConfig, config, overrides)


def run_config(
    config: Configuration | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()
) -> Configuration:
    """Resolve and check the configuration of an adaptation if it names a target or a strategy, else of a pre-training."""
    from antdist.config.load import is_relearn, names_target
    from antdist.config.schema import PretrainConfig, RelearnConfig

    if isinstance(config, PretrainConfig | RelearnConfig):
        return _resolve(type(config), config, overrides)
    if isinstance(config, Mapping):
        adapts = is_relearn(dict(config)) or names_target(None, overrides)
    else:
        adapts = names_target(None if config is None else Path(config), overrides)
    return _resolve(RelearnConfig if adapts else PretrainConfig, config, overrides)


def validate(
    config: Configuration | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()
) -> CheckReport:
    """Check all that can be checked before a run: configuration, data, features, sizes, memory, tracking store.

    Raises:
        UserError: the first thing that would stop the run.
    """
    from antdist.config.schema import RelearnConfig
    from antdist.runs.checks import check_pretrain, check_relearn

    resolved = run_config(config, overrides)
    if isinstance(resolved, RelearnConfig):
        return check_relearn(resolved).report
    return check_pretrain(resolved).report


def pretrain(
    config: PretrainConfig | Mapping[str, Any] | str | Path | None = None, overrides: Sequence[str] = ()
) -> PretrainedModel:
    """Pre-train on the auxiliary domains (docs/spec/ant.md, section 5) and register the best epoch's model.

    The same call resumes after a crash. Raises UserError before the cluster is touched if anything would stop the run, and
    Preempted if SIGTERM came and the state is saved.
    """
    from antdist.runs.pretrain import pretrain

    return pretrain(pretrain_config(config, overrides))


@overload
def adapt(
    config: RelearnConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    only: None = None,
) -> AdaptedModel: ...


@overload
def adapt(
    config: RelearnConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    only: Literal["trial", "verdict"],
) -> TrainedTrial | Judgement: ...


def adapt(
    config: RelearnConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    only: Literal["trial", "verdict"] | None = None,
) -> TrainedTrial | Judgement:
    """Adapt a model to one target (docs/spec/ant.md, section 6), judge the transfer, register the model chosen on validation.

    Args:
        only: `trial` trains one strategy with one seed beside others of the target; `verdict` judges and registers trials that
            are trained.

    Returns:
        `AdaptedModel`: the test table (`to_frame()`), the verdict on each strategy, the registered model. With `only`, the trial
        (`TrainedTrial`) or the verdict (`Judgement`, where trials are missing).

    Raises:
        Preempted: SIGTERM came, and the state is saved.
        UserError: whatever would stop the run, before the cluster is touched.
    """
    from antdist.runs.adapt import judge_trials, relearn, train_trial

    _check(only in (None, "trial", "verdict"), f"only is {only!r}", "adapt", "give trial, verdict, or leave it out")
    resolved = adapt_config(config, overrides)
    if only == "trial":
        return train_trial(resolved)
    return judge_trials(resolved) if only == "verdict" else relearn(resolved)


def plan(
    config: Configuration | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    calibration: str | Path | None = None,
    **machine: Any,
) -> PlanReport:
    """Estimate what a run needs: memory a rank, step time, storage, checkpoints, hours, and what limits it first.

    Args:
        calibration: a file that `antdist plan --calibrate --json FILE` wrote on a machine of that kind.
        machine: `gpus`, `workers`, `kind`.
    """
    from antdist.planning.calibration import read_calibration
    from antdist.planning.report import plan_run

    measured = None if calibration is None else read_calibration(Path(calibration))
    return plan_run(run_config(config, overrides), calibration=measured, **machine)


def calibrate() -> Calibration:
    """Measure this machine for `plan`: in about a minute, with the threads that torch is set to."""
    from antdist.planning.calibration import calibrate

    return calibrate()


def fanout(
    config: RelearnConfig | Mapping[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    targets: Sequence[str] | Literal["all"] = "all",
    address: str | None = None,
    parallel: int = 1,
    dry_run: bool = False,
    code: str | None = None,
) -> Survey | FanoutResult:
    """Adapt to many targets: a Ray job a (target, strategy, seed), then one a target that judges and registers.

    Strategies, seeds and the parent are the configuration's. Called again, it does what is missing or failed.

    Args:
        targets: names below `data.root`; `all`: every prepared domain but the parent's auxiliary ones.
        address: http://HEAD:8265; by default RAY_ADDRESS, else a local Ray, started and stopped by this call.
        parallel: jobs at a time.
        dry_run: only check and report what would run.
        code: folder whose package `antdist` the jobs run; by default the one that is imported here.
    """
    from antdist.jobs.fanout import ALL, fanout, make_request, read_targets
    from antdist.jobs.submission import package_root

    _check(parallel >= 1, f"parallel is {parallel}", "fanout", "allow at least one job at a time")
    named = targets if isinstance(targets, str) else ",".join(targets)
    wanted = make_request(adapt_config(config, overrides), None if named.strip() == ALL else read_targets(named))
    return fanout(wanted, address, code=code or package_root(), parallel=parallel, dry_run=dry_run)


# -- models ----------------------------------------------------------------------------------------------------------


def load(
    model: str | Path,
    *,
    domain: str | Path | None = None,
    storage: str | Path = STORAGE,
    tracking_uri: str | None = None,
) -> LoadedModel:
    """Load MODEL with the items that it ranks.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, runs:/ID/PATH or a folder.
        domain: a prepared domain with features, whose items are embedded; by default the catalogue that was registered with
            the model.
        storage: folder of the runs, where the registry is unless `tracking_uri` or MLFLOW_TRACKING_URI name another.

    Raises:
        UserError: no such model; a pre-trained model without a `domain`; features of other encoders.
    """
    from antdist.serving.apply import embed_domain, find_model
    from antdist.serving.loaded import LoadedModel
    from antdist.serving.pyfunc import load_catalogue

    found = find_model(str(model), Path(storage), tracking_uri)
    if domain is None:
        return LoadedModel(found.model, found.card, found.uri, *load_catalogue(found.folder))
    opened = _open(domain)
    embeddings = embed_domain(found.model, found.card, opened)
    return LoadedModel(found.model, found.card, found.uri, opened.item_ids(), embeddings, opened.fingerprint)


def recommend(
    model: str | Path,
    domain: str | Path,
    *,
    user: str | None = None,
    history: Sequence[str] | None = None,
    n: int = 10,
    storage: str | Path = STORAGE,
    tracking_uri: str | None = None,
) -> RecommendedItems:
    """Recommend items of a domain, with titles, for one of its users or for a history of item ids, oldest first.

    Raises:
        UserError: an unknown user or item, with the nearest known ids; neither or both of `user` and `history`.
    """
    from antdist.serving.apply import open_model, recommend_items

    _check(
        (user is None) != (history is None), "it takes either a user or a history", "recommend", "give one of the two"
    )
    _check(n >= 1, f"n is {n}", "recommend", "ask for at least one item")
    opened = open_model(str(model), domain, Path(storage), tracking_uri)
    return recommend_items(opened, user=user, history=history, n=n)


def evaluate(
    model: str | Path,
    domain: str | Path,
    split: Literal["validation", "test"] = "test",
    *,
    storage: str | Path = STORAGE,
    tracking_uri: str | None = None,
) -> Evaluation:
    """Rank the whole catalogue of a prepared domain for the users of a split (docs/spec/ant.md, section 7)."""
    from antdist.serving.apply import Evaluation, evaluate_model, open_model

    _check(split in ("validation", "test"), f"no split {split!r}", "evaluate", "give validation or test")
    figures = evaluate_model(open_model(str(model), domain, Path(storage), tracking_uri), split)
    return Evaluation(str(model), str(domain), split, figures)


def score(
    model: str | Path,
    domain: str | Path,
    out: str | Path,
    *,
    storage: str | Path = STORAGE,
    tracking_uri: str | None = None,
    **options: Any,
) -> ScoreReport:
    """Write the top items of every user of a domain to Parquet files below `out`; called again, it does what is missing.

    Args:
        options: `n`, `include_seen`, `workers`, `batch_size`, `device`, as `antdist score --help` describes them.
    """
    from antdist.serving.apply import find_model
    from antdist.serving.score import score

    opened = _open(domain)
    return score(find_model(str(model), Path(storage), tracking_uri), opened, str(out), **options)


def import_reference(checkpoint: str | Path, out: str | Path, *, heads: int = 2, beta: float = 0.1) -> ModelCard:
    """Convert a checkpoint that the authors' code wrote into a model folder, without running any code in it."""
    from antdist.model.import_reference import import_reference

    return import_reference(checkpoint, out, heads, beta)


def models(name: str = "*", *, storage: str | Path = STORAGE, tracking_uri: str | None = None) -> Overview:
    """List the registered versions: aliases, validation Recall@10, strategy, transfer, lineage.

    Args:
        name: a pattern, such as `relearn-*`.
    """
    from antdist.tracking.overview import load_overview, registry_uri

    return load_overview(registry_uri(Path(storage), tracking_uri), name)


def prune(
    name: str = "*",
    *,
    keep: int = 5,
    dry_run: bool = False,
    storage: str | Path = STORAGE,
    tracking_uri: str | None = None,
) -> Pruning:
    """Remove old versions with their files: all but the newest `keep` of each name, aliases and ancestors apart."""
    from antdist.tracking.overview import registry_uri
    from antdist.tracking.pruning import prune

    _check(keep >= 1, f"keep is {keep}", "prune", "keep at least one version of each name")
    return prune(registry_uri(Path(storage), tracking_uri), pattern=name, keep=keep, dry_run=dry_run)


def promote(
    model: str, alias: str, *, force: bool = False, storage: str | Path = STORAGE, tracking_uri: str | None = None
) -> Promotion:
    """Move an alias to MODEL if its validation Recall@10 beats the holder's for the same task.

    Raises:
        UserError: it does not, and `force` is not given.
    """
    from antdist.tracking.overview import registry_uri
    from antdist.tracking.promotion import promote

    return promote(model, alias, registry_uri(Path(storage), tracking_uri), force=force)


def _open(domain: str | Path) -> Domain:
    from antdist.data.domain import open_domain

    return open_domain(domain)


def _resolve(kind: type[Any], config: Any, overrides: Sequence[str]) -> Any:
    """Build a configuration of `kind` from what a caller may give for one."""
    from antdist.config.load import load_config, resolve_config

    if config is None or isinstance(config, str | Path):
        return load_config(kind, None if config is None else Path(config), overrides)
    if isinstance(config, kind):
        if not overrides:
            return config
        config = config.model_dump(by_alias=True, exclude_unset=True)
    if not isinstance(config, Mapping):
        raise UserError(
            f"{type(config).__name__} is not a configuration",
            where="config",
            remedy=f"give a {kind.__name__}, a dictionary, or the path of a YAML file",
        )
    return resolve_config(kind, dict(config), overrides)


def _check(condition: bool, what: str, where: str, remedy: str) -> None:
    if not condition:
        raise UserError(what, where=where, remedy=remedy)


__all__ = [
    "Preempted",
    "Report",
    "UserError",
    "adapt",
    "adapt_config",
    "calibrate",
    "evaluate",
    "fanout",
    "featurize",
    "import_reference",
    "load",
    "models",
    "plan",
    "prepare",
    "pretrain",
    "pretrain_config",
    "promote",
    "prune",
    "recommend",
    "run_config",
    "score",
    "synth",
    "validate",
    "verify",
]
