"""Faults on purpose: for tests, for the soak, and for drills on a cluster that nobody depends on.

Nothing happens unless the environment variable `ANTDIST_FAULTS` is set, to a JSON list of faults:

    [{"fault": "kill", "at": "step", "rank": 1, "step": 7, "once": "/shared/drill-1"}]

- `fault`: `kill` (SIGKILL to this process), `stall` (sleep for `seconds`, an hour by default), `raise` (RuntimeError), `full`
  (OSError, no space left), `nan` (`at` gives True, and the caller spoils its number).
- `at`: the place. `join`: on a worker, before it meets the others; `step`: before an optimizer step, `step` of which are done;
  `loss`: where its loss is known; `validate`; `score`: before part `step` of `antdist score` is in its place; `checkpoint`:
  before the snapshot; `save`: in the leader's background, before `file` is written (`best`, `weights.safetensors`,
  `moments.safetensors`, `progress.json`, `COMPLETE.json`), before the folder gets its name (`rename`), and before the old
  checkpoints go (`prune`); `upload`: the same files on the way to `ray.remote_storage`, in the leader's background; `append`:
  in `prepare --append`, before `file` is written (`items`, `sequences`, `pending`, `superseded`, `manifest`), before its folder
  gets its name (`rename`). Default: `step`.
- `rank`, `step`, `file`: where the fault is to happen; what is left out matches all.
- `after`: seconds that the process must have passed such places for, where the step is not known beforehand.
- `once`: a file that is made as the fault happens, and without which it happens again after each restart. On storage that
  the restarted process sees too.
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

_begun: list[float] = []  # when this process passed its first place

Fault = dict[str, Any]


def at(place: str, **facts: Any) -> bool:
    """A place where faults may be injected. True if the caller is to spoil its number with NaN.

    Raises:
        RuntimeError, OSError: faults that do.
        UserError: the variable does not hold faults.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    assert place in PLACES
    if not _begun:
        _begun.append(time.monotonic())
    spoil = False
    for fault in parse(text):
        if fault.get("at", "step") == place and _matches(fault, facts) and _first(fault):
            logger.warning(
                f"{VARIABLE}: {fault['fault']} at {place} ({', '.join(f'{k} {v}' for k, v in facts.items())})"
            )
            spoil |= _happen(fault)
    return spoil


def environment() -> dict[str, str]:
    """What the workers of this command must inherit to inject its faults. Raises UserError if they are malformed."""
    text = os.environ.get(VARIABLE)
    if not text:
        return {}
    parse(text)
    return {VARIABLE: text}


@functools.lru_cache(maxsize=8)
def parse(text: str) -> list[Fault]:
    """The faults that the variable asks for; says so, loudly, the first time. Raises UserError if it is malformed."""
    try:
        faults = json.loads(text)
    except ValueError as error:
        raise _malformed(f"no JSON ({error})") from None
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
    return UserError(what, where=VARIABLE, remedy="correct it, or unset it: it is for drills alone")


def _matches(fault: Fault, facts: dict[str, Any]) -> bool:
    due = time.monotonic() - _begun[0] >= fault.get("after", 0)
    return due and all(fault[key] == facts.get(key) for key in ("rank", "step", "file") if key in fault)


def _first(fault: Fault) -> bool:
    """Whether a fault with `once` has not happened yet, to this or an earlier process."""
    if "once" not in fault:
        return True
    try:
        Path(fault["once"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _happen(fault: Fault) -> bool:
    match fault["fault"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stall":
            time.sleep(fault.get("seconds", STALL_SECONDS))
        case "raise":
            raise RuntimeError(f"a fault that {VARIABLE} asked for")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return fault["fault"] == "nan"


def corrupt(path: Path, how: Literal["cut", "flip", "gone"]) -> None:
    """Damage a file as a disk or a copy does: cut it in half, flip one bit in its middle, lose it."""
    if how == "gone":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
