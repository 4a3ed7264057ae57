"""What the documents show, run: commands with their output, commands that are only parsed, configurations and Python.

- `console`: every line that begins with `$ ` runs in the page's folder; what follows is its standard output. `...` on a line of
  its own stands for any lines. Decimals, rates, durations, dates and digests may differ from run to run; all else may not.
- `bash`: needs a cluster, hours or credentials. Parsed by bash; verbs, options and configuration keys must exist.
- `python`: runs, in one namespace a page.
- `yaml`: a configuration that `antdist validate` would parse.

With ANTDIST_DOCS=update the output of `console` blocks that differs is written into the page.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import yaml
from sybil import Example
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from antdist.cli.main import cli
from antdist.config.load import check_config, load_config, names_target
from antdist.config.schema import PretrainConfig, RelearnConfig

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "$ "
HOME = "/home/you/shops"  # stands in the pages for the folder that they run in
STARTS_RAY = re.compile(
    r"^(\$ )?antdist (pretrain|relearn|fanout|submit|validate|featurize(?!.*--workers 0)|score(?!.*--workers 0))",
    re.MULTILINE,
)
# what may differ between machines and runs: digests, dates, decimals, rates
VARYING = [
    (re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,64}\b"), "HEX"),
    (re.compile(r"\b\d{4}-\d\d-\d\d\b"), "DATE"),
    (re.compile(r"[-+]?\d[\d,]*\.\d+%?"), "DECIMAL"),
    (re.compile(r"\d[\d,]* (items|users|predictions|interactions)/s"), r"RATE \1/s"),
    (re.compile(r"< DECIMAL"), "DECIMAL"),
    (re.compile(r"\s+"), " "),
]


def pages() -> list[Path]:
    """Every document of the project."""
    outside = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "benchmarks/RESULTS.md")]
    outside += sorted((ROOT / "cluster").rglob("README.md"))
    return [*outside, *sorted((ROOT / "docs").rglob("*.md"))]


def starts_ray(page: Path) -> bool:
    """Whether a command that the page runs starts Ray."""
    blocks = Document.parse(str(page), CodeBlockParser("console", lambda _: None))
    return any(STARTS_RAY.search(example.parsed) for example in blocks)


def check_page(page: Path, folder: Path, update: bool = False) -> int:
    """Run or parse every block of the page, in order, in an empty folder. Returns their number."""
    shell = Shell(folder)
    edits: list[tuple[int, int, str]] = []
    console = CodeBlockParser("console", lambda example: _run_console(example, shell, edits if update else None))
    bash = CodeBlockParser("bash", lambda example: check_commands(example.parsed, folder))
    config = CodeBlockParser("yaml", _check_configuration)
    document = Document.parse(str(page), console, bash, config, PythonCodeBlockParser())
    count = 0
    for count, example in enumerate(document, 1):
        example.evaluate()
    for start, end, text in reversed(edits):
        document.text = document.text[:start] + text + document.text[end:]
        page.write_text(document.text, encoding="utf-8")
    return count


class Shell:
    """Runs commands in a folder as a reader would who stands in the project's folder with its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".bin"
        programs.mkdir()
        script = 'import runpy\n\nrunpy.run_module("antdist", run_name="__main__")\n'  # argv[0] stays `antdist`
        (programs / "antdist").write_text(f"#!{sys.executable}\n{script}")
        (programs / "antdist").chmod(0o755)
        (folder / "configs").symlink_to(ROOT / "configs")
        path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "PWD": str(folder)}
        self.environment.pop("RAY_ADDRESS", None)

    def run(self, command: str) -> str:
        """Its standard output, with the folder's name as the pages have it. Raises AssertionError where it fails."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{command}\nexit code {done.returncode}\n{done.stdout}{done.stderr[-4000:]}"
        return done.stdout.replace(str(self.folder), HOME)


def _run_console(example: Example, shell: Shell, edits: list[tuple[int, int, str]] | None) -> str | None:
    """Run a block's commands one after the other, and compare their output with what stands below each."""
    written, differing = [], []
    for command, expected in transcript(example.parsed):
        actual = "\n".join(line.rstrip() for line in shell.run(command).split("\n")).strip("\n").split("\n")
        actual = [] if actual == [""] else actual
        same = matches(expected, actual)
        if not same:
            differing.append(
                f"{PROMPT}{command}\nexpected:\n{chr(10).join(expected)}\nprinted:\n{chr(10).join(actual)}"
            )
        written += [f"{PROMPT}{command}", *(expected if same else actual)]
    if differing and edits is not None:
        source = example.region.lexemes["source"]
        start = example.document.text.index(example.parsed, example.start)
        edits.append((start, start + len(source), "\n".join(written) + "\n"))
        return None
    return "\n\n".join(differing) or None


