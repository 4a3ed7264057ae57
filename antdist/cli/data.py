"""Verbs that make and check data: synth, prepare, verify, featurize."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from antdist import api
from antdist.cli.options import FolderOrUri, check_local, json_option, print_report
from antdist.errors import UserError
from antdist.io.logs import get_logger

log = get_logger(__name__)

COUNT = click.IntRange(1)
SHARE = click.FloatRange(0, 1)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), callback=check_local)
@click.option(
    "--domains",
    default="4",
    show_default=True,
    help="Number of domains, or comma-separated names; the last is the target.",
)
@click.option("--users", default=3000, show_default=True, help="Users per auxiliary domain.")
@click.option("--items", default=600, show_default=True, help="Items per auxiliary domain.")
@click.option("--target-users", default=800, show_default=True, help="Users of the target.")
@click.option("--target-items", default=400, show_default=True, help="Items of the target.")
@click.option("--mean-length", default=14.0, show_default=True, help="Mean interactions per user.")
@click.option(
    "--missing", default=0.04, show_default=True, help="Share of items without a text; likewise image and price."
)
@click.option("--images/--no-images", default=True, show_default=True, help="Draw an image for each item.")
@click.option("--seed", default=0, show_default=True, help="Seed of the generator.")
@json_option
def synth(out: Path, domains: str, images: bool, json_file: Path | None, **sizes: Any) -> None:
    """Generate a world of synthetic domains.

    Writes item texts, images and prices, and users whose sequences follow a learnable grammar, below OUT.

    \b
    Example:
      antdist synth world --users 2000 --seed 7
    """
    names: int | list[str] = int(domains) if domains.isdigit() else [name.strip() for name in domains.split(",")]
    print_report(api.synth(out, domains=names, with_images=images, **sizes), json_file)


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["tabular", "amazon", "atomic"]),
    default="tabular",
    show_default=True,
    help="tabular: CSV, Parquet or JSON; amazon: Amazon reviews; atomic: RecBole files.",
)
@click.option("--domain", required=True, help="Name of the domain, and of its folder below --out.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    callback=check_local,
    help="Folder of the prepared domains.",
)
@click.option("--interactions", type=click.Path(path_type=Path), help="Interactions (or reviews) file, instead of SRC.")
@click.option("--items", type=click.Path(path_type=Path), help="Items (or metadata) file, instead of SRC.")
@click.option("--images", type=click.Path(path_type=Path), help="amazon: folder of images ASIN.jpg or ASIN_1.jpg.")
@click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="tabular: name of a column in the file."
)
@click.option("--k-core", type=COUNT, help="Keep users and items with at least this many interactions. Default: off.")
@click.option(
    "--max-sequence", type=click.IntRange(3), help="Keep only a user's most recent interactions. Default: off."
)
@click.option(
    "--max-bad",
    type=SHARE,
    default=0.001,
    show_default=True,
    help="Share of a file's records that may be invalid; they are listed in quarantine.jsonl.",
)
@click.option("--drop-unknown", is_flag=True, help="Drop interactions with items that the items file lacks.")
@click.option("--block-users", type=COUNT, default=1024, show_default=True, help="Users per block of a shard.")
@click.option("--overwrite", is_flag=True, help="Replace a prepared domain of the same name.")
@click.option("--append", "appending", is_flag=True, help="Append SRC to a prepared domain of the same name.")
@json_option
def prepare(
    source: Path | None, form: Any, columns: Sequence[str], appending: bool, json_file: Path | None, **options: Any
) -> None:
    """Pack exported interactions and items into a domain.

    Reads SRC, filters, orders and splits it, and writes WebDataset shards and a manifest to OUT/DOMAIN. With --append, SRC
    holds the interactions of later days, and items if there are new ones; the existing shards stay untouched.

    \b
    Examples:
      antdist prepare exports/shop --domain shop --out data --k-core 5
      antdist prepare --interactions buys.csv --items items.parquet --column user_id=customer --domain shop --out data
      antdist prepare amazon/ --format amazon --domain gifts --out data
      antdist prepare exports/monday --domain shop --out data --append
    """
    mapping = _mapping(columns, "--column")
    log.info("reading the source")
    print_report(api.prepare(source, format=form, columns=mapping, append=appending, **options), json_file)


def _mapping(pairs: Sequence[str], option: str) -> dict[str, str]:
    mapping = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise UserError(f"{pair!r} is not of the form OURS=THEIRS", where=option, remedy="write user_id=customer")
        mapping[ours] = theirs
    return mapping


@click.command()
@click.argument("domain", metavar="DATA/NAME", type=FolderOrUri(path_type=Path))
@json_option
def verify(domain: str | Path, json_file: Path | None) -> None:
    """Check a prepared domain and its features for damage.

    Compares every size, digest, count and reference with the manifest of DATA/NAME (a folder or URI). Exits with 1 if
    anything is wrong.

    \b
    Examples:
      antdist verify data/shop
      antdist verify s3://bucket/data/shop
    """
    report = api.verify(domain)
    print_report(report, json_file)
    if report.problems:
        sys.exit(1)


@click.command()
@click.argument("domains", metavar="DATA/NAME...", nargs=-1, required=True, type=FolderOrUri(path_type=Path))
@click.option("--text", metavar="ENCODER", help="hashed, minilm, or a transformers encoder: a name or a folder.")
@click.option("--image", metavar="ENCODER", help="histogram, or a transformers vision model: a name or a folder.")
@click.option("--price", type=click.Choice(["raw", "minmax", "log", "quantile"]), help="Scale of prices.")
@click.option("--pooling", type=click.Choice(["cls", "mean"]), help="Text pooling. Default: cls; mean for minilm.")
@click.option("--max-length", default=256, type=COUNT, show_default=True, help="Tokens per text.")
@click.option("--text-dim", default=128, type=COUNT, show_default=True, help="Dimension of hashed text features.")
@click.option("--projection", type=click.Path(path_type=Path), help="hashed: fitted projection to use, or to write.")
@click.option("--max-images", default=4, type=COUNT, show_default=True, help="Images averaged per item.")
@click.option("--max-bad", type=SHARE, default=0.001, show_default=True, help="Share of images that may be broken.")
@click.option("--batch-size", default=64, type=COUNT, show_default=True, help="Items encoded together.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="Stored precision."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--workers",
    default=2,
    type=click.IntRange(0),
    show_default=True,
    help="Ray actors; 0: in this process, without Ray.",
)
@json_option
def featurize(domains: Sequence[str | Path], json_file: Path | None, **options: Any) -> None:
    """Compute item features with frozen encoders.

    Writes the feature tables of prepared domains, and continues where an earlier call stopped. Domains that will be trained
    together belong in one call: hashed text is fitted on all of them.

    \b
    Examples:
      antdist featurize data/* --text hashed --image histogram --price quantile
      antdist featurize data/shop --text google-bert/bert-base-uncased --image microsoft/swin-base-patch4-window7-224
    """
    log.info("checking the domains")
    print_report(api.featurize(domains, **options), json_file)
