"""Everything that antdist takes from Ray's private modules, written against Ray 2.60.

setup.cfg pins `ray>=2.60,<2.61`.

`tests/distributed/test_ray_compat.py` fails where another version of Ray no longer has what is used here, and where any other
module imports from Ray's private ones. Ray is imported in the functions: `antdist --help` must not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

# Loggers that print the plan and progress of each Ray Data execution at INFO; Ray has no public switch for them.
RAY_DATA_LOGGERS = ("ray.data._internal.execution.streaming_executor", "ray.data._internal.progress")
# Loggers that print each request of the job client at INFO.
JOB_CLIENT_LOGGERS = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")
# How long Ray Train waits for a group of workers to start; read from the environment only.
START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
STANDARD_ERROR = 2
LOG_LEVEL_LINE = b"Set ray log level from environment variable"


@contextlib.contextmanager
def listen_on_loopback() -> Iterator[None]:
    """Make a local Ray, started within the block, listen on loopback alone.

    Its processes, and those that they start, then use 127.0.0.1 as the node's address.

    Whoever reaches Ray's ports can run code in it. Ray uses loopback on systems where it does not support clusters, which it
    reads from a constant (in this process) and an environment variable (in those that it starts); elsewhere it listens on all
    addresses, whatever address it is given.
    """
    from ray._private import ray_constants

    constant, variable = ray_constants.ENABLE_RAY_CLUSTER, os.environ.get(CLUSTER_VARIABLE)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[CLUSTER_VARIABLE] = "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(CLUSTER_VARIABLE)
        if variable is not None:
            os.environ[CLUSTER_VARIABLE] = variable


@contextlib.contextmanager
def hide_log_level_line() -> Iterator[None]:
    """Around `ray.init`: drop the line in which Ray's core announces its log level.

    The core writes it to the file descriptor of standard error before any level holds, if RAY_BACKEND_LOG_LEVEL is set. So the
    descriptor leads to a file within the block; all other lines are passed on when the block ends, also by an error.
    """
    sys.stderr.flush()
    terminal = os.dup(STANDARD_ERROR)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), STANDARD_ERROR)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, STANDARD_ERROR)
            os.close(terminal)
            caught.seek(0)
            for line in caught:
                if LOG_LEVEL_LINE not in line:
                    os.write(STANDARD_ERROR, line)


@contextlib.contextmanager
def use_free_agent_port() -> Iterator[None]:
    """Around `ray.init`: make the agent that starts jobs listen on a free port.

    Ray's fixed port may belong to another Ray on this machine, and `ray.init`, unlike `ray start`, has no option for it.
    """
    from ray._private import parameter

    original = parameter.RayParams
    parameter.RayParams = functools.partial(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = original


def dashboard_address() -> str:
    """Return HOST:PORT of the dashboard of this process's Ray.

    `ray.init` returns it, but not to a later caller.
    """
    from ray._private.worker import get_dashboard_url

    return str(get_dashboard_url())


def preemption_context() -> Any:
    """Return, on a Ray Train worker, the object in which Ray leaves its notice that a node is about to go.

    The public `ray.train.get_preemption_info()` asks an actor and waits for all workers on each call; the training loop asks
    before every step and agrees by itself.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context


def cancel_reservation(requester: str) -> None:
    """Cancel the resources that a Ray Train run has reserved.

    Ray keeps those of a killed driver for three minutes: an elastic run would wait for them, and an autoscaler add nodes.
    """
    from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
        TrainAutoscalingCoordinatorClient,
    )

    TrainAutoscalingCoordinatorClient(requester).cancel_resource_request()


def reservation_requester(trainer: Any) -> str:
    """Return the name under which a trainer reserves its resources."""
    return f"train-{trainer.train_run_context.run_id}"


def torch_backend_class() -> Any:
    """Return the class that starts Ray Train's process group.

    A subclass is the only way to repeat a failed start.
    """
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def startup_error_class() -> type[Exception]:
    """Return the error after which Ray Train starts the workers again, and counts a failure."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    return WorkerGroupStartupFailedError


def shut_down_group(worker_group: Any) -> None:
    """Release the placement group of workers that failed to start.

    It would keep the resources from the next attempt.
    """
    worker_group.get_worker_group_state().shutdown()
