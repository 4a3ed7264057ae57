"""A run's folder: its configuration, its MLflow run, its log; what driver and workers tell each other through it.

STORAGE/NAME/
  config.yaml     as resolved; a second start under the same name must agree with it
  run.json        the MLflow run that this run writes to, kept over restarts
  log.txt         what the leader said
  outcome.json    what became of it
  checkpoints/  best/  model/  training_state/
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from antdist.config.load import dump_config
from antdist.errors import UserError
from antdist.progress import say, tee

# keys that may differ between two starts of a run: how and how long, not what
OPERATIONAL = {
    "resume": None,
    "name": None,
    "ray": None,
    "tracking": None,
    "training": {
        "epochs", "engine", "zero_stage", "deepspeed", "checkpoint_every", "keep_checkpoints", "stop_after", "log_every",
        "patience",
    },
}  # fmt: skip


def claim_folder(folder: Path, config: BaseModel) -> None:
    """Make the run's folder, or take it up again if it holds the same run.

    Raises:
        UserError: the folder holds a run of another configuration; says which keys differ.
    """
    file = folder / "config.yaml"
    if file.is_file():
        differing = _differing(yaml.safe_load(file.read_text(encoding="utf-8")), yaml.safe_load(dump_config(config)))
        if differing:
            raise UserError(
                f"a run of this name exists with another configuration: {'; '.join(differing[:5])}",
                where=folder,
                remedy="choose another name=..., undo the change to go on with that run, or remove its folder",
            )
        say(f"{folder} exists: going on with that run")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(dump_config(config), encoding="utf-8")


def _differing(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    told = []
    for key in sorted(there.keys() | here.keys()):
        skip = OPERATIONAL.get(key, ()) if not prefix else ()
        if skip is None or (prefix == "training." and key in (OPERATIONAL["training"] or ())):
            continue
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            told += _differing(old, new, f"{prefix}{key}.")
        elif old != new:
            told.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return told


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a small JSON file, or None if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def logging_to(folder: Path) -> Iterator[None]:
    """On the leader: what is said goes to the run's log too, from where the driver shows it."""
    with (folder / "log.txt").open("a", encoding="utf-8", buffering=1) as log, tee(log):
        yield


@contextlib.contextmanager
def following(folder: Path) -> Iterator[None]:
    """On the driver: show lines of the run's log as they come."""
    path, stop = folder / "log.txt", threading.Event()
    path.touch()
    start = path.stat().st_size

    def follow() -> None:
        with path.open(encoding="utf-8") as log:
            log.seek(start)
            while True:
                last = stop.is_set()
                for line in iter(log.readline, ""):
                    say(line.rstrip("\n"))
                if last:
                    return
                stop.wait(0.3)

    thread = threading.Thread(target=follow, name="log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def collect_training_state(folder: Path) -> Path:
    """The newest checkpoint and the best weights in a folder of their own, to be registered with the model."""
    from antdist.training.checkpoint import PREFIX, steps_in

    state = folder / "training_state"
    shutil.rmtree(state, ignore_errors=True)
    newest = f"{PREFIX}{steps_in(folder / 'checkpoints')[-1]:08d}"
    shutil.copytree(folder / "checkpoints" / newest, state / "checkpoints" / newest)
    if (folder / "best").is_dir():
        shutil.copytree(folder / "best", state / "best")
    return state
