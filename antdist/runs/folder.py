"""A run's folder: its configuration, its MLflow run, its log; what driver and workers tell each other through it.

STORAGE/NAME/
  config.yaml     as resolved; a second start under the same name must agree with it
  run.json        the MLflow run that this run writes to, kept over restarts
  log.txt         what the leader said
  live.json       how it goes
  outcome.json    what became of it
  stop            while the workers are asked to save their state and leave
  hang/           the stacks of a rank that made no progress
  skipped.jsonl   steps without numbers, and their data
  lock, leader.lock   held by the command, by the leading worker; settling.lock for a moment
  checkpoints/  best/  model/  training_state/
  from.json  from-*/  what the run started from
  profile/        a trace of some steps a worker, where profile=true asks for it

With `ray.remote_storage` its checkpoints, best weights, config.yaml and run.json have a copy there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from antdist.config.load import dump_config
from antdist.config.schema import PretrainConfig, RayConfig, RelearnConfig, Resume
from antdist.config.semantics import resume_changes
from antdist.errors import UserError, redact
from antdist.io.files import flush_to_disk, read_json, write_json
from antdist.io.logs import get_logger, log_to_file
from antdist.io.progress import QUIET_SECONDS
from antdist.io.storage import is_uri
from antdist.tracking.run import TrackedRun
from antdist.training.status import Live

if TYPE_CHECKING:
    from antdist.training.checkpoints.remote import Remote

logger = get_logger(__name__)

# a killed command's workers end in seconds; those on a node that is cut off when Ray there has heard nothing for four minutes
EARLIER_WORKERS_SECONDS = 600.0
TELL_SECONDS = 5.0
STOP = "stop"


@contextlib.contextmanager
def claimed(
    folder: Path,
    config: PretrainConfig | RelearnConfig,
    allowed: Collection[Resume] = (),
    *,
    parts: Sequence[Path] = (),
    whole: bool = True,
) -> Iterator[None]:
    """Within the block the run's folder is this command's: made, or taken up again if it, or its copy in
    `ray.remote_storage`, holds the same run.

    Args:
        allowed: what may differ besides keys that are free on a resume (`antdist.config.schema.Meaning`).
        parts: folders in it that other commands may work in on their own.
        whole: False for such a command: only `parts` are its own, and others may work beside it.

    Raises:
        UserError: another command holds it; earlier workers do not end; it holds a run of another configuration, saying
            which keys differ.
    """
    with contextlib.ExitStack() as held:
        held.enter_context(_held(folder, "run", shared=not whole))
        for part in () if whole else parts:
            held.enter_context(_held(part, "trial"))
        for place in filter(Path.is_dir, (folder, *parts)):
            with led(place):  # a killed command's workers outlive it by some seconds, and write to the same outbox
                pass
        with settling(folder):
            _take_up(folder, config, allowed)
        yield


@contextlib.contextmanager
def _held(folder: Path, what: str, shared: bool = False) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:  # NFS shares a lock only of what may be read
        if not _locked(lock, shared=shared):
            raise UserError(
                f"another command is working on this {what}",
                where=folder,
                remedy="wait for it or stop it, or choose another name=...",
            )
        yield


@contextlib.contextmanager
def settling(folder: Path) -> Iterator[None]:
    """Alone at what the commands that share a run's folder write there: its configuration, what it starts from."""
    with (folder / "settling.lock").open("a") as lock:
        if not _locked(lock, EARLIER_WORKERS_SECONDS):
            raise UserError("another command holds the run's folder", where=folder, remedy="stop it")
        yield


def _take_up(folder: Path, config: PretrainConfig | RelearnConfig, allowed: Collection[Resume]) -> None:
    refuse_another(folder, config, allowed)
    file, remote = folder / "config.yaml", remote_of(folder, config.ray)
    text = redact(dump_config(config)).encode()  # for people, and to compare at the next start
    partial = file.with_suffix(".partial")
    partial.write_bytes(text)
    flush_to_disk(partial)
    partial.replace(file)
    if remote is not None:
        remote.write(file.name, text)


