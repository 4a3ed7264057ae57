"""The examples run as they are, in an empty folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Shell

EXAMPLES = ROOT / "examples"


@pytest.mark.ray
def test_shell_recipe_goes_from_exports_to_scores(tmp_path: Path) -> None:
    printed = Shell(tmp_path).run(f"bash {EXAMPLES / 'whole_flow.sh'}")
    assert "recommended:" in printed
    assert (tmp_path / "scores" / "kitchen" / "_score.json").is_file()
    assert {row["strategy"] for row in json.loads((tmp_path / "result.json").read_text())["test"]} >= {
        "scratch",
        "relearn",
    }


@pytest.mark.ray
def test_python_script_trains_and_recommends(tmp_path: Path) -> None:
    printed = Shell(tmp_path).run(f"python {EXAMPLES / 'first_model.py'}")
    assert "models:/shop-kitchen/1" in printed
    assert "vectors of users (1, 64) and items (5, 64)" in printed
    assert "refused: " in printed and "targett" in printed


@pytest.mark.ray
def test_notebook_runs(tmp_path: Path) -> None:
    shell = Shell(tmp_path)  # it works beside the notebook, so on a copy
    shutil.copy(EXAMPLES / "transfer.ipynb", tmp_path)
    printed = shell.run("python -m pytest -c /dev/null --rootdir . -p no:cacheprovider --nbmake transfer.ipynb")
    assert "1 passed" in printed
    assert (tmp_path / "runs" / "relearn" / "kitchen").is_dir()


def test_every_example_is_listed_and_run() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        assert path.name == "README.md" or (f"]({path.name})" in listed and path.name in tests), path
