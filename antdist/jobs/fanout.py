"""`antdist fanout`: many targets, a Ray job a trial, so many at a time; then a job a target that judges and registers.

What is done already a survey tells, on the cluster where this machine is none of it; so it does not matter from where, or how
often, a fan-out is started.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_args

from antdist.config.load import load_config
from antdist.config.schema import RelearnConfig, Strategy
from antdist.data.entries import PLAIN_NAME
from antdist.distributed.ray_session import is_inside_job, local_head, sigterm_as_interrupt
from antdist.errors import UserError
from antdist.io.logs import get_logger
from antdist.jobs.client import POLL_SECONDS, Cluster, Ended, joining, run_of
from antdist.jobs.submission import Submission, settled, submission_of
from antdist.jobs.survey import Survey, survey
from antdist.report import Report
from antdist.runs.inputs import available_modalities, open_domains
from antdist.runs.parent import check_parent_named
from antdist.runs.trials import Trial, strategies_of

if TYPE_CHECKING:
    from antdist.evaluation.report import Row

logger = get_logger(__name__)

ALL = "all"
MOST_SEEDS = 1000
PATIENCE = 600.0  # seconds for which the cluster may be away while its jobs go on
AGAIN = "run the same command again"
T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What a user asked for. `targets` is None for `all`; strategies and seeds stand in `config`."""

    config: RelearnConfig
    targets: list[str] | None


@dataclass(frozen=True)
class Task:
    """A job of the fan-out: a trial, or (None) a target's verdict."""

    target: str
    trial: Trial | None
    submission: Submission

    def __str__(self) -> str:
        return f"{self.target} " + ("verdict" if self.trial is None else str(self.trial))


@dataclass(frozen=True)
class Failure:
    """A task that did not do what it was to do."""

    task: str
    job: str
    why: str


class Jobs(Protocol):
    """What the fan-out asks of a cluster."""

    def at_work(self) -> dict[tuple[str, ...], str]: ...
    def submit(self, submission: Submission) -> str: ...
    def ended(self, job: str) -> Ended | None: ...
    def why(self, job: str) -> str: ...
    def logs(self, job: str) -> str: ...
    def ask_to_stop(self, job: str) -> bool: ...


@dataclass(repr=False)
class Fanned(Report):
    """What a fan-out ended with: of each target what its verdict's job told, and what failed."""

    targets: list[str]
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 0

    def rows(self) -> dict[str, list[Row]]:
        from antdist.evaluation.report import read_row

        return {
            target: [read_row(row) for row in self.verdicts[target]["test"]]
            for target in self.targets
            if target in self.verdicts
        }

    def lines(self) -> list[str]:
        from antdist.evaluation.report import transfer_table

        rows, told = self.rows(), [f"note: {note}" for note in self.notes]
        if rows:
            champions = {target: _champion(self.verdicts[target]) for target in rows}
            told += ["test users, best epoch of each trial and champion by validation Recall@10:"]
            told += [*transfer_table(rows, champions).splitlines(), *_counts(rows)]
        for target in self.targets:
            told += [
                f"{target}: {note}"
                for note in self.verdicts.get(target, {}).get("notes", [])
                if note.startswith("not ") or "stays champion" in note
            ]
            if target not in self.verdicts and f"{target} verdict" not in {failure.task for failure in self.failures}:
                told.append(f"{target}: no strategy is trained with all seeds")
        told += [f"failed: {f.task}: {f.why} (antdist logs {f.job})" for f in self.failures]
        if self.left:
            told.append(f"{AGAIN}: {self.left} job{'s are' if self.left > 1 else ' is'} left")
        return told

    def to_json(self) -> dict[str, Any]:
        return {
            "targets": {target: self.verdicts.get(target) for target in self.targets},
            "failed": [asdict(failure) for failure in self.failures],
            "notes": self.notes,
            "left": self.left,
        }

    def records(self) -> list[dict[str, Any]]:
        return [{"target": target, **asdict(row)} for target, rows in self.rows().items() for row in rows]


