"""Verbs of runs on this machine or from it: validate, plan, pretrain, relearn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from antdist.cli.options import config_options, json_option, load_run, print_report
from antdist.io.logs import get_logger

log = get_logger(__name__)


@click.command()
@config_options
@json_option
def validate(config_file: Path | None, overrides: Sequence[str], json_file: Path | None) -> None:
    """Check a run before it starts: data, sizes, memory, store.

    Checks all that can be checked without training: configuration, data, features, sizes, memory, tracking store. A
    configuration with a target is taken for a re-learning, one without for a pre-training.

    \b
    Example:
      antdist validate --config configs/pretrain.yaml data.root=data 'data.domains=[books, music]'
    """
    config = load_run(config_file, overrides)
    log.info("checking configuration, data and tracking store")
    from antdist.config.schema import RelearnConfig
    from antdist.runs.checks import check_pretrain, check_relearn

    context = check_relearn(config) if isinstance(config, RelearnConfig) else check_pretrain(config)
    print_report(context.report, json_file)


@click.command()
@config_options
@click.option("--gpus", type=click.IntRange(0), help="GPUs, one per worker; 0: CPUs. Default: the configuration's.")
@click.option("--workers", type=click.IntRange(1), help="Workers without GPUs. Default: ray.workers.")
@click.option(
    "--gpu",
    "kind",
    type=click.Choice(["h100", "h200", "a100", "l4"]),
    default="h100",
    show_default=True,
    help="Kind of GPU.",
)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="File that --calibrate wrote on a machine of that kind."
)
@click.option(
    "--calibrate",
    "calibrating",
    is_flag=True,
    help="Measure this machine instead, with OMP_NUM_THREADS threads; takes a minute.",
)
@json_option
def plan(
    config_file: Path | None,
    overrides: Sequence[str],
    calibration: Path | None,
    calibrating: bool,
    json_file: Path | None,
    **machine: Any,
) -> None:
    """Estimate memory, step time, storage and hours of a run.

    Also names what limits the run first. For the configuration's own data, and for a pre-training also for the data of the
    paper and for 10 billion interactions.

    \b
    Examples:
      antdist plan --config configs/scale.yaml --gpus 16
      antdist plan --calibrate --json calibration.json
      antdist plan --config configs/pretrain.yaml 'data.domains=[books]' --gpus 0 --workers 2 --calibration calibration.json
    """
    from antdist.planning.calibration import calibrate, read_calibration
    from antdist.planning.report import plan_run

    if calibrating:
        log.info("measuring this machine")
        print_report(calibrate(), json_file)
        return
    config = load_run(config_file, overrides)
    measured = None if calibration is None else read_calibration(calibration)
    print_report(plan_run(config, calibration=measured, **machine), json_file)


@click.command()
@config_options
@json_option
def pretrain(config_file: Path | None, overrides: Sequence[str], json_file: Path | None) -> None:
    """Pre-train on the auxiliary domains and register the model.

    After a crash or training.stop_after, run the same command to continue. resume=MODEL continues a run from the registry.
    continue=MODEL begins a new run with the weights and optimizer state of MODEL, on appended or other domains.

    \b
    Examples:
      antdist pretrain --config configs/pretrain.yaml data.root=data 'data.domains=[books, music]' ray.workers=4
      antdist pretrain --config configs/pretrain.yaml resume=models:/pretrain/latest
      antdist pretrain --config configs/pretrain.yaml name=december continue=models:/pretrain@champion
      antdist pretrain --config configs/pretrain.yaml training.stop_after=20 profile=true   (a trace for Perfetto)
    """
    from antdist.config.load import load_config
    from antdist.config.schema import PretrainConfig

    config = load_config(PretrainConfig, config_file, overrides)
    log.info("checking configuration, data and tracking store")
    from antdist.runs.pretrain import pretrain as run

    print_report(run(config), json_file)


@click.command()
@config_options
@click.option(
    "--only",
    type=click.Choice(["trial", "verdict"]),
    help="trial: train one strategy with one seed, beside other trials of the target; verdict: judge and register the "
    "trained trials.",
)
@json_option
def relearn(config_file: Path | None, overrides: Sequence[str], only: str | None, json_file: Path | None) -> None:
    """Adapt a model to one target and judge the transfer.

    Keeps the best epoch by validation Recall@10, tests it once, judges whether pre-training helped, and registers a version.
    strategy is scratch, finetune, finetune_all, relearn, a list of them, or auto: all but finetune_all, and the best is kept.

    \b
    Example:
      antdist relearn --config configs/relearn.yaml target=food strategy=auto from=models:/pretrain@champion 'seeds=[0, 1, 2]'
    """
    from antdist.config.load import load_config
    from antdist.config.schema import RelearnConfig

    config = load_config(RelearnConfig, config_file, overrides)
    log.info("checking configuration, data and tracking store")
    from antdist.runs import adapt

    if only == "trial":
        print_report(adapt.train_trial(config), json_file)
    elif only == "verdict":
        print_report(adapt.judge_trials(config), json_file)
    else:
        print_report(adapt.relearn(config), json_file)
