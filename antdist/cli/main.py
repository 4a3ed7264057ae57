"""The command line: one verb a stage of the flow; parses, calls, prints. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import click

from antdist import __version__
from antdist.errors import Preempted, UserError, redact
from antdist.io.logs import setup_logging

if TYPE_CHECKING:
    from antdist.jobs.client import Cluster

EXIT_USER_ERROR = 2
STANDARD_OUTPUT = Path("-")
# what a user mends outside of antdist: permissions, a full or read-only disk
THE_MACHINES = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Printable(Protocol):
    """What a verb returns: lines for people, a document for programs."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="antdist")
def cli() -> None:
    """Pre-train a multi-modal recommender on many domains, re-learn it for each target, and know whether it helped.

    \b
    The usual way:
      antdist prepare SRC --domain books --out data        (for each domain)
      antdist featurize data/books data/music ...
      antdist pretrain --config configs/pretrain.yaml 'data.domains=[books, music]'
      antdist relearn --config configs/relearn.yaml target=food strategy=auto from=models:/pretrain@champion
      antdist recommend models:/relearn-food@champion data/food --user U42
    """


def main() -> NoReturn:
    """Entry point: a user's mistake is one line on standard error and exit code 2, never a traceback."""
    setup_logging()
    try:
        cli(standalone_mode=False)
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno not in THE_MACHINES:
            raise
        _refuse(f"{error.filename or 'file system'}: {error.strerror}.")
    except Preempted as preempted:
        click.echo(preempted, err=True)
        sys.exit(Preempted.EXIT_CODE)
    except click.exceptions.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(0)


def _refuse(message: str) -> NoReturn:
    click.secho("error: ", fg="red", err=True, nl=False)
    click.echo(message, err=True)
    sys.exit(EXIT_USER_ERROR)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json FILE` for verbs that measure."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
        callback=_writable,
        help="Write the figures to FILE too; -: as one last line of standard output.",
    )(command)


def _writable(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    """Told before hours of work, not after them."""
    if file is not None and file != STANDARD_OUTPUT:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", where=file, remedy="name another --json") from None
    return file


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--config F` and `key=value ...`."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        help="YAML file; see configs/. Without: the defaults.",
    )(command)


def tell(report: Printable, json_file: Path | None = None) -> None:
    """Print the report, and write its document where asked."""
    for line in report.lines():
        click.echo(line)
    write_document(report.to_json(), json_file)


def write_document(document: dict[str, Any], json_file: Path | None) -> None:
    if json_file == STANDARD_OUTPUT:
        click.echo(json.dumps(document, default=str))
    elif json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


