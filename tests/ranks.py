"""Run a function on N gloo ranks on this machine, for their results or how they end."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from antdist.io.logs import setup_logging

# imported once, in the server that ranks are forked from; otherwise seconds for each rank
PRELOADED = ["torch._dynamo", "deepspeed", "antdist.training.trainer"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _entry(
    rank: int,
    size: int,
    port: int,
    environment: dict[str, str],
    errors: Path | None,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    results: Any,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if errors is not None:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    setup_logging()
    os.environ.clear()  # the server's is that of its start
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        results.put((rank, function(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def start_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    errors: Path | None = None,
) -> tuple[list[Any], Any]:
    """Start `function(*arguments)` on `size` processes of one gloo group.

    Args:
        environment: added to this process's environment.
        errors: the file for standard error.

    Returns:
        The processes, and a queue of (rank, result, traceback).
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    results = context.Queue()
    port, variables = free_port(), {**os.environ, **(environment or {})}
    processes = [
        context.Process(
            target=_entry, args=(rank, size, port, variables, errors, function, arguments, results), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, results


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function(*arguments)` on `size` processes of a gloo group. Returns results by rank."""
    processes, results = start_ranks(size, function, *arguments)
    collected: dict[int, Any] = {}
    try:
        for _ in range(size):
            rank, value, failure = results.get(timeout=180)
            assert failure is None, f"rank {rank} failed:\n{failure}"
            collected[rank] = value
    finally:
        for process in processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
    return [collected[rank] for rank in range(size)]
