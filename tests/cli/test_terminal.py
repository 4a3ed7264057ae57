"""What the terminal shows: help in one screen, a bar within 80 columns, numbers with their nouns; read-only verbs write nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from antdist.cli.main import STAGES, cli
from antdist.report import count
from antdist.training.status import Status
from tests.worlds import make_domains


class TestHelp:
    def test_every_verb_stands_in_a_stage_with_its_complete_description(self) -> None:
        output = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
        lines = output.splitlines()
        assert max(map(len, lines)) <= 80 and "..." not in output.partition("Data:")[2]
        assert {command.name for commands in STAGES.values() for command in commands} == set(cli.commands)
        for stage, commands in STAGES.items():
            assert f"{stage}:" in lines
            for command in commands:
                description = command.get_short_help_str(limit=1000)
                assert any(line.split(maxsplit=1)[1:] == [description] for line in lines if line.startswith("  ")), (
                    description
                )

    def test_every_option_has_a_description(self) -> None:
        options = [(verb, o) for verb, c in cli.commands.items() for o in c.params if isinstance(o, click.Option)]
        assert not [(verb, option.name) for verb, option in options if not option.help]

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_completion_as_the_help_documents_it(self, shell: str) -> None:
        assert f"_ANTDIST_COMPLETE={shell}_source antdist" in CliRunner().invoke(cli, ["--help"]).output
        environment = os.environ | {"_ANTDIST_COMPLETE": f"{shell}_source"}
        done = subprocess.run([sys.executable, "-m", "antdist"], env=environment, capture_output=True, text=True)
        assert "_ANTDIST_COMPLETE" in done.stdout and done.returncode == 0, done.stderr


def test_numbers_agree_with_their_nouns() -> None:
    assert [count(n, "block") for n in (0, 1, 2561)] == ["0 blocks", "1 block", "2,561 blocks"]
    assert count(1, "job is", "jobs are") == "1 job is" and count(2, "job is", "jobs are") == "2 jobs are"


class TestStatus:
    def test_line(self) -> None:
        status = Status("pretrain", 20, 576, 7.4213, 32_800, 0.001, 42)
        assert status.line() == "pretrain: step 20/576  loss 7.421  32.8k pred/s  data wait 0.1%  eta 0:42"
        assert Status("a", 1, 2, 0.5, 999, 0.0, 3725).figures().endswith("999 pred/s  data wait 0.0%  eta 1:02:05")

    def test_figures_and_bar_fit_80_columns(self) -> None:
        assert len(Status("a", 99_999, 99_999, 12.3456, 999_900, 0.999, 359_999).figures()) <= 74


def digests(folder: Path) -> dict[str, str]:
    """Every file and folder below, with its content."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["models"],
        ["validate", "data.domains=[aa]"],
        ["validate", "target=aa", "strategy=scratch"],
        ["plan", "data.domains=[aa]", "--gpus", "0"],
        ["verify", "data/aa"],
        ["evaluate", "models:/absent/1", "data/aa"],
        ["recommend", "models:/absent/1", "data/aa", "--user", "u"],
        ["promote", "models:/absent/1", "champion"],
        ["config", "show", "training.epochs=3"],
        ["config", "diff", "--run", "models:/absent/1"],
        ["config", "schema", "pretrain"],
        ["jobs"],
    ],
    ids=" ".join,
)
def test_read_only_verbs_create_no_files(arguments: list[str], tmp_path: Path) -> None:
    make_domains(tmp_path / "data", ["aa"])
    before = digests(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "antdist", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    assert digests(tmp_path) == before
