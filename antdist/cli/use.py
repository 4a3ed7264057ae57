"""Verbs that use a model: evaluate, recommend, score, import-reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from antdist import api
from antdist.cli.options import json_option, model_options, print_report, write_document
from antdist.io.logs import get_logger
from antdist.report import count

log = get_logger(__name__)


@click.command()
@model_options
@click.option(
    "--split",
    type=click.Choice(["validation", "test"]),
    default="test",
    show_default=True,
    help="Users to rank for.",
)
@json_option
def evaluate(
    model: str, domain: str | Path, split: Any, storage: Path, tracking_uri: str | None, json_file: Path | None
) -> None:
    """Measure the ranking quality of a model on a domain.

    Ranks the complete catalogue of DATA/NAME for its validation or test users. MODEL is models:/NAME@ALIAS,
    models:/NAME/VERSION, models:/NAME/latest, runs:/ID/PATH or a folder.

    \b
    Example:
      antdist evaluate models:/relearn-food@champion data/food --split test
    """
    log.info("loading model and data")
    print_report(api.evaluate(model, domain, split, storage=storage, tracking_uri=tracking_uri), json_file)


@click.command()
@model_options
@click.option("--user", help="A user of the domain, with the complete history.")
@click.option("--history", help="Comma-separated item ids, oldest first.")
@click.option("-n", "--top", default=10, show_default=True, type=click.IntRange(1), help="Number of items.")
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
    """Recommend items for one user or one history.

    Prints the items of DATA/NAME that MODEL ranks next, with scores and titles, items that no training saw included.

    \b
    Examples:
      antdist recommend models:/relearn-food@champion data/food --user u000017
      antdist recommend runs/pretrain/model data/food --history fo00001,fo00203 -n 5
    """
    if (user is None) == (history is None):
        raise click.UsageError("give either --user or --history")
    log.info("loading model and data")
    named = None if history is None else [item.strip() for item in history.split(",") if item.strip()]
    found = api.recommend(model, domain, user=user, history=named, n=top, storage=storage, tracking_uri=tracking_uri)
    print_report(found)
    write_document({"model": model, **found.to_json()}, json_file)


@click.command()
@model_options
@click.option("--out", required=True, metavar="FOLDER", type=click.Path(), help="Folder or URI (s3://...) to write to.")
@click.option("-n", "--top", "n", default=10, show_default=True, type=click.IntRange(1), help="Items per user.")
@click.option("--include-seen", is_flag=True, help="Rank the items of a user's own history too.")
@click.option("--workers", default=2, show_default=True, help="Ray actors; 0: in this process, without Ray.")
@click.option("--batch-size", default=512, show_default=True, type=click.IntRange(1), help="Users scored together.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
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
    """Write the top items of every user to Parquet files.

    The columns are user_id, items and scores, best first; users and items that came after training are included. Run again,
    it writes only what is missing; FOLDER/_score.json, written last, records what the files were made from.

    \b
    Examples:
      antdist score models:/relearn-food@champion data/food --out scores/food --top 20
      antdist submit score models:/relearn-food@champion /shared/data/food --out s3://bucket/food --address http://head:8265
    """
    log.info("loading model and data")
    print_report(api.score(model, domain, out, storage=storage, tracking_uri=tracking_uri, **options), json_file)


@click.command("import-reference")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--heads", default=2, show_default=True, help="Attention heads, which the checkpoint does not record.")
@click.option("--beta", default=0.1, show_default=True, help="Weight of the text-image synergy, likewise.")
def import_reference(checkpoint: Path, out: Path, heads: int, beta: float) -> None:
    """Convert a checkpoint of the authors' code to a model.

    Reads the checkpoint without running any code in it.

    \b
    Example:
      antdist import-reference ANT-FHCK.ckpt models/ant
    """
    card = api.import_reference(checkpoint, out, heads=heads, beta=beta)
    dims = ", ".join(f"{modality} {dim}" for modality, dim in card.dims.items())
    click.echo(f"imported into {out}: {dims}, {count(card.config.layers, 'layer')}, dim {card.config.dim}")
