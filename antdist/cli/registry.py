"""Verbs of the model registry: models, promote."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from antdist import api
from antdist.cli.options import json_option, print_report, registry_options, write_document


@click.command()
@click.option("--name", default="*", metavar="PATTERN", help="Only models with such a name, e.g. 'relearn-*'.")
@click.option("--prune", is_flag=True, help="Remove old versions with their files.")
@click.option("--keep", type=click.IntRange(1), help="With --prune: versions to keep of each name.  [default: 5]")
@click.option("--dry-run", is_flag=True, help="With --prune: only print what would be removed.")
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
    """List registered models, or remove old versions.

    Prints versions, aliases, validation Recall@10, strategy, transfer, and lineage: the data that a version learned from, its
    parent and the parent's data, each with the first digits of its fingerprint. --prune removes all but the newest --keep
    versions of each name, with model and training state. A version stays if it has an alias, is the parent of one that stays,
    or was not registered by antdist.

    \b
    Examples:
      antdist models --name 'relearn-*'
      antdist models --prune --keep 3 --dry-run
    """
    if not prune and (dry_run or keep is not None):
        raise click.UsageError("--keep and --dry-run belong to --prune")
    if prune:
        print_report(
            api.prune(name, keep=keep or 5, dry_run=dry_run, storage=storage, tracking_uri=tracking_uri), json_file
        )
        return
    report = api.models(name, storage=storage, tracking_uri=tracking_uri)
    if sys.stdout.isatty() and report.versions:
        from rich.console import Console

        Console().print(report.table())
        write_document(report.to_json(), json_file)
    else:
        print_report(report, json_file)


@click.command()
@click.argument("model")
@click.argument("alias")
@click.option("--force", is_flag=True, help="Move it in any case; the objection becomes a tag of the version.")
@registry_options
@json_option
def promote(
    model: str, alias: str, force: bool, storage: Path, tracking_uri: str | None, json_file: Path | None
) -> None:
    """Move an alias to a version that is better.

    ALIAS moves to MODEL (models:/NAME/VERSION) if its validation Recall@10 beats the holder's for the same task. The alias
    champion also requires positive transfer, except for pre-trained models and scratch.

    \b
    Example:
      antdist promote models:/relearn-food/3 champion
    """
    print_report(api.promote(model, alias, force=force, storage=storage, tracking_uri=tracking_uri), json_file)