def _champion(verdict: dict[str, Any]) -> tuple[str, str]:
    """The strategy in whose row it is told, and which version is champion."""
    if "chosen" not in verdict:
        return verdict["test"][0]["strategy"], "not decided"
    holder = verdict["holder"]
    if holder == verdict["model"]:
        return verdict["chosen"], holder
    return verdict["chosen"], f"none ({verdict['model']} not promoted)" if holder is None else f"{holder} stays"


def _counts(rows: dict[str, list[Row]]) -> list[str]:
    """Of each strategy, on how many targets its transfer was what."""
    found: dict[str, list[str]] = {}
    for row in (row for of_target in rows.values() for row in of_target if row.verdict is not None):
        found.setdefault(row.strategy, []).append(row.verdict.transfer if row.verdict else "")
    kinds = ("positive", "none", "negative", "unknown")
    return [
        f"{strategy}: transfer {', '.join(f'{kind} on {ts.count(kind)}' for kind in kinds if kind in ts)} of {len(ts)} targets"
        for strategy, ts in found.items()
    ]


# -- what is asked for -----------------------------------------------------------------------------------------------


def read_wanted(
    file: Path | None,
    overrides: Sequence[str],
    targets: str,
    *,
    strategies: str | None = None,
    seeds: str | None = None,
    parent: str | None = None,
) -> Wanted:
    """The configuration with what the command's options say beside it. Raises UserError."""
    config = load_config(RelearnConfig, file, overrides)
    changes: dict[str, Any] = {}
    if strategies is not None:
        changes["strategy"] = read_strategies(strategies)
    if seeds is not None:
        changes["seeds"] = read_seeds(seeds)
    if parent is not None:
        changes["parent"] = parent
    return wanted_of(config.model_copy(update=changes), None if targets.strip() == ALL else read_targets(targets))


def wanted_of(config: RelearnConfig, targets: list[str] | None) -> Wanted:
    """Build the fan-out of a configuration, whose own `target` does not count. `targets`: None for all."""
    return Wanted(config.model_copy(update={"target": None, "strategy": strategies_of(config)}), targets)


def read_targets(text: str) -> list[str]:
    """Names with commas: each once, each that of a folder and nothing else. Raises UserError."""
    names = _words(text, "--targets", "name prepared domains with commas, or all")
    for name in names:
        if not re.fullmatch(PLAIN_NAME, name):
            raise UserError(
                f"{name!r} is not the name of a domain", where="--targets", remedy="letters, digits, dots, dashes only"
            )
    return names


def read_strategies(text: str) -> list[Strategy]:
    """Strategies with commas, in the schema's order. Raises UserError."""
    known: tuple[Strategy, ...] = get_args(Strategy)
    words = _words(text, "--strategies", f"name some of {', '.join(known)}")
    for word in words:
        if word not in known:
            raise UserError(f"unknown strategy {word!r}", where="--strategies", remedy=f"known: {', '.join(known)}")
    return [strategy for strategy in known if strategy in words]


def read_seeds(text: str) -> list[int]:
    """`0-4`, `0,2,5` or both mixed: each seed once. Raises UserError."""
    remedy = "write for example 0-4 or 0,2,5"
    seeds: list[int] = []
    for word in _words(text, "--seeds", remedy):
        found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", word)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(f"{word!r} is no seed and no range of seeds", where="--seeds", remedy=remedy)
        if len(seeds) + last - first >= MOST_SEEDS:
            raise UserError(f"more than {MOST_SEEDS} seeds", where="--seeds", remedy=remedy)
        seeds += range(first, last + 1)
    if twice := [seed for seed in dict.fromkeys(seeds) if seeds.count(seed) > 1]:
        raise UserError(f"the seed {twice[0]} is named twice", where="--seeds", remedy=remedy)
    return seeds


