"""The Ray that Ray Data runs on: a cluster, or a local one on loopback."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from antdist.distributed.ray_compat import RAY_DATA_LOGGERS, hide_log_level_line, listen_on_loopback
from antdist.io.logs import get_logger

logger = get_logger(__name__)


@contextlib.contextmanager
def ray_data_session(workers: int, threads: int | None = None) -> Iterator[int]:
    """Use the running Ray or that of RAY_ADDRESS; with neither, start a local one and stop it at the end.

    Yields:
        CPUs per worker: `threads`, or its share of the cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own messages about retries
        local: dict[str, Any] = {"address": "local", "include_dashboard": False}
        local["num_cpus"] = workers * (threads or max(1, (os.cpu_count() or 1) // workers))
        cluster = bool(os.environ.get("RAY_ADDRESS"))
        logger.info("connecting to Ray" if cluster else "starting Ray on this machine")
        with contextlib.nullcontext() if cluster else listen_on_loopback(), hide_log_level_line():
            ray.init(log_to_driver=False, logging_level="error", **({} if cluster else local))
    for name in RAY_DATA_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield threads or count_cores_per_worker([node["Resources"] for node in ray.nodes() if node["Alive"]], workers)
    finally:
        if started:
            ray.shutdown()


def count_cores_per_worker(nodes: Sequence[Mapping[str, float]], workers: int) -> int:
    """Count the CPUs of each worker on a cluster of `nodes`, given by their resources.

    At most those of the largest node, since Ray would wait for more forever; at least one, as nodes may still be starting.
    """
    cores = [int(resources.get("CPU", 0)) for resources in nodes]
    return max(1, min(sum(cores) // workers, max(cores, default=0)))
