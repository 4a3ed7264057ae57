"""Trace a few training steps for Perfetto, with their parts by name. Costs nothing while off.

The training loop turns it on; every room may name its part of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from antdist.io.files import write_atomically
from antdist.io.logs import get_logger

logger = get_logger(__name__)

WAIT, WARM_UP, RECORDED = 3, 2, 5  # steps: not traced, traced and discarded, traced and kept

_off = contextlib.nullcontext()
_enabled = False


def trace_part(name: str) -> contextlib.AbstractContextManager[object]:
    """Name the block in the trace, while one is being recorded."""
    if not _enabled:
        return _off
    from torch.profiler import record_function

    return record_function(name)


@contextlib.contextmanager
def profile_steps(file: Path | None, *, on_gpu: bool = False) -> Iterator[Callable[[], None]]:
    """Trace steps 6 to 10 of the block to `file`, a Chrome trace (`.json.gz`).

    A shorter run writes those of them that it has, and no file if it has none.

    Args:
        file: None for no trace.

    Yields:
        A function to call at the end of each step.
    """
    if file is None:
        yield lambda: None
        return
    import torch
    from torch.profiler import ProfilerActivity, schedule

    def write(trace: torch.profiler.profile) -> None:
        _set_enabled(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(
            file, sync="none", suffix=f".partial{file.suffix}"
        ) as partial:  # torch zips by the suffix
            trace.export_chrome_trace(str(partial))
        logger.info(f"profile of steps {WAIT + WARM_UP + 1} and later: {file} (open it in https://ui.perfetto.dev)")

    _set_enabled(True)
    try:
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=write,
        ) as trace:
            yield trace.step
    finally:
        _set_enabled(False)


def _set_enabled(on: bool) -> None:
    global _enabled
    _enabled = on
