"""A training under random faults: one every half minute, each followed by a restart.

Two ranks over gloo (`benchmarks.drill`). It ends where a training without faults ends, or the benchmark fails: the same
weights, moments, history and best weights byte for byte, and by the ledger the same users in the same steps. The cost of
each fault has three parts, which add up: from the last step that counted to the fault (to be repeated), from the fault until
all ranks are gone (detection), and from there to the first repeated step (restart).
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
from antdist.training.checkpoints.local import checkpoint_name, load_latest, steps_in
from benchmarks.drill import DrillRun, end_state, final_steps, finish, read_ledger, start
from benchmarks.report import Line, Options, Report
from benchmarks.worlds import Shape, write_world

RANKS = 2
STALL_TIMEOUT = 5.0  # seconds without a step after which a group counts as stalled
DAMAGES: tuple[Literal["cut", "flip", "gone"], ...] = ("cut", "flip", "gone")
FILES = ("weights.safetensors", "moments.safetensors", "progress.json", "COMPLETE.json", "rename", "prune")
KINDS = ("a rank killed", "killed in a save", "a rank stalled", "newest checkpoint damaged", "disk full in a save")


@dataclass(frozen=True)
class CausedFault:
    """A fault: when it happened, and when all ranks of that attempt were gone."""

    kind: str
    attempt: int
    at: float
    gone: float


def run_until_fault(kind: str, run: DrillRun, attempt: int, delay: float, chance: random.Random) -> CausedFault:
    """Start the run, cause the fault some seconds after its first step, and wait until the ranks end."""
    once, rank = run.folder / f"faults-{attempt}", chance.randrange(RANKS)
    common: Fault = {"after": delay, "once": str(once)}
    wanted: list[Fault] = {
        "killed in a save": [{"fault": "kill", "at": "save", "file": chance.choice(FILES), **common}],
        "disk full in a save": [{"fault": "full", "at": "save", "file": chance.choice(FILES[:4]), **common}],
        "a rank stalled": [{"fault": "stall", "rank": rank, "seconds": STALL_SECONDS, **common}],
    }.get(kind, [])
    group = start(run, RANKS, attempt, wanted)
    if wanted:
        _wait_until(once.exists, group)
        at = once.stat().st_mtime
    else:
        _wait_until(lambda: _last_step_time(run, attempt) > 0, group)
        time.sleep(delay)
        at = time.time()
        os.kill(group[rank].pid or 0, signal.SIGKILL)
    if kind == "a rank stalled":
        while time.time() - max(at, _last_step_time(run, attempt)) < STALL_TIMEOUT:
            time.sleep(0.1)
        for process in group:
            process.kill()
    finish(group)
    gone = time.time()
    if kind == "newest checkpoint damaged" and len(steps := steps_in(run.checkpoints)) > 1:
        corrupt(run.checkpoints / checkpoint_name(steps[-1]) / chance.choice(FILES[:3]), chance.choice(DAMAGES))
    return CausedFault(kind, attempt, at, gone)


def _wait_until(holds: Callable[[], bool], group: list[BaseProcess]) -> None:
    """Wait for a condition. Raises UserError if the ranks end before it holds."""
    while not holds():
        if not any(process.is_alive() for process in group) and not holds():
            raise UserError("the training ended before its fault", where="soak")
        time.sleep(0.02)


def _last_step_time(run: DrillRun, attempt: int) -> float:
    """Return when a rank last wrote to the ledger; 0 if none did."""
    files = (run.folder / "ledger").glob(f"attempt-{attempt:04d}-*.jsonl")
    return max((file.stat().st_mtime for file in files if file.stat().st_size), default=0.0)


def split_costs(run: DrillRun, fault: CausedFault) -> tuple[float, float, float]:
    """Return the seconds that a fault cost: steps to be repeated, detection, restart."""
    everything = list(read_ledger(run))
    mine = [line for line in everything if line.attempt == fault.attempt]
    begun = min((line.time for line in mine), default=fault.at)
    survived = [line.time for ranks in final_steps(run).values() for line in ranks if line.attempt == fault.attempt]
    following = min(line.attempt for line in everything if line.attempt > fault.attempt)
    first = min(line.time for line in everything if line.attempt == following)
    return fault.at - max(survived, default=begun), fault.gone - fault.at, first - fault.gone


def check_equal(run: DrillRun, straight: DrillRun) -> None:
    """Raise UserError unless both runs ended equal, bit for bit, after the same steps on the same users."""
    mine, theirs = end_state(run), end_state(straight)
    differing = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    ledgers = [
        {
            step: [(line.users, line.predictions, line.mine) for line in ranks]
            for step, ranks in final_steps(each).items()
        }
        for each in (run, straight)
    ]
    if ledgers[0] != ledgers[1]:
        differing.append("ledger")
    if differing:
        raise UserError(f"faults changed what the training ended with: {', '.join(differing)}", where=run.folder)


def run(options: Options) -> Report:
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    report = _soak(options, folder)
    shutil.rmtree(folder)  # kept if the soak fails
    return report


def _soak(options: Options, folder: Path) -> Report:
    shape, every = Shape(3000, 1500, 7.0), 30.0
    size: dict[str, Any] = {"batch_size": 256, "checkpoint_every": 10, "dim": 64}
    if options.short:
        shape, every = Shape(80, 50, 7.0), 0.2
        size = {"batch_size": 60, "checkpoint_every": 3, "dim": 8}
    write_world(folder, shape, block_users=64)
    domain = folder / "world"
    faulty = DrillRun(domain, folder / "faulty", epochs=1_000_000, **size)
    chance, faults, begun = random.Random(options.repeats), list[CausedFault](), time.time()
    deadline = begun + 60 * options.minutes
    kinds: list[str] = []
    while time.time() < deadline if not options.short else len(faults) < 2:
        kinds = kinds or (list(KINDS[:2]) if options.short else chance.sample(KINDS, len(KINDS)))
        faults.append(run_until_fault(kinds.pop(), faulty, len(faults), every * chance.uniform(0.5, 1.5), chance))
        status = f"soak: {len(faults)} faults, the last: {faults[-1].kind}; {(time.time() - begun) / 60:.1f} min"
        click.echo(status, err=True)
    # Run to the end of the next epoch, because the current one may have no steps left; and as far without faults.
    standing = load_latest(faulty.checkpoints)
    epochs = (standing.document["progress"]["epoch"] if standing else 0) + 2
    faulty = replace(faulty, epochs=epochs)
    _run_to_the_end(faulty, len(faults))
    faulted, begun = time.time() - begun, time.time()
    straight = DrillRun(domain, folder / "straight", epochs=epochs, **size)
    _run_to_the_end(straight, 0)
    unfaulted = time.time() - begun
    check_equal(faulty, straight)
    paid = {fault.attempt: split_costs(faulty, fault) for fault in faults}
    lost = [sum(parts) for parts in paid.values()]
    steps = len(final_steps(faulty))
    figures = [Line("faults survived", [float(len(faults))], "")]
    for kind in KINDS:
        mine = [paid[fault.attempt] for fault in faults if fault.kind == kind]
        for place, part in enumerate(("steps done again", "detection", "restart")) if mine else ():
            figures.append(Line(f"{kind}: {part}", [parts[place] for parts in mine], "s"))
    again = sum(1 for _ in read_ledger(faulty)) / RANKS - steps
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
            "faults: " + ", ".join(f"{sum(f.kind == kind for f in faults)} x {kind}" for kind in KINDS),
            "restarts fork ranks with all imports done: on a cluster the start of new processes is added",
            f"a stalled rank is found after {STALL_TIMEOUT:g} s without a step",
        ],
    )


def _run_to_the_end(run: DrillRun, attempt: int) -> None:
    """Run without faults. Raises UserError if the training does not finish."""
    codes = finish(start(run, RANKS, attempt, []))
    if any(codes):
        raise UserError(f"a training without faults ended with {codes}", where=run.folder / "ledger")
