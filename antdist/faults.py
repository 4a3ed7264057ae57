"""Inject faults: for tests, the soak benchmark, and drills on a cluster that nobody depends on.

Nothing happens unless the environment variable `ANTDIST_FAULTS` is set to a JSON list of faults:

    [{"fault": "kill", "at": "step", "rank": 1, "step": 7, "once": "/shared/drill-1"}]

- `fault`: `kill` (SIGKILL to this process), `stall` (sleep for `seconds`, an hour by default), `raise` (RuntimeError),
  `full` (OSError, no space left), `nan` (`inject` returns True, and the caller makes its value NaN).
- `at`: the place; by default `step`.
  - `join`: on a worker, before it joins the process group.
  - `step`: before an optimizer step; `step` counts those done.
  - `loss`: when the loss of a step is known.
  - `validate`: before validation.
  - `checkpoint`: before the snapshot.
  - `save`: in the leader's background thread, before `file` is written (`best`, `weights.safetensors`,
    `moments.safetensors`, `progress.json`, `COMPLETE.json`), before the folder is renamed to its final name (`rename`),
    and before old checkpoints are removed (`prune`).
  - `upload`: likewise for each file on its way to `ray.remote_storage`.
  - `score`: before part `step` of `antdist score` is renamed to its final name.
  - `append`: in `prepare --append`, before `file` is written (`items`, `sequences`, `pending`, `superseded`, `manifest`)
    and before its folder is renamed to its final name (`rename`).
- `rank`, `step`, `file`: conditions on the place; a missing one matches everything.
- `after`: seconds since this process passed its first place, for faults whose step is not known beforehand.
- `once`: a file, created as the fault happens, that stops it from happening again after a restart. It must be on storage
  that the restarted process sees too.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

from antdist.errors import UserError
from antdist.io.logs import get_logger

logger = get_logger(__name__)

VARIABLE = "ANTDIST_FAULTS"
KINDS = ("kill", "stall", "raise", "full", "nan")
PLACES = ("join", "step", "loss", "validate", "checkpoint", "save", "upload", "score", "append")
KEYS = ("fault", "at", "rank", "step", "file", "after", "seconds", "once")
STALL_SECONDS = 3600.0

_started: list[float] = []  # when this process passed its first place

Fault = dict[str, Any]


def inject(place: str, **facts: Any) -> bool:
    """Cause the faults that are configured for this place.

    Returns:
        Whether the caller is to make its value NaN.

    Raises:
        RuntimeError, OSError: the faults `raise` and `full`.
        UserError: the variable is malformed.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    assert place in PLACES
    if not _started:
        _started.append(time.monotonic())
    is_nan = False
    for fault in parse(text):
        if fault.get("at", "step") == place and _matches(fault, facts) and _claim_once(fault):
            described = ", ".join(f"{key} {value}" for key, value in facts.items())
            logger.warning(f"{VARIABLE}: {fault['fault']} at {place} ({described})")
            is_nan |= _cause(fault)
    return is_nan


def worker_environment() -> dict[str, str]:
    """Return the variable for workers to inherit, if it is set. Raises UserError if it is malformed."""
    text = os.environ.get(VARIABLE)
    if not text:
        return {}
    parse(text)
    return {VARIABLE: text}


@functools.lru_cache(maxsize=8)
def parse(text: str) -> list[Fault]:
    """Parse the variable, and log it prominently the first time. Raises UserError if it is malformed."""
    try:
        faults = json.loads(text)
    except ValueError as error:
        raise _malformed(f"not JSON ({error})") from None
    if not isinstance(faults, list) or not all(isinstance(fault, dict) for fault in faults):
        raise _malformed("not a list of faults")
    for fault in faults:
        if unknown := sorted(fault.keys() - set(KEYS)):
            raise _malformed(f"unknown key {unknown[0]}; known: {', '.join(KEYS)}")
        if fault.get("fault") not in KINDS:
            raise _malformed(f"unknown fault {fault.get('fault')!r}; known: {', '.join(KINDS)}")
        if fault.get("at", "step") not in PLACES:
            raise _malformed(f"unknown place {fault.get('at')!r}; known: {', '.join(PLACES)}")
    logger.warning(f"{VARIABLE} IS SET: THIS PROCESS INJECTS FAULTS ON PURPOSE: {text}")
    return faults


def _malformed(what: str) -> UserError:
    return UserError(what, where=VARIABLE, remedy="correct it, or unset it: it is for drills only")


def _matches(fault: Fault, facts: dict[str, Any]) -> bool:
    due = time.monotonic() - _started[0] >= fault.get("after", 0)
    return due and all(fault[key] == facts.get(key) for key in ("rank", "step", "file") if key in fault)


def _claim_once(fault: Fault) -> bool:
    """Create the file of `once`; return False if this or an earlier process did so before."""
    if "once" not in fault:
        return True
    try:
        Path(fault["once"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _cause(fault: Fault) -> bool:
    match fault["fault"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stall":
            time.sleep(fault.get("seconds", STALL_SECONDS))
        case "raise":
            raise RuntimeError(f"a fault injected by {VARIABLE}")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fault["fault"] == "nan"


def corrupt(path: Path, how: Literal["cut", "flip", "gone"]) -> None:
    """Damage a file as a disk or a copy might: cut it in half, flip one bit in its middle, or remove it."""
    if how == "gone":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
