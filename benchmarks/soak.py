"""A training that is left alone among faults: every half minute one, at random, and a restart, as orchestration would do it.

Two ranks over gloo (`benchmarks.drill`). It ends where a training without faults ends, or the benchmark fails: the same
weights, moments, history and best weights byte for byte, and by the ledger the same users in the same steps. What each
fault costs is told in three parts, which add up: from the last step that counted to the fault (to be done again), from the
fault until all ranks are gone (detection), from there to the first step done anew (restart).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import click

from antdist.errors import UserError
from antdist.faults import STALL_SECONDS, Fault, corrupt
from antdist.training.checkpoints.local import PREFIX, load_latest, steps_in
from benchmarks.drill import Run, counted, end_state, finish, lines, start
from benchmarks.report import Line, Options, Report
from benchmarks.worlds import Shape, write_world

RANKS = 2
SILENCE = 5.0  # seconds without a step after which a group is taken for stalled
DAMAGES: tuple[Literal["cut", "flip", "gone"], ...] = ("cut", "flip", "gone")
FILES = ("weights.safetensors", "moments.safetensors", "progress.json", "COMPLETE.json", "rename", "prune")
KINDS = ("a rank killed", "killed in a save", "a rank stalled", "newest checkpoint damaged", "disk full in a save")


@dataclass(frozen=True)
class Struck:
    """A fault that happened: when, and when all ranks of that attempt were gone."""

    kind: str
    attempt: int
    at: float
    gone: float


def strike(kind: str, run: Run, attempt: int, delay: float, chance: random.Random) -> Struck:
    """Start the run, let the fault happen some seconds after its first step, see the ranks end."""
    once, rank = run.folder / f"struck-{attempt}", chance.randrange(RANKS)
    common: Fault = {"after": delay, "once": str(once)}
    wanted: list[Fault] = {
        "killed in a save": [{"fault": "kill", "at": "save", "file": chance.choice(FILES), **common}],
        "disk full in a save": [{"fault": "full", "at": "save", "file": chance.choice(FILES[:4]), **common}],
        "a rank stalled": [{"fault": "stall", "rank": rank, "seconds": STALL_SECONDS, **common}],
    }.get(kind, [])
    group = start(run, RANKS, attempt, wanted)
    if wanted:
        _until(once.exists, group)
        at = once.stat().st_mtime
    else:
        _until(lambda: _last_step(run, attempt) > 0, group)
        time.sleep(delay)
        at = time.time()
        os.kill(group[rank].pid or 0, signal.SIGKILL)
    if kind == "a rank stalled":
        while time.time() - max(at, _last_step(run, attempt)) < SILENCE:
            time.sleep(0.1)
        for process in group:
            process.kill()
    finish(group)
    gone = time.time()
    if kind == "newest checkpoint damaged" and len(steps := steps_in(run.checkpoints)) > 1:
        corrupt(run.checkpoints / f"{PREFIX}{steps[-1]:08d}" / chance.choice(FILES[:3]), chance.choice(DAMAGES))
    return Struck(kind, attempt, at, gone)


def _until(come: Callable[[], bool], group: list[BaseProcess]) -> None:
    """Wait for something; UserError if the ranks end before it comes."""
    while not come():
        if not any(process.is_alive() for process in group) and not come():
            raise UserError("the training ended before its fault", where="soak")
        time.sleep(0.02)


def _last_step(run: Run, attempt: int) -> float:
    """When a rank last wrote into the ledger; 0 if none did."""
    files = (run.folder / "ledger").glob(f"attempt-{attempt:04d}-*.jsonl")
    return max((file.stat().st_mtime for file in files if file.stat().st_size), default=0.0)


def costs(run: Run, struck: Struck) -> tuple[float, float, float]:
    """Seconds that a fault cost: steps to be done again, detection, restart."""
    everything = list(lines(run))
    mine = [line for line in everything if line.attempt == struck.attempt]
    begun = min((line.time for line in mine), default=struck.at)
    survived = [line.time for ranks in counted(run).values() for line in ranks if line.attempt == struck.attempt]
    following = min(line.attempt for line in everything if line.attempt > struck.attempt)
    first = min(line.time for line in everything if line.attempt == following)
    return struck.at - max(survived, default=begun), struck.gone - struck.at, first - struck.gone


def compare(run: Run, straight: Run) -> None:
    """Raise UserError unless both ended alike, bit for bit, after the same steps on the same users."""
    mine, theirs = end_state(run), end_state(straight)
    differing = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    ledgers = [
        {step: [(line.users, line.predictions, line.mine) for line in ranks] for step, ranks in counted(each).items()}
        for each in (run, straight)
    ]
    if ledgers[0] != ledgers[1]:
        differing.append("ledger")
    if differing:
        raise UserError(f"faults changed what the training ended with: {', '.join(differing)}", where=run.folder)


def run(options: Options) -> Report:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    report = _soak(options, folder)
    shutil.rmtree(folder)  # kept where the soak fails
    return report


def _soak(options: Options, folder: Path) -> Report:
    shape, every = Shape(3000, 1500, 7.0), 30.0
    size: dict[str, Any] = {"batch_size": 256, "checkpoint_every": 10, "dim": 64}
    if options.short:
        shape, every = Shape(80, 50, 7.0), 0.2
        size = {"batch_size": 60, "checkpoint_every": 3, "dim": 8}
    write_world(folder, shape, block_users=64)
    domain = folder / "world"
    faulty = Run(domain, folder / "faulty", epochs=1_000_000, **size)
    chance, struck, begun = random.Random(options.repeats), list[Struck](), time.time()
    deadline = begun + 60 * options.minutes
    kinds: list[str] = []
    while time.time() < deadline if not options.short else len(struck) < 2:
        kinds = kinds or (list(KINDS[:2]) if options.short else chance.sample(KINDS, len(KINDS)))
        struck.append(strike(kinds.pop(), faulty, len(struck), every * chance.uniform(0.5, 1.5), chance))
        told = f"soak: {len(struck)} faults, the last: {struck[-1].kind}; {(time.time() - begun) / 60:.1f} min"
        click.echo(told, err=True)
    # to the end of the epoch after the one that it stands in, which may have no steps left; and as far without faults
    standing = load_latest(faulty.checkpoints)
    epochs = (standing.document["progress"]["epoch"] if standing else 0) + 2
    faulty = replace(faulty, epochs=epochs)
    _to_the_end(faulty, len(struck))
    faulted, begun = time.time() - begun, time.time()
    straight = Run(domain, folder / "straight", epochs=epochs, **size)
    _to_the_end(straight, 0)
    unfaulted = time.time() - begun
    compare(faulty, straight)
    paid = {fault.attempt: costs(faulty, fault) for fault in struck}
    lost = [sum(parts) for parts in paid.values()]
    steps = len(counted(faulty))
    figures = [Line("faults survived", [float(len(struck))], "")]
    for kind in KINDS:
        mine = [paid[fault.attempt] for fault in struck if fault.kind == kind]
        for place, part in enumerate(("steps done again", "detection", "restart")) if mine else ():
            figures.append(Line(f"{kind}: {part}", [parts[place] for parts in mine], "s"))
    again = sum(1 for _ in lines(faulty)) / RANKS - steps
    return Report(
        "soak",
        f"{epochs} epochs, {steps:,} steps, {RANKS} ranks of the plain engine over gloo, a checkpoint every "
        f"{size['checkpoint_every']} steps: a fault every {every:g} s or so and a restart, against the same without faults",
        [
            *figures,
            Line("lost to a fault in all, mean", [sum(lost) / len(lost)], "s"),
            Line("steps done again, of all steps", [100 * again / steps], "%"),
            Line("time with faults over without", [faulted / unfaulted], "x"),
        ],
        [
            "both ended with the same weights, moments, history, best weights and ledger, bit for bit",
            "faults: " + ", ".join(f"{sum(f.kind == kind for f in struck)} x {kind}" for kind in KINDS),
            "restarts fork ranks that have imported all they need: on a cluster the start of new processes comes on top",
            f"a stalled rank is found after {SILENCE:g} s without a step",
        ],
    )


def _to_the_end(run: Run, attempt: int) -> None:
    """Without faults. Raises UserError if it does not get there."""
    codes = finish(start(run, RANKS, attempt, []))
    if any(codes):
        raise UserError(f"a training without faults ended with {codes}", where=run.folder / "ledger")
