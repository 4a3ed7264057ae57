"""Work in separate processes: fresh ones, for memory and start-up, and ranks over gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from antdist.training.memory import peak_bytes, reset_peak, resident_bytes

T = TypeVar("T")


def run_in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call `function(*arguments)` in a new interpreter; arguments and result must be picklable."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_on_ranks(size: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """Call `function(rank, *arguments)` on each of `size` new processes of a gloo group, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
        ranks = [pool.submit(_on_rank, rank, size, port, function, arguments) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _on_rank(rank: int, size: int, port: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


def measure_memory(work: Callable[[], object]) -> tuple[float, int]:
    """Measure how long a work takes, and how much memory it adds at its peak."""
    reset_peak()
    before, start = resident_bytes(), time.perf_counter()
    work()
    return time.perf_counter() - start, peak_bytes() - before
