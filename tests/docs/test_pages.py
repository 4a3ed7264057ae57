"""What is documented runs (law 10): every block of README, docs/ and cluster/ is executed or parsed; see `pages`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, check_commands, check_page, matches, pages, starts_ray, transcript


def _parameters() -> list[object]:
    return [
        pytest.param(page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.ray] if starts_ray(page) else [])
        for page in pages()
    ]


@pytest.mark.parametrize("page", _parameters())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_page(page, tmp_path, update=os.environ.get("ANTDIST_DOCS") == "update")


class TestRunner:
    """The checks themselves fail where they should."""

    def test_command_continues_after_backslash(self) -> None:
        block = "$ echo a \\\n    b\na b\n$ true\n"
        assert list(transcript(block)) == [("echo a \\\n    b", ["a b"]), ("true", [])]

    def test_output_may_differ_in_decimals_alone(self) -> None:
        assert matches(["12 users, 0.31 s, 90 items/s"], ["12 users, 4.50 s, 1,200 items/s"])
        assert not matches(["12 users, 0.31 s"], ["13 users, 0.31 s"])

    def test_ellipsis_stands_for_any_lines(self) -> None:
        assert matches(["a", "...", "z"], ["a", "b", "c", "z"])
        assert matches(["...", "z"], ["z"])
        assert not matches(["...", "z"], ["a"])

    def test_other_output_fails_the_page(self, tmp_path: Path) -> None:
        from sybil.example import SybilFailure

        page = tmp_path / "page.md"
        page.write_text("```console\n$ echo a\nb\n```\n")
        with pytest.raises(SybilFailure, match="printed:\na"):
            check_page(page, _new(tmp_path / "run"))

    def test_update_writes_the_output_into_the_page(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("text\n\n```console\n$ echo a\nb\n$ true\n```\n\n```console\n$ pwd\n```\n")
        check_page(page, _new(tmp_path / "run"), update=True)
        assert (
            page.read_text()
            == "text\n\n```console\n$ echo a\na\n$ true\n```\n\n```console\n$ pwd\n/home/you/shops\n```\n"
        )

    @pytest.mark.parametrize(
        "command",
        [
            "antdist prepear SRC --domain a --out data",
            "antdist prepare SRC --domain a --out data --k-cor 5",
            "antdist pretrain training.epoch=3",
            "antdist submit pretrain training.epoch=3 --address http://HEAD:8265",
            "antdist relearn --config configs/absent.yaml",
            "make no-such-target",
            "python -m benchmarks no_such_benchmark",
            "echo 'open",
        ],
    )
    def test_command_that_does_not_exist_is_refused(self, command: str, tmp_path: Path) -> None:
        try:
            refused = check_commands(command, tmp_path) is not None
        except Exception:
            refused = True
        assert refused


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
