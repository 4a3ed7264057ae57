"""Verbs of runs on this machine or from it: validate, plan, pretrain, relearn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from antdist import api
from antdist.cli.options import config_options, json_option, print_report
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
    config = api.run_config(config_file, overrides)
    log.info("checking configuration, data and tracking store")
    print_report(api.validate(config), json_file)


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
    if calibrating:
        log.info("measuring this machine")
        print_report(api.calibrate(), json_file)
        return
    config = api.run_config(config_file, overrides)
    print_report(api.plan(config, calibration=calibration, **machine), json_file)


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
    config = api.pretrain_config(config_file, overrides)
    log.info("checking configuration, data and tracking store")
    print_report(api.pretrain(config), json_file)


@click.command()
@config_options
@click.option(
    "--only",
    type=click.Choice(["trial", "verdict"]),
    help="trial: train one strategy with one seed, beside other trials of the target; verdict: judge and register the "
    "trained trials.",
)
@json_option
def relearn(config_file: Path | None, overrides: Sequence[str], only: Any, json_file: Path | None) -> None:
    """Adapt a model to one target and judge the transfer.

    Keeps the best epoch by validation Recall@10, tests it once, judges whether pre-training helped, and registers a version.
    strategy is scratch, finetune, finetune_all, relearn, a list of them, or auto: all but finetune_all, and the best is kept.

    \b
    Example:
      antdist relearn --config configs/relearn.yaml target=food strategy=auto from=models:/pretrain@champion 'seeds=[0, 1, 2]'
    """
    config = api.adapt_config(config_file, overrides)
    log.info("checking configuration, data and tracking store")
    print_report(api.adapt(config, only=only), json_file)