def _words(text: str, where: str, remedy: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserError("names nothing" if not text.strip() else "a name is empty", where=where, remedy=remedy)
    if twice := [word for word in words if words.count(word) > 1]:
        raise UserError(f"{twice[0]!r} is named twice", where=where, remedy=remedy)
    return words


def check_wanted(wanted: Wanted, here: bool) -> Wanted:
    """All that this machine can see; with absolute folders. Raises UserError."""
    targets = wanted.targets
    # what is checked of a configuration with a target holds for each
    config = settled(wanted.config.model_copy(update={"target": targets[0] if targets else ALL}), here)
    check_parent_named(config)
    if config.tracking.registered_model is not None and targets != [config.target]:
        raise UserError(
            "several targets cannot share a name in the registry",
            where="tracking.registered_model",
            remedy="leave it out: each is registered as NAME-TARGET",
        )
    if targets and Path(config.data.root).is_dir():
        for domain in open_domains(config.data, targets, "--targets"):
            available_modalities(config, domain)
    return Wanted(config, targets)


# -- the jobs --------------------------------------------------------------------------------------------------------


def fanout(wanted: Wanted, address: str | None, *, code: str, parallel: int, dry_run: bool = False) -> Survey | Fanned:
    """Survey, then run what is left of the fan-out.

    Raises:
        UserError: whatever `check_wanted`, `survey` or the cluster raise.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and the jobs in flight are stopped.
    """
    here = not (address or os.environ.get("RAY_ADDRESS"))
    wanted = check_wanted(wanted, here)
    if here or (dry_run and is_inside_job()):
        found = survey(wanted.config, wanted.targets)
        if dry_run:
            return found
    if not here:
        cluster = Cluster(address)
        found = survey_there(cluster, wanted, code)
        return found if dry_run else run_jobs(cluster, wanted.config, found, here=False, code=code, parallel=parallel)
    if not found.left:
        return Fanned(list(found.targets), _verdicts(found), notes=found.notes)
    with local_head(wanted.config.ray) as (jobs, drivers):
        logger.info(f"a local Ray; dashboard {jobs}")
        return run_jobs(Cluster(jobs), wanted.config, found, here=True, code=code, parallel=parallel, drivers=drivers)


def survey_there(cluster: Jobs, wanted: Wanted, code: str) -> Survey:
    """The survey, made by a job: this machine may see neither data nor runs."""
    targets = ",".join(wanted.targets) if wanted.targets else ALL
    arguments = [f"--targets={targets}", "--dry-run", "--json=-"]
    submission = submission_of("fanout", wanted.config, arguments, here=False, code=code)
    job = cluster.submit(submission)
    logger.info(f"job {job}: looks at data and runs")
    while (ended := _patiently(lambda: cluster.ended(job))) is None:
        time.sleep(POLL_SECONDS)
    told = document(cluster.logs(job)) if ended.code == 0 else None
    if told is None:
        raise UserError(
            cluster.why(job).removeprefix("error: ").rstrip("."), where=None, remedy=f"`antdist logs {job}`"
        )
    found = Survey.from_json(told, wanted.config)
    for note in found.notes:
        logger.warning(f"note: {note}")
    return found


def run_jobs(
    cluster: Jobs,
    config: RelearnConfig,
    found: Survey,
    *,
    here: bool,
    code: str,
    parallel: int,
    drivers: str | None = None,
) -> Fanned:
    """Run the jobs of the trials that are left, and, as each target's trials have ended, that of its verdict."""

    def task(target: str, trial: Trial | None) -> Task:
        changes: dict[str, Any] = {"target": target, "parent": found.parent}
        if trial is not None:
            changes |= {"strategy": trial.strategy, "seeds": [trial.seed]}
        arguments = ["--only=trial"] if trial else ["--only=verdict", "--json=-"]
        submission = submission_of("relearn", config.model_copy(update=changes), arguments, here=here, code=code)
        return Task(target, trial, joining(submission, drivers) if drivers else submission)

    done = Fanned(list(found.targets), _verdicts(found), notes=found.notes)
    open_trials = {target: {trial for trial in found.targets[target].todo} for target in found.targets}
    running = {target: len(trials) for target, trials in open_trials.items()}
    waiting = deque(task(target, trial) for target in found.targets for trial in found.targets[target].todo)
    waiting += [task(target, None) for target, of_it in found.targets.items() if not of_it.todo and not of_it.verdict]

    def finished(ended: Task, job: str, how: Ended) -> None:
        if how.code != 0:
            done.failures.append(Failure(str(ended), job, cluster.why(job)))
        if ended.trial is None:
            if how.code == 0 and (told := document(cluster.logs(job))) is not None:
                done.verdicts[ended.target] = told
            return
        if how.code == 0:
            open_trials[ended.target].remove(ended.trial)
        running[ended.target] -= 1
        broken = {trial.strategy for trial in open_trials[ended.target]}
        if not running[ended.target] and broken != set(strategies_of(config)):
            waiting.appendleft(task(ended.target, None))  # before other targets' trials: what is done is shown

    total = found.left
    with sigterm_as_interrupt(), _showing(total) as show:
        _drive(cluster, waiting, parallel, finished, show)
    done.left = sum(map(len, open_trials.values()))
    done.left += sum("chosen" not in done.verdicts.get(target, {}) for target in done.targets)
    return done


def _drive(
    cluster: Jobs,
    waiting: deque[Task],
    parallel: int,
    finished: Callable[[Task, str, Ended], None],
    show: Callable[[int, int, int], None],
) -> None:
    """At most `parallel` jobs that are submitted and have not ended, until none waits. `finished` may make more wait. Jobs of
    an earlier fan-out that are at work are taken up."""
    at_work, ended, failed = cluster.at_work(), 0, 0
    flying = {job: task for task in waiting if (job := at_work.get(run_of(task.submission.metadata)))}
    for job, task in flying.items():
        waiting.remove(task)
        logger.info(f"{task}: job {job} is at work already")
    try:
        while waiting or flying:
            while waiting and len(flying) < parallel:
                task = waiting.popleft()
                job = cluster.at_work().get(run_of(task.submission.metadata)) or cluster.submit(task.submission)
                flying[job] = task
                logger.info(f"{task}: job {job}")
            show(ended, len(flying), failed)
            time.sleep(POLL_SECONDS)
            for job, task in list(flying.items()):
                how = _patiently(lambda job=job: cluster.ended(job))  # type: ignore[misc]
                if how is None:
                    continue
                del flying[job]
                ended, failed = ended + 1, failed + (how.code != 0)
                finished(task, job, how)
                logger.info(
                    f"{task}: {how.state}; {ended} ended, {failed} of them failed, {len(flying)} run, {len(waiting)} wait"
                )
    except KeyboardInterrupt:
        _stop(cluster, list(flying))
        raise
    except UserError:
        if flying:
            logger.warning(f"{len(flying)} jobs go on; {AGAIN} to take them up")
        raise


def _stop(cluster: Jobs, jobs: list[str]) -> None:
    """Have them save their state and leave; a second Ctrl-C leaves them to themselves."""
    logger.info(f"stopping {len(jobs)} jobs, which save their state first; Ctrl-C leaves them to themselves")
    deaf = set(jobs)  # a job that is about to start does not hear yet
    while left := [job for job in jobs if cluster.ended(job) is None]:
        deaf = {job for job in deaf.intersection(left) if not cluster.ask_to_stop(job)}
        time.sleep(POLL_SECONDS)
    logger.info(f"stopped: {AGAIN} to go on")


def _verdicts(found: Survey) -> dict[str, dict[str, Any]]:
    return {target: of_it.verdict for target, of_it in found.targets.items() if of_it.verdict is not None}


def document(log: str) -> dict[str, Any] | None:
    """What a job wrote for `--json -`: the last line that is a JSON object."""
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return dict(json.loads(line))
    return None


def _patiently(ask: Callable[[], T]) -> T:
    """What the cluster answers, asked again while it is away: its jobs go on meanwhile."""
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        try:
            return ask()
        except UserError as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                told = True
                logger.warning(f"asking again for {PATIENCE / 60:.0f} minutes: {error}")
            time.sleep(10 * POLL_SECONDS)


@contextlib.contextmanager
def _showing(total: int) -> Iterator[Callable[[int, int, int], None]]:
    """On a terminal a bar: how many jobs ended, run, failed, and the time left. Elsewhere the lines are enough."""
    import sys

    if not sys.stderr.isatty():
        yield lambda ended, running, failed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("jobs"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stderr=True) as progress:
        bar = progress.add_task("", total=total, counts="")

        def show(ended: int, running: int, failed: int) -> None:
            counts = f"{ended - failed} of {total} done, {running} run, {failed} failed"
            progress.update(bar, completed=ended, counts=counts)

        yield show
