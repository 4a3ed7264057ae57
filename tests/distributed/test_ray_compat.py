"""Ray's private interfaces are still what `antdist.distributed.ray_compat` was written against."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from antdist.distributed import ray_compat
from tests import ray_internals

PROJECT = Path(__file__).resolve().parents[2]
ALLOWED = {"antdist/distributed/ray_compat.py", "tests/ray_internals.py", "tests/distributed/test_ray_compat.py"}


def private_uses(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        yield from (name for name in names if name.startswith("ray.") and "._" in name)


def test_only_ray_compat_uses_private_ray() -> None:
    files = [path for room in ("antdist", "launch", "benchmarks", "tests") for path in (PROJECT / room).rglob("*.py")]
    assert {str(path.relative_to(PROJECT)) for path in files if any(private_uses(path))} == ALLOWED


def test_the_version_is_the_one_written_against() -> None:
    import ray

    assert ray.__version__.startswith("2.60.")


def test_a_local_ray_would_use_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import ray_constants, services

    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == ray_compat.CLUSTER_VARIABLE
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    monkeypatch.setenv(ray_compat.CLUSTER_VARIABLE, "1")
    before = ray_constants.ENABLE_RAY_CLUSTER
    with ray_compat.listen_on_loopback():
        assert services.get_node_ip_address() in ("127.0.0.1", "::1")
        assert not ray_constants.env_bool(ray_compat.CLUSTER_VARIABLE, True)
    assert ray_constants.ENABLE_RAY_CLUSTER is before
    assert ray_constants.env_bool(ray_compat.CLUSTER_VARIABLE, False)


def test_ray_init_takes_the_agent_port_from_its_parameters() -> None:
    import ray
    from ray._private import parameter

    original = parameter.RayParams
    with ray_compat.use_free_agent_port():
        assert ray._private.parameter.RayParams().dashboard_agent_listen_port == 0
    assert parameter.RayParams is original
    # looked up in its module at each call, so that the replacement is seen
    assert "ray._private.parameter.RayParams(" in inspect.getsource(ray._private.worker)


def test_the_dashboard_address_is_known_to_the_worker() -> None:
    from ray._private import worker

    assert not inspect.signature(worker.get_dashboard_url).parameters


def test_a_notice_of_preemption_is_left_in_the_context() -> None:
    from ray.train.v2._internal.execution.context import PreemptionContext, TrainContext, get_train_context

    assert callable(get_train_context)
    assert "preemption_context" in inspect.getsource(TrainContext)
    assert "preemption_info" in vars(PreemptionContext()) or "preemption_info" in PreemptionContext.__annotations__


def test_a_reservation_is_cancelled_by_its_requester() -> None:
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as client

    kind = client.TrainAutoscalingCoordinatorClient
    assert len(inspect.signature(kind).parameters) >= 1
    assert callable(kind.cancel_resource_request)


def test_the_process_group_can_be_started_again() -> None:
    from ray.train.torch import TorchConfig
    from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupState

    backend = ray_compat.torch_backend_class()
    assert list(inspect.signature(backend.on_start).parameters)[:3] == ["self", "worker_group", "backend_config"]
    assert isinstance(inspect.getattr_static(TorchConfig, "backend_cls"), property)
    assert issubclass(ray_compat.startup_error_class(), Exception)
    ray_compat.startup_error_class()("a reason alone makes it")
    assert callable(WorkerGroup.execute) and callable(WorkerGroup.get_worker_group_state)
    assert callable(WorkerGroupState.shutdown)


def test_the_start_timeout_is_read_from_the_environment() -> None:
    from ray.train.v2._internal import constants

    assert constants.WORKER_GROUP_START_TIMEOUT_S_ENV_VAR == ray_compat.START_TIMEOUT_VARIABLE


@pytest.mark.parametrize("name", [*ray_compat.RAY_DATA_LOGGERS, *ray_compat.JOB_CLIENT_LOGGERS])
def test_the_silenced_loggers_exist(name: str) -> None:
    from importlib.util import find_spec

    assert find_spec(name) is not None  # each is the logger of a module, or of the modules of a package
    assert logging.getLogger(name).name == name


def test_what_the_tests_take_from_ray_exists() -> None:
    assert ray_internals.drain_timeout_variable() == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert callable(ray_internals.create_package) and callable(ray_internals.list_actors)


def test_only_the_log_level_line_is_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), ray_compat.hide_log_level_line():
        os.write(2, b"[1] " + ray_compat.LOG_LEVEL_LINE + b" RAY_BACKEND_LOG_LEVEL to 3\nkept\n")
        print("kept too", file=sys.stderr)
        raise RuntimeError
    os.write(2, b"after\n")
    assert sorted(capfd.readouterr().err.splitlines()) == ["after", "kept", "kept too"]


@pytest.mark.ray
def test_a_local_ray_starts_without_its_log_level_line() -> None:
    code = (
        "from antdist.config.schema import RayConfig; from antdist.distributed.ray_session import ray_session\n"
        "with ray_session(RayConfig()): pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert "log level" not in done.stderr, done.stderr
