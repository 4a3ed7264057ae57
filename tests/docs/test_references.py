"""What the documents name exists, and what exists is in the generated reference."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from configparser import ConfigParser
from functools import cache
from pathlib import Path
from types import ModuleType

import click
import pytest

from antdist.cli.main import cli
from antdist.config.load import known_keys
from antdist.config.schema import PretrainConfig, RelearnConfig
from tests.docs.pages import ROOT, pages

TEST = re.compile(r"`(tests/[\w/]+\.py)::(?:\w+::)?(test_\w+)")
FILE = re.compile(r"`((?:antdist|benchmarks|cluster|configs|docs|launch|tests)/[\w./-]+)`")
LONGEST_CELL = 120


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The hooks that generate the reference."""
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "_hooks" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    def test_named_tests_exist(self, page: Path) -> None:
        named = TEST.findall(page.read_text(encoding="utf-8"))
        assert not [f"{path}::{name}" for path, name in named if not re.search(rf"def {name}\b", _source(path))]

    def test_named_files_exist(self, page: Path) -> None:
        named = FILE.findall(page.read_text(encoding="utf-8"))
        assert not [path for path in named if not any(ROOT.glob(path.rstrip("/")))]

    def test_table_cells_are_short(self, page: Path) -> None:
        rows = [line for line in page.read_text(encoding="utf-8").split("\n") if line.startswith("|")]
        assert not [cell for row in rows for cell in row.split("|") if len(cell.strip()) >= LONGEST_CELL]


def test_every_fault_names_its_test() -> None:
    """An entry of a page of faults is a fault with the tests that prove its promise."""
    for page in sorted((ROOT / "docs" / "operations").glob("*.md")):
        _, heading, faults = page.read_text(encoding="utf-8").partition("## Tested faults")
        entries = [part for part in re.split(r"\n(?=- )", faults) if part.startswith("- ")]
        assert bool(entries) == bool(heading)
        assert not [entry for entry in entries if not TEST.search(entry)], page


def test_architecture_shows_the_layers_that_lint_checks() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    layers = setup["importlinter:contract:layers"]["layers"].strip().split("\n")
    contract = [[name.strip().removeprefix("antdist.") for name in layer.split("|")] for layer in layers]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    rows = [line.split("|")[1] for line in page.split("\n") if line.startswith("| `")]
    assert [re.findall(r"`(\w+)/?`", row) for row in rows] == contract


def test_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def _verbs(group: click.Group, path: str = "antdist") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from _verbs(command, f"{path} {name}")


def test_cli_reference_has_every_verb_and_option(site: ModuleType) -> None:
    page = site.cli_page()
    for name, command in _verbs(cli):
        _, _, section = page.partition(f"\n## {name}\n")
        section = section.partition("\n## ")[0]
        options = [parameter.opts[0] for parameter in command.params if isinstance(parameter, click.Option)]
        assert section and not [option for option in options if option not in section], name


@pytest.mark.parametrize("kind", [PretrainConfig, RelearnConfig])
def test_configuration_reference_has_every_key(site: ModuleType, kind: type[PretrainConfig | RelearnConfig]) -> None:
    page, keys = site.configuration_page(), known_keys(kind)
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    assert not [key for key in leaves if f"**`{key}`**" not in page]


def test_python_reference_has_every_module(site: ModuleType) -> None:
    pages_ = "\n".join(site.python_pages().values())
    modules = [path for path in (ROOT / "antdist").rglob("*.py") if not path.name.startswith("__")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    assert not [name for name in names if f"::: {name}\n" not in pages_]


def test_every_key_says_what_it_is(site: ModuleType) -> None:
    lines = [line for line in site.configuration_page().split("\n") if line.startswith("- **`")]
    assert not [line for line in lines if not re.match(r"- \*\*`[\w.]+`\*\* \(.*\): .", line)]
