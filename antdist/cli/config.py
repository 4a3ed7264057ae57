"""Verbs of configurations: config show, diff, schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from antdist import api
from antdist.cli.options import config_options, print_table, registry_options
from antdist.errors import redact


@click.group()
def config() -> None:
    """Print, compare and describe configurations.

    \b
    Examples:
      antdist config show --config configs/pretrain.yaml training.epochs=10
      antdist config diff --config configs/pretrain.yaml --run runs/pretrain
      antdist config schema pretrain > pretrain.schema.json
    """


@config.command()
@config_options
def show(config_file: Path | None, overrides: Sequence[str]) -> None:
    """Print the resolved configuration as YAML.

    A comment marks each value that differs from the default. A configuration with a target is taken for a re-learning, one
    without for a pre-training.

    \b
    Example:
      antdist config show --config configs/relearn.yaml target=food
    """
    from antdist.config.describe import annotated_yaml

    for line in annotated_yaml(api.run_config(config_file, overrides)):
        click.echo(redact(line))


@config.command()
@config_options
@click.option(
    "--run", metavar="PLACE", help="Run folder, YAML file, MODEL or runs:/ID. Default: the built-in defaults."
)
@registry_options
def diff(
    config_file: Path | None, overrides: Sequence[str], run: str | None, storage: Path, tracking_uri: str | None
) -> None:
    """Print what differs from the defaults or from a run.

    Prints a row per key with both values, whether a run may resume with the change, and, of a re-learning, whether trials
    must agree in the key to be compared.

    \b
    Examples:
      antdist config diff --config configs/pretrain.yaml
      antdist config diff --config configs/pretrain.yaml training.epochs=500 --run runs/pretrain
      antdist config diff --config configs/relearn.yaml target=food --run models:/relearn-food@champion
    """
    from antdist.config.describe import complete, difference_rows, read_other, tree_of
    from antdist.config.load import parse_tree

    here = api.run_config(config_file, overrides)
    kind = type(here)
    if run is None:
        there, source = tree_of(kind()), "default"
    elif run.startswith(("models:", "runs:")):
        from antdist.tracking.overview import registry_uri
        from antdist.tracking.resolve import read_run_config

        there, source = (
            complete(parse_tree(read_run_config(run, registry_uri(storage, tracking_uri)), run), kind, run),
            run,
        )
    else:
        there, source = read_other(Path(run), kind), run
    rows = difference_rows(kind, there, tree_of(here), source)
    if len(rows) == 1:
        click.echo(f"no difference from {'the defaults' if run is None else run}")
    else:
        print_table([[redact(cell) for cell in row] for row in rows])


@config.command()
@click.argument("kind", type=click.Choice(["pretrain", "relearn"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a configuration file, for editors.

    Editors with a YAML language server then complete keys and mark mistakes, if the first line of the YAML file names the
    schema:

    \b
      # yaml-language-server: $schema=pretrain.schema.json

    \b
    Example:
      antdist config schema pretrain > pretrain.schema.json
    """
    from antdist.config.describe import json_schema
    from antdist.config.schema import PretrainConfig, RelearnConfig

    click.echo(json.dumps(json_schema(PretrainConfig if kind == "pretrain" else RelearnConfig), indent=1))
