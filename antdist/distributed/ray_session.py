"""Ray around a command: a cluster or a local Ray, and the workers of a run under Ray Train."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

from antdist import faults
from antdist.config.schema import HangConfig, RayConfig
from antdist.distributed.ray_compat import (
    START_TIMEOUT_VARIABLE,
    cancel_reservation,
    dashboard_address,
    hide_log_level_line,
    listen_on_loopback,
    preemption_context,
    reservation_requester,
    use_free_agent_port,
)
from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from antdist.io.logs import get_logger, setup_logging

logger = get_logger(__name__)
Settings = TypeVar("Settings")

# the environment of every worker; the first two variables avoid waits and network traffic, the others log noise
WORKER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "OMP_WAIT_POLICY": "passive",  # spinning threads slow a step tenfold where cores are shared
}

QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
CONNECT_SECONDS = 10
COLLECTIVE_SPARE_SECONDS = 120  # that a collective has beyond the watchdogs' limits
STARTUP_SECONDS = 3  # until a new Ray knows its resources
CHECK_SECONDS = 5.0  # between checks for missing nodes
RECOUNT_SECONDS = 20.0  # between two counts of the cluster's nodes by Ray
GROW_SECONDS = 60.0  # between checks for new nodes; to use them, all workers are restarted


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to `ray.address` or RAY_ADDRESS; with neither, start a local Ray and stop it at the end.

    Raises:
        UserError: no Ray answers at the address.
    """
    _quiet_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    logger.info(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    try:
        if address:
            check_listening(address)
            with hide_log_level_line():
                ray.init(address=address, **QUIET)
        else:
            _start_local(config, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0].partition(". ")[0]  # sentence; Ray's advice takes a page
        raise UserError(
            f"no Ray answers ({first})",
            where=f"ray.address {address}" if address else "ray",
            remedy="start one with `ray start --head`, correct the address or the token (RAY_AUTH_TOKEN_PATH), or leave "
            "the address out for a local Ray",
        ) from None
    try:
        with sigterm_as_interrupt():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def local_head(config: RayConfig) -> Iterator[tuple[str, str]]:
    """Start a local Ray with a job server, on loopback, and stop it at the end.

    Yields:
        The addresses of the job server and of Ray.

    Raises:
        UserError: it does not start.
    """
    _quiet_ray()
    import ray

    try:
        with use_free_agent_port(), _ignore_interrupts():
            _start_local(config, include_dashboard=True, dashboard_host="127.0.0.1")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no local Ray starts ({str(error).partition(chr(10))[0]})", where="ray") from None
    try:
        with sigterm_as_interrupt():
            yield f"http://{dashboard_address()}", ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _ignore_interrupts() -> contextlib.AbstractContextManager[None]:
    """Make processes that start in the block ignore Ctrl-C.

    A terminal sends it to all of them; the job server would die of it, and could not be asked to stop its jobs.
    """
    return _signal_handler(signal.SIGINT, signal.SIG_IGN)


def _quiet_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own messages about retries
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _start_local(config: RayConfig, **options: Any) -> None:
    import ray

    needed = config.fewest * config.cpus_per_worker
    with listen_on_loopback(), hide_log_level_line():
        ray.init("local", num_cpus=max(os.cpu_count() or 1, needed), **options, **QUIET)


def sigterm_as_interrupt() -> contextlib.AbstractContextManager[None]:
    """Within the block a scheduler's SIGTERM stops the command in order, as Ctrl-C does.

    Ray's own handler prints a stack trace.
    """
    return _signal_handler(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _signal_handler(number: signal.Signals, handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Set a signal's handler within the block.

    A thread other than the main one cannot, and leaves it unchanged.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextlib.contextmanager
def stop_file_on_sigterm(file: Path) -> Iterator[None]:
    """Within the block SIGTERM creates `file`, which asks the workers to save their state and exit.

    A second SIGTERM stops the command at once.
    """
    file.unlink(missing_ok=True)

    def request_stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        file.touch()

    try:
        with _signal_handler(signal.SIGTERM, request_stop):
            yield
    finally:
        file.unlink(missing_ok=True)


def is_node_leaving() -> bool:
    """Return, on a worker, whether Ray is about to remove a node from the run.

    It does so after `ray drain-node`, the notice of a spot instance's end, or SIGTERM to `ray start --block`; Ray Train then
    restarts the workers without that node.
    """
    return preemption_context().preemption_info is not None


def check_listening(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray would try for many minutes."""
    if found := re.fullmatch(r"(?:(?:ray|https?)://)?\[?([^/]+?)\]?:(\d+)/?", address):
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()


def is_inside_job() -> bool:
    """Return whether this process is the entry point of a Ray job.

    Ray starts it in a temporary copy of the submitted folder, with RAY_ADDRESS set to the job's cluster.
    """
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run_workers(
    work: Callable[[Settings], None], settings: Settings, config: RayConfig, name: str, hang: HangConfig
) -> None:
    """Run `work(settings)` on `ray.workers` Ray Train workers in one process group.

    The group uses NCCL with GPUs, gloo without.

    With `ray.min_workers` Ray restarts `work` with fewer or more workers as nodes leave and join; `work` finds their number
    in `antdist.distributed.world.current_world`. A collective that exceeds the limits of `hang` fails, unless a watchdog has
    stopped its worker before.

    Raises:
        UserError: raised by a worker, or describing how the workers ended.
    """
    _check_resources(config)
    storage = Path(config.storage).resolve() / "ray"
    storage.mkdir(parents=True, exist_ok=True)
    reservation = storage / f"{name}.reservation.json"
    _cancel_earlier_reservation(reservation)
    # a new name each time, since Ray silently resumes a run of the same name, and resuming is ours
    name = f"{name}-{time.time_ns():x}"
    error_file = storage / f"{name}.error.json"
    trainer = _make_trainer(_report_user_error(work, settings, error_file), config, storage, name, hang)
    write_json(reservation, {"requester": reservation_requester(trainer)})
    failure: Exception | None = None
    try:
        _fit(trainer, config)
    except UserError:  # no nodes; the next start cancels the reservation
        raise
    except Exception as error:  # Ray wraps whatever a worker raised
        failure = error
    reservation.unlink(missing_ok=True)
    user_error = read_json(error_file)
    if user_error is not None:
        error_file.unlink()
        raise UserError.from_dict(user_error)
    if failure is not None:
        raise _explain_failure(failure, config) from None


def _report_user_error(work: Callable[[Settings], None], settings: Settings, error_file: Path) -> Callable[[], None]:
    """Make a worker's function that writes a UserError to `error_file` for the driver.

    Workers that Ray restarts after it end at once: trying again would not help. The settings are not passed through Ray,
    because it lists the arguments of a run, and they may contain the password of the tracking store.
    """

    def run() -> None:
        from antdist.distributed.world import agree, current_world

        if agree(current_world(), error_file.is_file()):
            return
        try:
            work(settings)
        except UserError as error:
            with contextlib.suppress(OSError):  # the error may be a full disk; then Ray reports it
                write_json(error_file, error.to_dict())
            raise

    return run


def _make_trainer(run: Callable[[], None], config: RayConfig, storage: Path, name: str, hang: HangConfig) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from antdist.distributed.process_group import GroupConfig

    on_gpu = config.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = config.gpus_per_worker
    workers: int | tuple[int, int] = config.workers
    if config.fewest < config.workers:
        workers = (config.fewest, config.workers)
        # workers may be assigned to a node whose loss Ray has not noticed yet; after this time Ray counts again
        os.environ.setdefault(START_TIMEOUT_VARIABLE, str(RECOUNT_SECONDS))
    return TorchTrainer(
        run,
        torch_config=GroupConfig(
            backend="nccl" if on_gpu else "gloo",
            timeout_s=math.ceil(hang.longest_seconds + COLLECTIVE_SPARE_SECONDS),
            max_failures=config.max_failures,
        ),
        scaling_config=ScalingConfig(
            num_workers=workers,
            placement_strategy=config.placement,
            use_gpu=on_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=GROW_SECONDS,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": WORKER_ENVIRONMENT | faults.worker_environment()},
        ),
    )


def _cancel_earlier_reservation(file: Path) -> None:
    """Cancel what a command that was killed or stopped had reserved for its workers."""
    earlier = read_json(file)
    if earlier is not None:
        cancel_reservation(earlier["requester"])


def _check_resources(config: RayConfig) -> None:
    """Raise UserError if the workers do not fit on a local Ray, which cannot grow.

    What a cluster lacks is reported, and waited for, by `_fit`.
    """
    deadline = time.monotonic() + STARTUP_SECONDS
    while missing := _missing_resources(config):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if missing and not (config.address or os.environ.get("RAY_ADDRESS")):
        raise UserError(
            f"the workers ask for {missing} on this machine",
            where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker",
            remedy="lower them, or name a cluster with ray.address",
        )


def _missing_resources(config: RayConfig) -> str:
    """Describe what the fewest workers need beyond the resources of all living nodes, used or not.

    Returns "" if nothing is missing.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    missing = []
    for kind, amount in needs.items():
        total = sum(node.get(kind, 0) for node in nodes)
        if config.fewest * amount > total:
            missing.append(f"{config.fewest * amount:g} {kind}s ({total:g} there)")
    fit = sum(all(node.get(kind, 0) >= amount for kind, amount in needs.items()) for node in nodes)
    if config.placement == "STRICT_SPREAD" and fit < config.fewest:
        missing.append(f"a node each, {config.fewest} in all ({fit} there)")
    return " and ".join(missing)


def _fit(trainer: Any, config: RayConfig) -> None:
    """Run the trainer in a thread, and report missing nodes meanwhile.

    Raises UserError if none join in time.

    In the main thread Ray Train would handle Ctrl-C itself, and the command would end as if it had failed.
    """
    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    limit = math.inf if config.wait_minutes is None else 60 * config.wait_minutes
    checked, missing_since, reported = -math.inf, math.inf, ""
    while not done.done():  # short waits: a signal that another thread receives does not interrupt one
        wait([done], timeout=0.3)
        if time.monotonic() < checked + CHECK_SECONDS:
            continue
        checked, missing = time.monotonic(), _missing_resources(config)
        missing_since = min(missing_since, checked) if missing else math.inf
        if missing and missing != reported:
            logger.warning(f"the workers ask for {missing}: waiting until nodes join the cluster")
        elif reported and not missing:
            logger.info("the missing nodes have joined")
        reported = missing
        if checked > missing_since + limit:
            raise UserError(
                f"the workers ask for {missing}, and no nodes joined for {config.wait_minutes:g} minutes",
                where="ray.wait_minutes",
                remedy="the same command continues once they have joined; or lower ray.workers, with a range ray.min_workers",
            )
    done.result()


def _explain_failure(failure: Exception, config: RayConfig) -> Exception:
    """Return a one-line error if the workers died or never connected.

    If a worker raised an error itself, return the failure with its traceback.
    """
    from antdist.distributed.process_group import INTERFACE, NOT_CONNECTED

    if reason := re.search(rf"{NOT_CONNECTED} \(.*\)", str(failure)):
        return UserError(
            reason[0],
            where=f"ray.max_failures {config.max_failures}",
            remedy=f"check that all nodes reach each other on all ports; to use another network than Ray does, set {INTERFACE} "
            f"(with GPUs NCCL_SOCKET_IFNAME) where Ray is started on them",
        )
    if "The actor died unexpectedly" not in str(failure):
        return failure
    log = re.search(r"log_file_path='([^']+)'", str(failure))
    return UserError(
        "a worker died: killed, out of memory, hung (then hang/ in the run's folder has its stacks), or its node is gone"
        + (f" (its log, on its node: {log[1]})" if log else ""),
        where=f"ray.max_failures {config.max_failures}",
        remedy="the same command continues from the last checkpoint",
    )


def set_up_worker(cpus: int) -> None:
    """Set the threads of a worker (Ray Train allows one), its log, and quiet libraries."""
    import torch

    setup_logging()
    torch.set_num_threads(cpus)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