class Place(click.Path):
    """A folder, or a URI, which stays as it is."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


def _a_folder(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """What is prepared is written to a folder."""
    if ":/" in str(path):  # a path has but one slash of a URI's two
        raise UserError("is a URI", where=path, remedy="write to a folder, and copy that folder there")
    return path


# -- data ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), callback=_a_folder)
@click.option(
    "--domains", default="4", show_default=True, help="How many, or their names with commas; the last is the target."
)
@click.option("--users", default=3000, show_default=True, help="Users of each auxiliary domain.")
@click.option("--items", default=600, show_default=True, help="Items of each auxiliary domain.")
@click.option("--target-users", default=800, show_default=True)
@click.option("--target-items", default=400, show_default=True)
@click.option("--mean-length", default=14.0, show_default=True, help="Mean interactions of a user.")
@click.option(
    "--missing", default=0.04, show_default=True, help="Share of items that lack a text; likewise picture, price."
)
@click.option("--images/--no-images", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
def synth(out: Path, domains: str, images: bool, json_file: Path | None, **sizes: Any) -> None:
    """Generate a world of domains below OUT: texts, drawn pictures, prices, and users whose order can be learned.

    \b
    Example:
      antdist synth world --users 2000 --seed 7
    """
    from antdist.data.synthetic.world import generate_world

    names: int | list[str] = int(domains) if domains.isdigit() else [name.strip() for name in domains.split(",")]
    tell(generate_world(out, domains=names, with_images=images, **sizes), json_file)


@cli.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format", "form", type=click.Choice(["tabular", "amazon", "atomic"]), default="tabular", show_default=True
)
@click.option("--domain", required=True, help="Name of the domain: the folder made below --out.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), callback=_a_folder)
@click.option(
    "--interactions", type=click.Path(path_type=Path), help="Instead of SRC: the file of interactions (or reviews)."
)
@click.option("--items", type=click.Path(path_type=Path), help="Instead of SRC: the file of items (or metadata).")
@click.option("--images", type=click.Path(path_type=Path), help="amazon: a folder of pictures ASIN.jpg or ASIN_1.jpg.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="tabular: a column's name in the file.")
@click.option("--k-core", type=click.IntRange(1), help="Keep users and items with so many interactions. Default: off.")
@click.option(
    "--max-sequence", type=click.IntRange(3), help="Cut users to their most recent interactions. Default: off."
)
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of a file's records that may be bad: they are left out, and listed in quarantine.jsonl.",
)
@click.option("--drop-unknown", is_flag=True, help="Drop interactions with items that the items file lacks.")
@click.option(
    "--block-users", type=click.IntRange(1), default=1024, show_default=True, help="Users a block of a shard."
)
@click.option("--overwrite", is_flag=True, help="Replace a prepared domain of that name.")
@click.option("--append", "appending", is_flag=True, help="Add SRC to a prepared domain of that name.")
@json_option
def prepare(
    source: Path | None, form: Any, columns: Sequence[str], appending: bool, json_file: Path | None, **options: Any
) -> None:
    """Read a domain from SRC, filter, order, split and pack it into OUT/DOMAIN: WebDataset shards and a manifest.

    With --append SRC holds later days: their interactions, and items where there are new ones. Old shards stay untouched.

    \b
    Examples:
      antdist prepare exports/shop --domain shop --out data --k-core 5
      antdist prepare --interactions buys.csv --items items.parquet --column user_id=customer --domain shop --out data
      antdist prepare amazon/ --format amazon --domain gifts --out data
      antdist prepare exports/monday --domain shop --out data --append
    """
    from antdist.data.ingest.append import append_to_domain
    from antdist.data.ingest.prepare import prepare_domain

    if appending:
        for option in ("k_core", "max_sequence", "overwrite"):
            if options.pop(option):
                name = f"--{option.replace('_', '-')}"
                raise UserError(
                    "does not go with --append: what is there stays as it is", where=name, remedy="leave it out"
                )
        tell(append_to_domain(source, format=form, columns=_mapping(columns, "--column"), **options), json_file)
        return
    tell(prepare_domain(source, format=form, columns=_mapping(columns, "--column"), **options), json_file)


def _mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    mapping = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise UserError(f"{pair!r} is not of the form OURS=THEIRS", where=option, remedy="write user_id=customer")
        mapping[ours] = theirs
    return mapping


@cli.command()
@click.argument("domain", type=Place(path_type=Path))
@json_option
def verify(domain: str | Path, json_file: Path | None) -> None:
    """Check every size, digest, count and reference of the prepared domain DATA/NAME (or URI), and of its features.

    Exits with 1 if anything is wrong.

    \b
    Examples:
      antdist verify data/shop
      antdist verify s3://bucket/data/shop
    """
    from antdist.data.verify import verify_domain

    report = verify_domain(domain)
    tell(report, json_file)
    if report.problems:
        sys.exit(1)


@cli.command()
@click.argument("domains", nargs=-1, required=True, type=Place(path_type=Path))
@click.option("--text", metavar="ENCODER", help="hashed, minilm, or a transformers encoder: a name or a folder.")
@click.option("--image", metavar="ENCODER", help="histogram, or a transformers vision model: a name or a folder.")
@click.option("--price", type=click.Choice(["raw", "minmax", "log", "quantile"]), help="The scale of prices.")
@click.option("--pooling", type=click.Choice(["cls", "mean"]), help="Of a text encoder. Default: cls; mean for minilm.")
@click.option("--max-length", default=256, type=click.IntRange(1), show_default=True, help="Tokens of a text.")
@click.option("--text-dim", default=128, type=click.IntRange(1), show_default=True, help="Dimension of hashed.")
@click.option("--projection", type=click.Path(path_type=Path), help="hashed: a fitted file, or where to put it.")
@click.option("--max-images", default=4, type=click.IntRange(1), show_default=True, help="Pictures averaged an item.")
@click.option(
    "--max-bad",
    type=click.FloatRange(0, 1),
    default=0.001,
    show_default=True,
    help="Share of pictures that may be broken.",
)
@click.option("--batch-size", default=64, type=click.IntRange(1), show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--workers",
    default=2,
    type=click.IntRange(0),
    show_default=True,
    help="Ray actors; 0: this process alone, without Ray.",
)
@json_option
def featurize(domains: Sequence[str | Path], json_file: Path | None, **options: Any) -> None:
    """Run frozen encoders over the items of prepared domains, into their feature tables; goes on where it stopped.

    Domains that will be trained together belong in one call: hashed text is fitted on all of them.

    \b
    Examples:
      antdist featurize data/* --text hashed --image histogram --price quantile
      antdist featurize data/shop --text google-bert/bert-base-uncased --image microsoft/swin-base-patch4-window7-224
    """
    from antdist.data.domain import open_domain
    from antdist.features.featurize import featurize_domains

    tell(featurize_domains([open_domain(domain) for domain in domains], **options), json_file)


# -- runs ------------------------------------------------------------------------------------------------------------


@cli.command()
@config_options
@json_option
def validate(config_file: Path | None, overrides: Sequence[str], json_file: Path | None) -> None:
    """Check all that can be checked before a run: configuration, data, features, sizes, memory, tracking store.

    A configuration with a `target` is taken for re-learning, one without for pre-training.

    \b
    Example:
      antdist validate --config configs/pretrain.yaml data.root=data 'data.domains=[books, music]'
    """
    from antdist.config.load import load_config, names_target
    from antdist.config.schema import PretrainConfig, RelearnConfig
    from antdist.runs.checks import check_pretrain, check_relearn

    if names_target(config_file, overrides):
        tell(check_relearn(load_config(RelearnConfig, config_file, overrides)).report, json_file)
    else:
        tell(check_pretrain(load_config(PretrainConfig, config_file, overrides)).report, json_file)


@cli.command()
@config_options
@click.option(
    "--gpus", type=click.IntRange(0), help="GPUs, one a worker; 0: CPUs. Default: what the configuration asks for."
)
@click.option("--workers", type=click.IntRange(1), help="Workers where there is no GPU. Default: ray.workers.")
@click.option("--gpu", "kind", type=click.Choice(["h100", "h200", "a100", "l4"]), default="h100", show_default=True)
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="What --calibrate wrote, on a machine of that kind."
)
@click.option(
    "--calibrate",
    "calibrating",
    is_flag=True,
    help="Measure this machine instead, with OMP_NUM_THREADS threads: a minute.",
)
@json_option
def plan(
    config_file: Path | None,
    overrides: Sequence[str],
    calibration: Path | None,
    calibrating: bool,
    json_file: Path | None,
    **asked: Any,
) -> None:
    """Tell on paper what a run needs: memory a rank, step time, storage, checkpoints, hours, and what limits it first.

    For the configuration's own data, and for a pre-training besides those of the paper and 10 billion interactions.

    \b
    Examples:
      antdist plan --config configs/scale.yaml --gpus 16
      antdist plan --calibrate --json calibration.json
      antdist plan --config configs/pretrain.yaml 'data.domains=[books]' --gpus 0 --workers 2 --calibration calibration.json
    """
    from antdist.config.load import load_config, names_target
    from antdist.config.schema import PretrainConfig, RelearnConfig
    from antdist.planning.calibration import calibrate, read_calibration
    from antdist.planning.report import plan_run

    if calibrating:
        tell(calibrate(), json_file)
        return
    config: RelearnConfig | PretrainConfig
    if names_target(config_file, overrides):
        config = load_config(RelearnConfig, config_file, overrides)
    else:
        config = load_config(PretrainConfig, config_file, overrides)
    measured = None if calibration is None else read_calibration(calibration)
    tell(plan_run(config, calibration=measured, **asked), json_file)


@cli.command()
@config_options
@json_option
def pretrain(config_file: Path | None, overrides: Sequence[str], json_file: Path | None) -> None:
    """Pre-train on the auxiliary domains; ends with a registered model version.

    The same command goes on after a crash or training.stop_after; resume=MODEL goes on from the registry.
    continue=MODEL begins another run with MODEL's weights and optimizer state, on domains that have grown or are others.

    \b
    Examples:
      antdist pretrain --config configs/pretrain.yaml data.root=data 'data.domains=[books, music]' ray.workers=4
      antdist pretrain --config configs/pretrain.yaml resume=models:/pretrain/latest
      antdist pretrain --config configs/pretrain.yaml name=december continue=models:/pretrain@champion
      antdist pretrain --config configs/pretrain.yaml training.stop_after=20 profile=true   (a trace for Perfetto)
    """
    from antdist.config.load import load_config
    from antdist.config.schema import PretrainConfig
    from antdist.runs.pretrain import pretrain as run

    tell(run(load_config(PretrainConfig, config_file, overrides)), json_file)


@cli.command()
@config_options
@click.option(
    "--only",
    type=click.Choice(["trial", "verdict"]),
    help="trial: train one strategy with one seed, beside others of the target; verdict: judge and register what is trained.",
)
@json_option
def relearn(config_file: Path | None, overrides: Sequence[str], only: str | None, json_file: Path | None) -> None:
    """Adapt to one target: best epoch by validation Recall@10, one test, the verdict on transfer, a registered version.

    strategy is scratch, finetune, finetune_all, relearn, several of them, or auto: run all but finetune_all and take the best.

    \b
    Example:
      antdist relearn --config configs/relearn.yaml target=food strategy=auto from=models:/pretrain@champion 'seeds=[0, 1, 2]'
    """
    from antdist.config.load import load_config
    from antdist.config.schema import RelearnConfig
    from antdist.runs.adapt import judge_trials, train_trial
    from antdist.runs.adapt import relearn as run

    config = load_config(RelearnConfig, config_file, overrides)
    if only == "trial":
        tell(train_trial(config), json_file)
    elif only == "verdict":
        tell(judge_trials(config), json_file)
    else:
        tell(run(config), json_file)


# -- cluster ---------------------------------------------------------------------------------------------------------

address_option = click.option("--address", metavar="URL", help="http://HEAD:8265. Default: RAY_ADDRESS.")


def code_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which code a job runs."""
    command = click.option("--installed", is_flag=True, help="Send no code: the cluster has antdist installed.")(
        command
    )
    return click.option(
        "--working-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Send the package antdist in DIR. Default: the one that runs here.",
    )(command)


def _code(working_dir: Path | None, installed: bool) -> str:
    from antdist.jobs.submission import INSTALLED, own_code

    if installed and working_dir is not None:
        raise click.UsageError("give either --working-dir or --installed")
    return INSTALLED if installed else str((working_dir or Path(own_code())).resolve())


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("verb", type=click.Choice(["pretrain", "relearn", "evaluate", "featurize", "prepare", "score"]))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS OF THE VERB]...")
@address_option
@code_options
@click.option("--wait", is_flag=True, help="Follow the job's log to its end; exit as it does.")
def submit(
    verb: str, arguments: Sequence[str], address: str | None, working_dir: Path | None, installed: bool, wait: bool
) -> None:
    """Submit a verb as a Ray job, with code and configuration; checks first what can be checked here.

    With neither --address nor RAY_ADDRESS it runs on a local Ray, started and stopped by this command, which then waits.
    A cluster that asks for a token is told by RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, as Ray has it.

    \b
    Examples:
      antdist submit pretrain --config configs/scale.yaml data.root=/shared/data ray.storage=/shared/runs --address http://head:8265
      antdist submit featurize /shared/data/books /shared/data/music --text hashed --address http://head:8265
      antdist submit relearn --config configs/relearn.yaml target=food from=models:/pretrain@champion   (a local Ray)
    """
    from antdist.jobs.client import Cluster, submit_here
    from antdist.jobs.submission import read_submission

    code = _code(working_dir, installed)
    here = not (address or os.environ.get("RAY_ADDRESS"))
    submission = read_submission(cli.commands[verb], arguments, here=here, code=code)
    if here:
        sys.exit(submit_here(submission).code)
    cluster = Cluster(address)
    job = cluster.submit(submission)
    _tell_job(cluster, job, wait)


def _tell_job(cluster: Cluster, job: str, wait: bool) -> None:
    for line in cluster.told(job):
        click.echo(line)
    if wait:
        sys.exit(cluster.follow(job).code)


@cli.command()
@config_options
@click.option(
    "--targets", required=True, help="Domains below data.root with commas; all: but the parent's auxiliary ones."
)
@click.option(
    "--strategies", help="scratch, finetune, finetune_all, relearn, with commas. Default: the configuration's."
)
@click.option("--seeds", help="Such as 0-4 or 0,2,5. Default: the configuration's.")
@click.option("--from", "parent", metavar="MODEL", help="The model to adapt. Default: the configuration's.")
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Jobs at a time.")
@click.option("--dry-run", is_flag=True, help="Only check, and tell what would run.")
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
    **asked: Any,
) -> None:
    """Re-learn many targets: a Ray job a (target, strategy, seed), so many at a time, then one a target that judges and
    registers; ends with the table of transfer. Exits with 1 if jobs are left.

    Run again, it does what is missing or failed, and takes up jobs that are still at work. With neither --address nor
    RAY_ADDRESS it runs on a local Ray, started and stopped by this command.

    \b
    Example:
      antdist fanout --config configs/relearn.yaml --targets food,arts --strategies scratch,finetune,relearn --seeds 0-4 \\
        --from models:/pretrain@champion --parallel 8 data.root=/shared/data ray.storage=/shared/runs --address http://head:8265
    """
    from antdist.jobs.fanout import fanout as run
    from antdist.jobs.fanout import read_wanted

    code = _code(working_dir, installed)
    dry_run, parallel = asked.pop("dry_run"), asked.pop("parallel")
    report = run(
        read_wanted(config_file, overrides, targets, **asked), address, code=code, parallel=parallel, dry_run=dry_run
    )
    tell(report, json_file)
    if report.left and not dry_run:
        sys.exit(1)


@cli.command()
@address_option
@click.option("--all", "everything", is_flag=True, help="Those that ended, too.")
def jobs(address: str | None, everything: bool) -> None:
    """List what waits and runs on a cluster: state, run, step, rate, loss, time left, MLflow.

    How a run goes is read from its folder: blank where this machine does not see ray.storage.

    \b
    Example:
      antdist jobs --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    for line in Cluster(address).table(everything):
        click.echo(line)


@cli.command()
@click.argument("job")
@address_option
@click.option("-f", "--follow", is_flag=True, help="Go on to the job's end; exit as it does.")
def logs(job: str, address: str | None, follow: bool) -> None:
    """Print what a job said.

    \b
    Example:
      antdist logs pretrain-books-1f2e3d -f --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    if follow:
        sys.exit(Cluster(address).follow(job).code)
    click.echo(Cluster(address).logs(job), nl=False)


@cli.command()
@click.argument("job")
@address_option
def stop(job: str, address: str | None) -> None:
    """Stop a job in order: training saves its state first. Returns when it has stopped.

    \b
    Example:
      antdist stop pretrain-books-1f2e3d --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    cluster = Cluster(address)
    ended = cluster.stop(job)
    click.echo(f"{job}: {ended.state}")
    click.echo(f"it said last: {cluster.last_line(job)}")


@cli.command()
@click.argument("job")
@address_option
@click.option("--wait", is_flag=True, help="Follow the job's log to its end; exit as it does.")
def resume(job: str, address: str | None, wait: bool) -> None:
    """Submit the same job again: its run goes on from the last checkpoint.

    \b
    Example:
      antdist resume pretrain-books-1f2e3d --address http://head:8265
    """
    from antdist.jobs.client import Cluster

    cluster = Cluster(address)
    _tell_job(cluster, cluster.resume(job), wait)


# -- use -------------------------------------------------------------------------------------------------------------


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the registry is."""
    command = click.option(
        "--tracking-uri", help="MLflow's store. Default: MLFLOW_TRACKING_URI, else below --storage."
    )(command)
    return click.option(
        "--storage", default="runs", show_default=True, type=click.Path(path_type=Path), help="Folder of the runs."
    )(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL, DATA/NAME and where the registry is."""
    command = click.argument("domain", metavar="DATA/NAME", type=Place(path_type=Path))(registry_options(command))
    return click.argument("model")(command)


@cli.command()
@model_options
@click.option("--split", type=click.Choice(["validation", "test"]), default="test", show_default=True)
@json_option
def evaluate(
    model: str, domain: str | Path, split: Any, storage: Path, tracking_uri: str | None, json_file: Path | None
) -> None:
    """Rank the whole catalogue of DATA/NAME for its validation or test users.

    MODEL is models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest, runs:/ID/PATH or a folder.

    \b
    Example:
      antdist evaluate models:/relearn-food@champion data/food --split test
    """
    from antdist.serving.use import evaluate_model, open_model

    figures = evaluate_model(open_model(model, domain, storage, tracking_uri), split)
    for name, value in figures.items():
        click.echo(f"{name:12} {value:.4f}" if "@" in name else f"{name:12} {int(value):,}")
    write_document({"model": model, "domain": redact(str(domain)), "split": split, **figures}, json_file)


@cli.command()
@model_options
@click.option("--user", help="A user of the domain: the whole history.")
@click.option("--history", help="Item ids with commas, oldest first.")
@click.option("-n", "--top", default=10, show_default=True, type=click.IntRange(1), help="How many items.")
@json_option
def recommend(
    model: str,
    domain: str | Path,
    user: str | None,
    history: str | None,
    top: int,
    storage: Path,
    tracking_uri: str | None,
    json_file: Path | None,
) -> None:
    """The items of DATA/NAME that MODEL would show next, with scores and titles; items that no training saw, too.

    \b
    Examples:
      antdist recommend models:/relearn-food@champion data/food --user u000017
      antdist recommend runs/pretrain/model data/food --history fo00001,fo00203 -n 5
    """
    from antdist.serving.use import open_model, recommend_items

    if (user is None) == (history is None):
        raise click.UsageError("give either --user or --history")
    opened = open_model(model, domain, storage, tracking_uri)
    past, items = recommend_items(opened, user=user, history=history, n=top)
    click.echo("history (latest last):")
    for item in past[-5:]:
        click.echo(f"          {item.item_id}  {item.title}")
    click.echo("recommended:")
    for rank, item in enumerate(items, 1):
        click.echo(f"{rank:3}  {item.score:.3f}  {item.item_id}  {item.title}")
    write_document({"model": model, "items": [item._asdict() for item in items]}, json_file)


@cli.command()
@model_options
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(), help="Folder or URI (s3://...) to fill.")
@click.option("-n", "--top", "n", default=10, show_default=True, type=click.IntRange(1), help="Items a user.")
@click.option("--include-seen", is_flag=True, help="Rank what a user has had, too.")
@click.option("--workers", default=2, show_default=True, help="Ray actors; 0: this process alone, without Ray.")
@click.option("--batch-size", default=512, show_default=True, type=click.IntRange(1), help="Users scored together.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@json_option
def score(
    model: str,
    domain: str | Path,
    out: str,
    storage: Path,
    tracking_uri: str | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """The top items of DATA/NAME by MODEL for every user, into Parquet files: user_id, items, scores, best first.

    Users and items that came after training are scored as the others. Run again, it does only what is missing; FOLDER/_score.json,
    written last, says what the files were made from.

    \b
    Examples:
      antdist score models:/relearn-food@champion data/food --out scores/food --top 20
      antdist submit score models:/relearn-food@champion /shared/data/food --out s3://bucket/food --address http://head:8265
    """
    from antdist.data.domain import open_domain
    from antdist.serving.score import score as run
    from antdist.serving.use import find_model

    opened = open_domain(domain)
    tell(run(find_model(model, storage, tracking_uri), opened, out, **options), json_file)


@cli.command("import-reference")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--heads", default=2, show_default=True, help="Attention heads: the checkpoint does not say.")
@click.option("--beta", default=0.1, show_default=True, help="Weight of the text-image synergy: likewise.")
def import_reference(checkpoint: Path, out: Path, heads: int, beta: float) -> None:
    """Make a model of ours out of a checkpoint that the authors' code wrote. Read without running any code in it.

    \b
    Example:
      antdist import-reference ANT-FHCK.ckpt models/ant
    """
    from antdist.model.import_reference import import_reference as run

    card = run(checkpoint, out, heads, beta)
    dims = ", ".join(f"{modality} {dim}" for modality, dim in card.dims.items())
    click.echo(f"imported into {out}: {dims}, {card.config.layers} layers, dim {card.config.dim}")


# -- the registry ----------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--name", default="*", metavar="PATTERN", help="Only models of such names, e.g. 'relearn-*'.")
@click.option("--prune", is_flag=True, help="Remove old versions, with their files.")
@click.option("--keep", type=click.IntRange(1), help="With --prune: keep so many of each name.  [default: 5]")
@click.option("--dry-run", is_flag=True, help="With --prune: only tell what would go.")
@registry_options
@json_option
def models(
    name: str,
    prune: bool,
    keep: int | None,
    dry_run: bool,
    storage: Path,
    tracking_uri: str | None,
    json_file: Path | None,
) -> None:
    """The registry at a glance: versions, aliases, validation Recall@10, strategy, transfer, and lineage: the data that a
    version learned from, its parent, and the data of that, each with the first digits of its fingerprint.

    --prune removes, with model and training state, all but the newest --keep of each name. A version stays if it has an
    alias, is the parent of one that stays, or was not registered by antdist.

    \b
    Examples:
      antdist models --name 'relearn-*'
      antdist models --prune --keep 3 --dry-run
    """
    from antdist.tracking.overview import overview, registry_uri
    from antdist.tracking.pruning import prune as remove

    if not prune and (dry_run or keep is not None):
        raise click.UsageError("--keep and --dry-run belong to --prune")
    uri = registry_uri(storage, tracking_uri)
    if prune:
        tell(remove(uri, pattern=name, keep=keep or 5, dry_run=dry_run), json_file)
        return
    report = overview(uri, name)
    if sys.stdout.isatty() and report.versions:
        from rich.console import Console

        Console().print(report.table())
        write_document(report.to_json(), json_file)
    else:
        tell(report, json_file)


@cli.command()
@click.argument("model")
@click.argument("alias")
@click.option("--force", is_flag=True, help="Move it in any case; what spoke against it becomes a tag of the version.")
@registry_options
@json_option
def promote(
    model: str, alias: str, force: bool, storage: Path, tracking_uri: str | None, json_file: Path | None
) -> None:
    """Move ALIAS to MODEL (models:/NAME/VERSION) if its validation Recall@10 beats the holder's for the same task.

    `champion` asks besides that the transfer is positive, except of pre-trained models and `scratch`.

    \b
    Example:
      antdist promote models:/relearn-food/3 champion
    """
    from antdist.tracking.overview import registry_uri
    from antdist.tracking.promotion import promote as run

    tell(run(model, alias, registry_uri(storage, tracking_uri), force=force), json_file)


if __name__ == "__main__":
    main()
