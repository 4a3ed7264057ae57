"""Verbs of a Ray cluster: submit, fanout, jobs, logs, stop, resume."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from antdist import api
from antdist.cli.data import featurize, prepare
from antdist.cli.options import address_option, code_options, config_options, json_option, print_report
from antdist.cli.runs import pretrain, relearn
from antdist.cli.use import evaluate, score

if TYPE_CHECKING:
    from antdist.jobs.client import Cluster

SUBMITTABLE = {
    "pretrain": pretrain,
    "relearn": relearn,
    "evaluate": evaluate,
    "featurize": featurize,
    "prepare": prepare,
    "score": score,
}


def _code(working_dir: Path | None, installed: bool) -> str:
    from antdist.jobs.submission import INSTALLED, package_root

    if installed and working_dir is not None:
        raise click.UsageError("give either --working-dir or --installed")
    return INSTALLED if installed else str((working_dir or Path(package_root())).resolve())


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("verb", type=click.Choice(list(SUBMITTABLE)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF THE VERB]...")
@address_option
@code_options
@click.option("--wait", is_flag=True, help="Follow the job's log to its end, and exit with its code.")
def submit(
    verb: str, arguments: Sequence[str], address: str | None, working_dir: Path | None, installed: bool, wait: bool
) -> None:
    """Run a verb as a Ray job.

    Checks first what can be checked here, then sends code and configuration. With neither --address nor RAY_ADDRESS the job
    runs on a local Ray, which this command starts, waits for and stops. For a cluster that requires a token, set
    RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH.

    \b
    Examples:
      antdist submit pretrain --config configs/scale.yaml data.root=/shared/data ray.storage=/shared/runs --address http://head:8265
      antdist submit featurize /shared/data/books /shared/data/music --text hashed --address http://head:8265
      antdist submit relearn --config configs/relearn.yaml target=food from=models:/pretrain@champion   (a local Ray)
    """
    from antdist.jobs.client import Cluster, submit_to_local_ray
    from antdist.jobs.submission import read_submission

    code = _code(working_dir, installed)
    here = not (address or os.environ.get("RAY_ADDRESS"))
    submission = read_submission(SUBMITTABLE[verb], arguments, here=here, code=code)
    if here:
        sys.exit(submit_to_local_ray(submission).code)
    cluster = Cluster(address)
    job = cluster.submit(submission)
    _print_job(cluster, job, wait)


def _print_job(cluster: Cluster, job: str, wait: bool) -> None:
    for line in cluster.describe(job):
        click.echo(line)
    if wait:
        sys.exit(cluster.follow(job).code)


@click.command()
@config_options
@click.option(
    "--targets", required=True, help="Comma-separated domains below data.root, or all: those the parent did not see."
)
@click.option(
    "--strategies", help="scratch, finetune, finetune_all, relearn, comma-separated. Default: the configuration's."
)
@click.option("--seeds", help="Such as 0-4 or 0,2,5. Default: the configuration's.")
@click.option("--from", "parent", metavar="MODEL", help="Model to adapt. Default: the configuration's.")
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Jobs that run at a time.")
@click.option("--dry-run", is_flag=True, help="Only check, and print what would run.")
@address_option
@code_options
@json_option
def fanout(
    config_file: Path | None,
    overrides: Sequence[str],
    targets: str,
    address: str | None,
    working_dir: Path | None,
    installed: bool,
    json_file: Path | None,
    dry_run: bool,
    parallel: int,
    **choice: Any,
) -> None:
    """Adapt to many targets, with one Ray job per trial.

    Runs a job per (target, strategy, seed), --parallel at a time, then one per target that judges and registers, and ends
    with the transfer table. Exits with 1 if jobs are left. Run again, it runs what is missing or failed and follows jobs that
    are still running. With neither --address nor RAY_ADDRESS it starts a local Ray and stops it at the end.

    \b
    Example:
      antdist fanout --config configs/relearn.yaml --targets food,arts --strategies scratch,finetune,relearn --seeds 0-4 \\
        --from models:/pretrain@champion --parallel 8 data.root=/shared/data ray.storage=/shared/runs --address http://head:8265
    """
    from antdist.jobs.fanout import read_request

    code = _code(working_dir, installed)
    wanted = read_request(config_file, overrides, targets, **choice)
    report = api.fanout(
        wanted.config,
        targets="all" if wanted.targets is None else wanted.targets,
        address=address,
        parallel=parallel,
        dry_run=dry_run,
        code=code,
    )
    print_report(report, json_file)
    if report.left and not dry_run:
        sys.exit(1)


@click.command()
@address_option
@click.option("--all", "everything", is_flag=True, help="Finished jobs too.")
def jobs(address: str | None, everything: bool) -> None:
    """List the jobs of a cluster with their progress.

    Prints state, run, step, rate, loss, time left and MLflow run of waiting and running jobs. Progress is read from the run's
    folder, so it is blank where this machine does not see ray.storage.

    \b
    Example:
      antdist jobs --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    for line in Cluster(address).table(everything):
        click.echo(line)


@click.command()
@click.argument("job")
@address_option
@click.option("-f", "--follow", is_flag=True, help="Follow the log to the job's end, and exit with its code.")
def logs(job: str, address: str | None, follow: bool) -> None:
    """Print or follow the log of a job.

    \b
    Example:
      antdist logs pretrain-books-1f2e3d -f --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    if follow:
        sys.exit(Cluster(address).follow(job).code)
    click.echo(Cluster(address).logs(job), nl=False)


@click.command()
@click.argument("job")
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a job after it has saved its state.

    Training saves a checkpoint first. Returns when the job has stopped.

    \b
    Example:
      antdist stop pretrain-books-1f2e3d --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    cluster = Cluster(address)
    ended = cluster.stop(job)
    click.echo(f"{job}: {ended.state}")
    click.echo(f"last line of its log: {cluster.last_line(job)}")


@click.command()
@click.argument("job")
@address_option
@click.option("--wait", is_flag=True, help="Follow the job's log to its end, and exit with its code.")
def resume(job: str, address: str | None, wait: bool) -> None:
    """Submit a stopped or failed job again.

    Its run continues from the last checkpoint.

    \b
    Example:
      antdist resume pretrain-books-1f2e3d --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    cluster = Cluster(address)
    _print_job(cluster, cluster.resume(job), wait)
