"""Steps that are no use, and losses that leap: found where the curves are made, told, written down.

A step whose loss or gradients are no numbers on any rank changes nothing on all ranks (`Engine.update`), and the run goes
on: one poisonous example must not cost a week. What the batch held is written to `skipped.jsonl` in the run's folder, a
line a step:

    {"step": 17, "epoch": 1, "batch": 16, "loss": "nan", "domains": {"office": {"sequences-000003.tar block-000012": [12301, ...]}}}

`step` counts from 1, as the curves do; users are the domain's own numbers. Where such steps come too often, it is the
model that is broken, and the run stops (`training.max_skipped`).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from antdist import ragged
from antdist.batch import GlobalBatch, IntArray
from antdist.data.stream.stream import Stream

WINDOW = 100  # times `training.max_skipped`: the steps among which so many may be skipped
REMEMBERED = 50  # points of the loss's curve
ENOUGH = 20  # of them, to say what is usual
LEAP = 10.0  # median absolute deviations above the median
FLAT = 1e-3  # of the median: what a deviation is at least, as a curve without noise has none


def within_window(skipped: Sequence[int], step: int, most: int) -> list[int]:
    """Those of the skipped steps (counted from 1) that still count after `step` steps."""
    return [each for each in skipped if each > step - max(WINDOW * most, 1)]


def in_a_row(skipped: Sequence[int], step: int) -> int:
    """How many of the last steps were skipped, one after the other, up to `step`."""
    known, run = set(skipped), 0
    while step - run in known:
        run += 1
    return run


def spike(recent: Sequence[float], loss: float) -> float | None:
    """By how many median absolute deviations the loss lies above the recent ones, if that is no noise; else None."""
    if len(recent) < ENOUGH:
        return None
    middle = statistics.median(recent)
    usual = max(statistics.median(abs(each - middle) for each in recent), FLAT * abs(middle))
    leap = (loss - middle) / usual if usual else 0.0
    return leap if leap > LEAP else None


def write_down(file: Path, stream: Stream, step: int, batch: GlobalBatch, loss: float) -> None:
    """Append a skipped step and what its batch held."""
    line: dict[str, Any] = {"step": step, "epoch": batch.epoch + 1, "batch": batch.index, "loss": str(loss)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**line, "domains": origin(stream, batch.users)}) + "\n")


def forget_from(file: Path, step: int) -> None:
    """A run that goes on after `step` steps writes down anew what it repeats."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        # a line that a kill cut short was of a step that is repeated
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(file)


def origin(stream: Stream, users: IntArray) -> dict[str, dict[str, list[int]]]:
    """Where global users are found: domain, then shard and block, then the domain's own numbers of the users."""
    found: dict[str, dict[str, list[int]]] = {}
    for d, domain in enumerate(stream.domains):
        first, last = stream.user_offsets[d], stream.user_offsets[d + 1]
        mine = np.unique(users[(users >= first) & (users < last)]) - first
        blocks = [(shard.name, block) for shard in domain.manifest.sequence_shards for block in shard.blocks]
        starts = ragged.offsets([block.users for _, block in blocks])
        for user, number in zip(mine.tolist(), np.searchsorted(starts, mine, side="right") - 1, strict=True):
            shard, block = blocks[number]
            found.setdefault(domain.name, {}).setdefault(f"{shard} {block.key}", []).append(user)
    return found