def refuse_another(
    folder: Path, config: PretrainConfig | RelearnConfig, allowed: Collection[Resume] = (), quiet: bool = False
) -> None:
    """Raises UserError if a run's folder, or its copy, holds a run of another configuration. If it holds this one that is
    said, unless `quiet`."""
    file, remote = folder / "config.yaml", remote_of(folder, config.ray)
    begun = {str(folder): file.read_bytes()} if file.is_file() else {}
    if remote is not None and (there := remote.read(file.name)) is not None:
        begun[remote.uri] = there
    for where, text in begun.items():
        changed = resume_changes(type(config), yaml.safe_load(text), yaml.safe_load(redact(dump_config(config))))
        refused = [told for resume, told in changed.values() if resume not in allowed]
        if refused:
            raise UserError(
                f"a run of this name exists with another configuration: {'; '.join(refused[:5])}",
                where=where,
                remedy="choose another name=..., undo the change to go on with that run, or remove its folder",
            )
        if where == next(iter(begun)) and not quiet:
            logger.info(
                f"{where} exists: going on with that run" + "".join(f"; {told}" for _, told in changed.values())
            )


def remote_of(folder: Path, config: RayConfig) -> Remote | None:
    """The copy of a run's folder: where `ray.remote_storage` has what the folder is in `ray.storage`. Raises UserError if
    that cannot be used."""
    from antdist.training.checkpoints.remote import Remote

    if config.remote_storage is None:
        return None
    place = folder.resolve().relative_to(Path(config.storage).resolve())
    return Remote(f"{absolute(config.remote_storage)}/{place}")


def absolute(place: str) -> str:
    """A folder's path from the root; a URI as it is."""
    return place.rstrip("/") if is_uri(place) else str(Path(place).resolve())


def take_up_tracked(folder: Path, config: PretrainConfig | RelearnConfig, uri: str) -> dict[str, Any] | None:
    """What `run.json` says, brought from `ray.remote_storage` where the folder is gone; None if there is none. Where the
    tracking store does not know that run (it may have lain in the same folder), `run_id` is None: another begins."""
    from antdist.tracking.run import OFFLINE, check_known

    known = read_json(folder / "run.json")
    remote = remote_of(folder, config.ray) if known is None else None
    text = None if remote is None else remote.read("run.json")
    if text is None:
        return known
    known = dict(json.loads(text))
    try:
        if known["run_id"].startswith(OFFLINE):
            raise UserError("what the run recorded offline went with its folder")
        check_known(uri, known["run_id"])
    except UserError as error:
        logger.warning(f"{error} The run goes on with a new MLflow run")
        return {**known, "run_id": None}
    write_json(folder / "run.json", known)
    return known


def data_begun_with(folder: Path, config: PretrainConfig | RelearnConfig) -> dict[str, str]:
    """The fingerprint of each domain that the run of this folder, or its copy in `ray.remote_storage`, began with; none before
    its first start. It goes on with those, whatever was appended since."""
    known = read_json(folder / "run.json")
    remote = remote_of(folder, config.ray) if known is None else None
    text = None if remote is None else remote.read("run.json")
    known = json.loads(text) if text is not None else known
    return dict((known or {}).get("data") or {})


def note_tracked(folder: Path, config: PretrainConfig | RelearnConfig, known: dict[str, Any]) -> None:
    """Write `run.json`, to the copy of the folder too."""
    write_json(folder / "run.json", known)
    if (remote := remote_of(folder, config.ray)) is not None:
        remote.write("run.json", json.dumps(known).encode())


