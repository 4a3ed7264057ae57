"""The Ray that Ray Data works on. One of the command's own listens on loopback alone: whoever reaches a Ray's ports may run
code in it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Ray Data's loggers that tell of each execution
CHATTER = ("ray.data._internal.execution.streaming_executor", "ray.data._internal.progress")
SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def ray_data_session(workers: int, threads: int | None = None) -> Iterator[int]:
    """The Ray that runs, or that RAY_ADDRESS names; with neither, a local one, stopped at the end. Gives the CPUs of each of
    the workers: `threads`, or its share of the cores."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own remarks on what it retries
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        local["num_cpus"] = workers * (threads or max(1, (os.cpu_count() or 1) // workers))
        cluster = bool(os.environ.get("RAY_ADDRESS"))
        with contextlib.nullcontext() if cluster else on_loopback():
            ray.init(log_to_driver=False, logging_level="error", **({} if cluster else local))
    for chatty in CHATTER:
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield threads or share_of_cores([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
    finally:
        if started:
            ray.shutdown()


def share_of_cores(nodes: Sequence[Mapping[str, float]], workers: int) -> int:
    """CPUs for each of the workers on a cluster of such nodes. None gets more than the largest node has: it would be waited
    for without end. At least one, for a cluster whose nodes are still to come."""
    cores = [int(resources.get("CPU", 0)) for resources in nodes]
    return max(1, min(sum(cores) // workers, max(cores, default=0)))


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Around `ray.init` of a local Ray: its processes, and those that they start, take 127.0.0.1 for the node's address.

    Ray does so by itself on systems for which it has no clusters, and asks a constant and an environment variable which
    they are; elsewhere it listens on all addresses, whatever address it is given.
    """
    from ray._private import ray_constants

    constant, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(SWITCH)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[SWITCH] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(SWITCH)
        if variable is not None:
            os.environ[SWITCH] = variable
