"""The short form of the fuzz (`python -m tests.fuzz.fuzz --count 100000` is the long one)."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from antdist.data.ingest import prepare as prepare_module
from tests.fuzz import mutations
from tests.fuzz.fuzz import fuzz, lines_there


def test_parsers_raise_only_clean_errors() -> None:
    outcome = fuzz(360, seed=7)
    assert outcome.findings == []
    assert outcome.inputs == 360
    targets = {name for name, _ in outcome.ended}
    assert len(targets) == 12
    assert all(outcome.ended[name, "refused"] for name in targets)
    assert sum(outcome.ended[name, "accepted"] for name in targets) > 50


def test_other_errors_are_reproducible_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("deep inside")

    monkeypatch.setattr(prepare_module, "map_known_items", broken)
    found = fuzz(66, seed=7).findings
    assert found and all("KeyError: 'deep inside'" in finding for finding in found)
    number = int(found[0].split()[0].removeprefix("7:"))
    assert fuzz(1, seed=7, start=number).findings[0].split()[0] == f"7:{number}"


def test_executable_lines_are_those_within_functions() -> None:
    text = (Path(__file__).resolve().parents[2] / "antdist" / "data" / "quarantine.py").read_text().splitlines()
    there = lines_there("antdist/data/quarantine.py")
    assert all(text[line - 1].startswith((" ", ")")) for line in there) and 10 < len(there) < len(text) / 2


def test_inputs_do_not_affect_later_inputs() -> None:
    """Values that are put into one document are not those of the table: changed there, they would come back changed."""
    before = repr(mutations.VALUES)
    for seed in range(40):
        mutations.mutate_tree({"a": [1, {"b": 2}], "c": {}}, Random(seed), changes=3)
    assert repr(mutations.VALUES) == before
