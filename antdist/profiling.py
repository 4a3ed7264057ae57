"""Where the time of a step goes: its parts by name, and a trace of a few steps for Perfetto. Free of cost while off.

Neutral ground between the rooms: the loop turns it on, whoever does a part of a step names it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from antdist.io.logs import get_logger

logger = get_logger(__name__)

WAIT, WARM_UP, RECORDED = 3, 2, 5  # steps: let be, traced and thrown away, traced and kept

_off = contextlib.nullcontext()
_on = False


def part(name: str) -> contextlib.AbstractContextManager[object]:
    """Around a part of the step: its name in the trace."""
    if not _on:
        return _off
    from torch.profiler import record_function

    return record_function(name)


@contextlib.contextmanager
def profiled(file: Path | None, *, on_gpu: bool = False) -> Iterator[Callable[[], None]]:
    """Within the block, to be told of each step's end by calling what is given: steps 6 to 10 go to `file` as a Chrome
    trace, `.json.gz`. Of a shorter run those of them that there were, and nothing if there were none. None: no trace."""
    if file is None:
        yield lambda: None
        return
    import torch
    from torch.profiler import ProfilerActivity, schedule

    def write(trace: torch.profiler.profile) -> None:
        _switch(False)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}")
        trace.export_chrome_trace(str(partial))
        partial.replace(file)
        logger.info(
            f"profile of the steps from the {WAIT + WARM_UP + 1}th on: {file}, to be opened in https://ui.perfetto.dev"
        )

    _switch(True)
    try:
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
            schedule=schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1),
            on_trace_ready=write,
        ) as trace:
            yield trace.step
    finally:
        _switch(False)


def _switch(on: bool) -> None:
    global _on
    _on = on