def transcript(block: str) -> Iterator[tuple[str, list[str]]]:
    """Commands of a `console` block, each with the output below it; a command continues after a backslash or in a here-document."""
    command: list[str] = []
    output: list[str] = []
    for line in block.rstrip("\n").split("\n"):
        if command and not output and (command[-1].endswith("\\") or _in_document(command)):
            command.append(line)
        elif line.startswith(PROMPT):
            if command:
                yield "\n".join(command), output
            command, output = [line.removeprefix(PROMPT)], []
        else:
            assert command, f"a console block begins with {PROMPT!r}, not with {line!r}"
            output.append(line)
    yield "\n".join(command), output


def _in_document(command: Sequence[str]) -> bool:
    """Whether a here-document is still open."""
    opened = re.search(r"<<-?'?(\w+)'?", command[0])
    return opened is not None and opened[1] not in command[1:]


def matches(expected: Sequence[str], actual: Sequence[str]) -> bool:
    """Whether the output is the expected one, `...` standing for any lines, but for what varies."""
    if not expected:
        return not actual
    if expected[0] == "...":
        return any(matches(expected[1:], actual[start:]) for start in range(len(actual) + 1))
    return bool(actual) and _settled(expected[0]) == _settled(actual[0]) and matches(expected[1:], actual[1:])


def _settled(line: str) -> str:
    for varying, name in VARYING:
        line = varying.sub(name, line)
    return line.strip()


# -- what is only parsed ---------------------------------------------------------------------------------------------


def check_commands(script: str, folder: Path) -> str | None:
    """Parse a script; each `antdist` in it by its verb's options, and by the configuration's schema."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        return done.stderr
    for line in script.replace("\\\n", " ").split("\n"):
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["antdist"]:
            check_command(words[1:])
        elif entry := next((place for place, word in enumerate(words) if re.fullmatch(r"launch/\w+\.py", word)), None):
            assert (ROOT / words[entry]).is_file(), f"no such entry point: {words[entry]}"
            check_command([Path(words[entry]).stem, *words[entry + 1 :]])
        elif words[:1] == ["make"]:
            subprocess.run(["make", "-C", str(ROOT), "--dry-run", *words[1:]], check=True, capture_output=True)
        elif words[:3] == ["python", "-m", "benchmarks"] and len(words) > 3 and not words[3].isupper():
            assert (ROOT / "benchmarks" / f"{words[3]}.py").is_file(), f"no such benchmark: {words[3]}"
    return None


def check_command(words: Sequence[str], group: click.Group = cli) -> None:
    """Raises UsageError or UserError for an unknown verb, option, value or configuration key."""
    if words[0].startswith("-"):
        assert words[0] in {"-h", "--help", "--version"}, f"no such option: {words[0]}"
        return
    assert words[0] in group.commands, f"no such verb: {words[0]}"
    command = group.commands[words[0]]
    if {"--help", "-h"} & set(words):
        return
    if isinstance(command, click.Group):
        check_command(words[1:], command)
        return
    with command.make_context(words[0], list(words[1:]), parent=click.Context(cli, info_name="antdist")) as context:
        given = context.params
        if "overrides" in given:
            file = given.get("config_file") and ROOT / given["config_file"]
            kind = RelearnConfig if names_target(file, given["overrides"]) or words[0] == "fanout" else PretrainConfig
            load_config(kind, file, given["overrides"])
        if words[0] == "submit":
            check_command([given["verb"], *given["arguments"]])


def _check_configuration(example: Example) -> str | None:
    tree = yaml.safe_load(example.parsed)
    kind = RelearnConfig if tree.keys() & {"target", "strategy", "from", "seeds"} else PretrainConfig
    check_config(kind, tree)
    return None
