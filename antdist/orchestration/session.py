"""Ray around a command: the cluster that the user names, else a local Ray started and stopped here; workers as Ray Train runs them."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from antdist.config.schema import RayConfig
from antdist.errors import UserError

# Ray asks every worker for these; the first two cost time or network, the others fill logs
WORKER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}

KNOCK_SECONDS = 10


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to `ray.address` or RAY_ADDRESS; with neither, start a local Ray and stop it at the end.

    Raises:
        UserError: no Ray answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own remarks on what it retries
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
    try:
        if address:
            _knock(address)
            ray.init(address=address, **quiet)
        else:
            needed = config.workers * config.cpus_per_worker
            ray.init("local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0].partition(". ")[0]  # sentence; Ray's advice fills a page
        raise UserError(
            f"no Ray answers ({first})",
            where=f"ray.address {address}" if address else "ray",
            remedy="start one with `ray start --head`, correct the address or the token (RAY_AUTH_TOKEN_PATH), or leave "
            "the address out for a local Ray",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, which Ray would try for many minutes."""
    if found := re.fullmatch(r"(?:ray://)?\[?([^/]+?)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=KNOCK_SECONDS).close()


def inside_job() -> bool:
    """Whether this process is the entry point of a job, as `ray job submit` starts it: in a passing copy of the
    submitted folder, with RAY_ADDRESS set to the job's cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run_workers(work: Callable[[dict[str, Any]], None], settings: dict[str, Any], config: RayConfig, name: str) -> None:
    """Run `work(settings)` on `ray.workers` Ray Train workers that share a process group: NCCL with GPUs, gloo without.

    Raises:
        UserError: one that a worker raised, or what became of the workers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = config.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = config.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # a name of its own, since Ray goes on silently with a run of the same name; resuming is ours
            name=f"{name}-{time.time_ns():x}",
            storage_path=str(Path(config.storage).resolve() / "ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised
        told = _user_error(error)
        if told is None:
            raise
        raise told from None


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's mistake inside Ray's wrapping, if that is what it was."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, UserError):
            return one
        pending += [one.__cause__, one.__context__, getattr(one, "cause", None)]
        failures = getattr(one, "worker_failures", None)
        if isinstance(failures, dict):
            pending += list(failures.values())
    return None


def enter_worker(cpus: int) -> None:
    """Settle a worker: its share of the cores (Ray Train allows one thread), quiet libraries."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(cpus)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
