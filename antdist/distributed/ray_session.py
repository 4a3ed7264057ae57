"""Ray around a command: the cluster that the user names, else a local Ray started and stopped here; workers as Ray Train runs them."""

from __future__ import annotations

import contextlib
import functools
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
from antdist.distributed.local_ray import on_loopback
from antdist.errors import UserError
from antdist.io.files import read_json, write_json
from antdist.io.logs import get_logger, setup_logging

logger = get_logger(__name__)

# Ray asks every worker for these; the first two cost time or network, the others fill logs
WORKER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "OMP_WAIT_POLICY": "passive",  # threads that wait busily slow a step tenfold where the cores are shared
}

QUIET: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
KNOCK_SECONDS = 10
COLLECTIVE_SPARE_SECONDS = 120  # that a collective has beyond the watchdogs' limits
SETTLE_SECONDS = 3  # until a new Ray knows what it has
LOOK_SECONDS = 5.0  # between two looks for nodes that are gone
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
SETTLED_SECONDS = 20.0  # between two counts of the cluster's nodes by Ray
Settings = TypeVar("Settings")
GROW_SECONDS = 60.0  # between two looks for nodes that came; to grow, all workers are started again


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
    try:
        if address:
            knock(address)
            ray.init(address=address, **QUIET)
        else:
            _start_local(config, include_dashboard=False)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).partition("\n")[0].partition(". ")[0]  # sentence; Ray's advice fills a page
        raise UserError(
            f"no Ray answers ({first})",
            where=f"ray.address {address}" if address else "ray",
            remedy="start one with `ray start --head`, correct the address or the token (RAY_AUTH_TOKEN_PATH), or leave "
            "the address out for a local Ray",
        ) from None
    try:
        with terminable():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def local_head(config: RayConfig) -> Iterator[tuple[str, str]]:
    """A local Ray that takes jobs, on loopback, stopped at the end; the addresses at which it takes them, and drivers.

    Raises:
        UserError: it does not start.
    """
    _quiet_ray()
    import ray
    from ray._private.worker import get_dashboard_url

    try:
        with _any_agent_port(), _deaf_to_interrupts():
            _start_local(config, include_dashboard=True, dashboard_host="127.0.0.1")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"no local Ray starts ({str(error).partition(chr(10))[0]})", where="ray") from None
    try:
        with terminable():
            yield f"http://{get_dashboard_url()}", ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _deaf_to_interrupts() -> contextlib.AbstractContextManager[None]:
    """Processes that start in the block ignore Ctrl-C, which a terminal sends to all: the job server would die of it, and
    could not be asked to stop its jobs."""
    return _answering(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _any_agent_port() -> Iterator[None]:
    """Around `ray.init`: the agent that starts jobs takes a free port; Ray's fixed one may be another Ray's on this machine,
    and `ray.init`, unlike `ray start`, does not ask for it."""
    from ray._private import parameter

    own = parameter.RayParams
    parameter.RayParams = functools.partial(own, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = own


def _quiet_ray() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own remarks on what it retries
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _start_local(config: RayConfig, **options: Any) -> None:
    import ray

    needed = config.fewest * config.cpus_per_worker
    with on_loopback():
        ray.init("local", num_cpus=max(os.cpu_count() or 1, needed), **options, **QUIET)


def terminable() -> contextlib.AbstractContextManager[None]:
    """A scheduler's SIGTERM ends the command in order, as Ctrl-C does; Ray's own answer is a dump of its stack."""
    return _answering(signal.SIGTERM, signal.default_int_handler)


@contextlib.contextmanager
def _answering(sent: signal.Signals, answer: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Within the block a signal is answered so; in a thread, which may not say, as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(sent, answer)
    try:
        yield
    finally:
        signal.signal(sent, before)


@contextlib.contextmanager
def stoppable(ask: Path) -> Iterator[None]:
    """Within the block SIGTERM makes the file `ask`, by which workers are asked to save their state and leave; a second one
    ends the command at once."""
    ask.unlink(missing_ok=True)

    def tell(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        ask.touch()

    try:
        with _answering(signal.SIGTERM, tell):
            yield
    finally:
        ask.unlink(missing_ok=True)


def node_is_going() -> bool:
    """On a worker: whether Ray is about to take a node from its group, as it does after `ray drain-node`, a notice of a
    spot instance's end, or SIGTERM to `ray start --block`. Ray Train starts the group again without that node."""
    # ray.train.get_preemption_info() asks an actor and waits for all workers, each time; the loop agrees by itself
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, which Ray would try for many minutes."""
    if found := re.fullmatch(r"(?:(?:ray|https?)://)?\[?([^/]+?)\]?:(\d+)/?", address):
        socket.create_connection((found[1], int(found[2])), timeout=KNOCK_SECONDS).close()


def inside_job() -> bool:
    """Whether this process is the entry point of a job, as `ray job submit` starts it: in a passing copy of the
    submitted folder, with RAY_ADDRESS set to the job's cluster."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def run_workers(
    work: Callable[[Settings], None], settings: Settings, config: RayConfig, name: str, hang: HangConfig
) -> None:
    """Run `work(settings)` on `ray.workers` Ray Train workers that share a process group: NCCL with GPUs, gloo without.
    A collective that lasts longer than `hang` allows fails, where no watchdog ended the worker before.

    With `ray.min_workers` Ray may start `work` anew with fewer or more of them, as nodes go and come: it asks for the
    number each time (`antdist.distributed.world.current_world`).

    Raises:
        UserError: one that a worker raised, or what became of the workers.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from antdist.distributed.process_group import GroupConfig

    _check_room(config)
    storage = Path(config.storage).resolve() / "ray"
    storage.mkdir(parents=True, exist_ok=True)
    reservation = storage / f"{name}.reservation.json"
    _release(reservation)
    # a name of its own, since Ray goes on silently with a run of the same name; resuming is ours
    name = f"{name}-{time.time_ns():x}"
    mistake = storage / f"{name}.mistake.json"

    def work_or_tell() -> None:
        """A user's mistake is noted for the driver, and workers that Ray restarts after it end at once: trying again,
        perhaps for ever, would not mend it. The settings are no argument, since Ray lists a run's arguments, and they
        may hold the password of the tracking store."""
        from antdist.distributed.world import agree, current_world

        if agree(current_world(), mistake.is_file()):
            return
        try:
            work(settings)
        except UserError as error:
            with contextlib.suppress(OSError):  # a full disk may be the mistake; Ray tells the error then
                write_json(mistake, {"what": error.what, "where": error.where, "remedy": error.remedy})
            raise

    on_gpu = config.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": config.cpus_per_worker}
    if on_gpu:
        resources["GPU"] = config.gpus_per_worker
    number: int | tuple[int, int] = config.workers
    if config.fewest < config.workers:
        number = (config.fewest, config.workers)
        # for workers on a node that is gone, but not yet known to be; then Ray counts anew
        os.environ.setdefault(START_TIMEOUT, str(SETTLED_SECONDS))
    trainer = TorchTrainer(
        work_or_tell,
        torch_config=GroupConfig(
            backend="nccl" if on_gpu else "gloo",
            timeout_s=math.ceil(hang.longest_seconds + COLLECTIVE_SPARE_SECONDS),
            max_failures=config.max_failures,
        ),
        scaling_config=ScalingConfig(
            num_workers=number,
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
    write_json(reservation, {"requester": f"train-{trainer.train_run_context.run_id}"})
    failure: Exception | None = None
    try:
        _fit(trainer, config)
    except UserError:  # no nodes; what is reserved is given up by the next start
        raise
    except Exception as error:  # Ray wraps whatever a worker raised
        failure = error
    reservation.unlink(missing_ok=True)
    told = read_json(mistake)
    if told is not None:
        mistake.unlink()
        raise UserError(**told)
    if failure is not None:
        raise _told(failure, config) from None


def _release(reservation: Path) -> None:
    """What a command that was killed or stopped had reserved for its workers. Ray keeps it for three minutes: a range of
    workers would wait for it, and an autoscaler would add nodes for it."""
    left = read_json(reservation)
    if left is None:
        return
    from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
        TrainAutoscalingCoordinatorClient,
    )

    TrainAutoscalingCoordinatorClient(left["requester"]).cancel_resource_request()


def _check_room(config: RayConfig) -> None:
    """Workers that fit nowhere would be waited for in silence. Raises UserError on a local Ray, which cannot grow; what a
    cluster lacks is told, and waited for, by `_fit`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while short := _lacking(config):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if short and not (config.address or os.environ.get("RAY_ADDRESS")):
        raise UserError(
            f"the workers ask for {short} on this machine",
            where="ray.workers, ray.cpus_per_worker, ray.gpus_per_worker",
            remedy="lower them, or name a cluster with ray.address",
        )


def _lacking(config: RayConfig) -> str:
    """What the living nodes would lack for the fewest workers though all of them were idle, in words; "" if nothing."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    short = []
    for kind, amount in each.items():
        there = sum(node.get(kind, 0) for node in nodes)
        if config.fewest * amount > there:
            short.append(f"{config.fewest * amount:g} {kind}s ({there:g} there)")
    fit = sum(all(node.get(kind, 0) >= amount for kind, amount in each.items()) for node in nodes)
    if config.placement == "STRICT_SPREAD" and fit < config.fewest:
        short.append(f"a node each, {config.fewest} in all ({fit} there)")
    return " and ".join(short)


def _fit(trainer: Any, config: RayConfig) -> None:
    """In a thread: in the main one Ray Train takes Ctrl-C to itself, and the command would end as if it had failed. Tells
    what nodes are lacking. Raises UserError if none come."""
    done: Future[None] = Future()

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=fit, name="fit", daemon=True).start()
    patience = math.inf if config.wait_minutes is None else 60 * config.wait_minutes
    looked, since, told = -math.inf, math.inf, ""
    while not done.done():  # a signal that another thread takes does not end a wait, so none is long
        wait([done], timeout=0.3)
        if time.monotonic() < looked + LOOK_SECONDS:
            continue
        looked, short = time.monotonic(), _lacking(config)
        since = min(since, looked) if short else math.inf
        if short and short != told:
            logger.warning(f"the workers ask for {short}: waiting until nodes join the cluster")
        elif told and not short:
            logger.info("the nodes are there")
        told = short
        if looked > since + patience:
            raise UserError(
                f"the workers ask for {short}, and no nodes came for {config.wait_minutes:g} minutes",
                where="ray.wait_minutes",
                remedy="the same command goes on once they are there; or lower ray.workers, with a range ray.min_workers",
            )
    done.result()


def _told(failure: Exception, config: RayConfig) -> Exception:
    """What ended the workers, in one line if they died or never met; their own traceback if they failed."""
    from antdist.distributed.process_group import APART, INTERFACE

    if apart := re.search(rf"{APART} \(.*\)", str(failure)):
        return UserError(
            apart[0],
            where=f"ray.max_failures {config.max_failures}",
            remedy=f"see that all nodes reach each other on all ports; where they are to use another network than Ray does, set "
            f"{INTERFACE} (with GPUs NCCL_SOCKET_IFNAME) where Ray is started on them",
        )
    if "The actor died unexpectedly" not in str(failure):
        return failure
    log = re.search(r"log_file_path='([^']+)'", str(failure))
    return UserError(
        "a worker died: killed, out of memory, hung (then hang/ in the run's folder has its stacks), or its node is gone"
        + (f" (its log, on its node: {log[1]})" if log else ""),
        where=f"ray.max_failures {config.max_failures}",
        remedy="the same command goes on from the last checkpoint",
    )


def enter_worker(cpus: int) -> None:
    """Set up a worker: its share of the cores (Ray Train allows one thread), its log, quiet libraries."""
    import torch

    setup_logging()

    torch.set_num_threads(cpus)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