def _locked(file: TextIO, seconds: float = 0.0, shared: bool = False) -> bool:
    """Whether the file could be locked, within so long; the lock goes when the file is closed or the process dies."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return True


def for_workers(config: PretrainConfig | RelearnConfig) -> dict[str, Any]:
    """The configuration with absolute folders: Ray starts workers in a folder of its own."""
    places = {"root": absolute(config.data.root)}
    if config.data.cache is not None:
        places["cache"] = str(Path(config.data.cache).expanduser().resolve())
    data = config.data.model_copy(update=places)
    folders = {"storage": str(Path(config.ray.storage).resolve())}
    if config.ray.remote_storage is not None:
        folders["remote_storage"] = absolute(config.ray.remote_storage)
    ray = config.ray.model_copy(update=folders)
    settings = config.model_copy(update={"data": data, "ray": ray}).model_dump(by_alias=True)
    for key in ("resume", "continue", "from"):
        if settings.get(key) and Path(settings[key]).is_dir():
            settings[key] = str(Path(settings[key]).resolve())
    return settings


@contextlib.contextmanager
def ending_runs(uri: str, folders: Sequence[Path]) -> Iterator[None]:
    """If the block fails or is stopped, the MLflow runs of those folders that have no outcome yet are told so."""

    try:
        yield
    except BaseException as error:
        for folder in folders:
            known = read_json(folder / "run.json")
            if known is not None and not (folder / "outcome.json").is_file():
                run = TrackedRun(uri, known["run_id"], folder, resumed=True)
                run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", timeout=5)
        raise


def deliver_left(uri: str, folders: Sequence[Path]) -> None:
    """Deliver what workers that have ended could not; say what still waits, for a later start."""

    for folder in folders:
        known = read_json(folder / "run.json")
        if known is not None and any(outbox.stat().st_size for outbox in folder.glob("outbox-*.jsonl")):
            left = TrackedRun(uri, known["run_id"], folder, resumed=True).finish(status=None)
            if left is not None:
                logger.warning(f"{left.records} tracking records wait in {left.outbox}")


@contextlib.contextmanager
def leading(folder: Path) -> Iterator[None]:
    """On the leader: alone at work in the run's folder; what is logged goes to its log.txt, too, from where the driver shows it.

    Workers outlive a killed driver by some seconds, and must not write into what the next ones begin.

    Raises:
        UserError: earlier workers of this run do not end.
    """
    with log_to_file(folder / "log.txt"), led(folder):
        yield


@contextlib.contextmanager
def led(folder: Path) -> Iterator[None]:
    """Alone among the leading workers in this folder. Raises UserError: earlier ones do not end."""
    with (folder / "leader.lock").open("a") as lock:
        told = min(TELL_SECONDS, EARLIER_WORKERS_SECONDS)
        if not _locked(lock, told):
            logger.warning(
                f"{folder.name}: earlier workers of this run are still at work: waiting until they have ended"
            )
        if not _locked(lock, EARLIER_WORKERS_SECONDS - told):
            raise UserError("earlier workers of this run are still at work", where=folder, remedy="stop them")
        yield


def show_live(folder: Path, live: Live) -> None:
    """On the leader: how it goes, for the driver to show."""
    write_json(folder / "live.json", asdict(live), lasting=False)


@contextlib.contextmanager
def following(folder: Path) -> Iterator[None]:
    """On the driver: show the run's log as it comes, and how it goes: a bar on a terminal, else a line now and then."""
    log, stop = folder / "log.txt", threading.Event()
    log.touch()
    start = log.stat().st_size
    (folder / "live.json").unlink(missing_ok=True)

    def follow(show: Callable[[Live], None]) -> None:
        shown: dict[str, Any] | None = None
        with log.open(encoding="utf-8") as lines:
            lines.seek(start)
            while True:
                last = stop.is_set()
                for line in iter(lines.readline, ""):
                    logger.info(line.rstrip("\n"))
                live = read_json(folder / "live.json")
                if live is not None and live != shown:
                    shown = live
                    show(Live(**live))
                if last:
                    return
                stop.wait(0.3)

    with _bar() if sys.stderr.isatty() else _occasional_line() as show:
        thread = threading.Thread(target=follow, args=(show,), name="log", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@contextlib.contextmanager
def _occasional_line() -> Iterator[Callable[[Live], None]]:
    told = -QUIET_SECONDS

    def show(live: Live) -> None:
        nonlocal told
        if time.monotonic() - told >= QUIET_SECONDS:
            told = time.monotonic()
            logger.info(live.line())

    yield show


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Live], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    # standard error is redirected while the bar lives, so that lines said meanwhile appear above it
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stderr=True) as progress:
        task = progress.add_task("starting the workers", total=None, figures="")

        def show(live: Live) -> None:
            figures = (
                f"{live.step}/{live.steps}  loss {live.loss:.4f}  {live.rate:,.0f} predictions/s  "
                f"data wait {live.wait:.1%}  {live.left / 60:.1f} min left"
            )
            progress.update(task, description=live.name, completed=live.step, total=live.steps, figures=figures)

        yield show


def collect_training_state(folder: Path) -> Path:
    """The newest checkpoint, the best weights and the model's card in a folder of their own, to be registered with the model."""
    from antdist.model.io import CARD
    from antdist.training.checkpoints.local import PREFIX, steps_in

    state = folder / "training_state"
    shutil.rmtree(state, ignore_errors=True)
    newest = f"{PREFIX}{steps_in(folder / 'checkpoints')[-1]:08d}"
    shutil.copytree(folder / "checkpoints" / newest, state / "checkpoints" / newest)
    if (folder / "best").is_dir():
        shutil.copytree(folder / "best", state / "best")
    shutil.copyfile(folder / "model" / CARD, state / CARD)
    return state


def pretrain_folder(config: PretrainConfig) -> Path:
    return Path(config.ray.storage).resolve() / config.name
