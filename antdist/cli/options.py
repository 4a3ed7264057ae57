"""Options that several verbs share, and how a verb prints its result."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from antdist.errors import UserError

if TYPE_CHECKING:
    pass

WIDE = 10_000  # columns where nothing wraps
STANDARD_OUTPUT = Path("-")
Command = TypeVar("Command", bound=Callable[..., Any])


class Printable(Protocol):
    """What a verb returns: lines for people, a document for programs."""

    def lines(self) -> list[str]: ...

    def to_json(self) -> dict[str, Any]: ...


class FolderOrUri(click.Path):
    """A folder, or a URI, which is passed on unchanged."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


def print_report(report: Printable, json_file: Path | None = None) -> None:
    """Print the lines of a report, and write its document to `json_file` if one is named."""
    for line in report.lines():
        click.echo(line)
    write_document(report.to_json(), json_file)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a header and rows in columns; cells wrap to the width of a terminal, never elsewhere."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows[1:]:
        table.add_row(*map(Text, row))  # a cell may hold what rich takes for markup
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def write_document(document: dict[str, Any], json_file: Path | None) -> None:
    """Write a document as JSON to a file, or as one line to standard output; do nothing for None."""
    if json_file == STANDARD_OUTPUT:
        click.echo(json.dumps(document, default=str))
    elif json_file is not None:
        json_file.write_text(json.dumps(document, indent=1, default=str) + "\n", encoding="utf-8")


def json_option(command: Command) -> Command:
    """Add `--json FILE`."""
    return click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
        callback=_check_writable,
        help="Write the results to FILE as well; -: as the last line of standard output.",
    )(command)


def _check_writable(context: click.Context, option: click.Parameter, file: Path | None) -> Path | None:
    """Fail early if the output file is not writable."""
    if file is not None and file != STANDARD_OUTPUT:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.open("a").close()
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", where=file, remedy="name another --json") from None
    return file


def check_local(context: click.Context, option: click.Parameter, path: Path) -> Path:
    """Refuse a URI as the folder of prepared data, which is written locally."""
    if ":/" in str(path):  # a path keeps one slash of a URI's two
        raise UserError("is a URI", where=path, remedy="write to a folder, and copy that folder there")
    return path


def config_options(command: Command) -> Command:
    """Add `--config FILE` and `key=value ...`."""
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path),
        help="YAML file, such as those in configs/. Default: the built-in defaults.",
    )(command)


def registry_options(command: Command) -> Command:
    """Add the options that locate the model registry."""
    command = click.option(
        "--tracking-uri", help="MLflow tracking store. Default: MLFLOW_TRACKING_URI, else mlflow.db in --storage."
    )(command)
    return click.option(
        "--storage", default="runs", show_default=True, type=click.Path(path_type=Path), help="Folder of the runs."
    )(command)


def model_options(command: Command) -> Command:
    """Add MODEL, DATA/NAME and the registry options."""
    command = click.argument("domain", metavar="DATA/NAME", type=FolderOrUri(path_type=Path))(registry_options(command))
    return click.argument("model")(command)


def address_option(command: Command) -> Command:
    """Add `--address URL`."""
    return click.option("--address", metavar="URL", help="http://HEAD:8265. Default: RAY_ADDRESS.")(command)


def code_options(command: Command) -> Command:
    """Add the options that choose the code a job runs."""
    command = click.option("--installed", is_flag=True, help="Send no code: the cluster has antdist installed.")(
        command
    )
    return click.option(
        "--working-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Send the antdist package in this folder. Default: the package that is running.",
    )(command)
