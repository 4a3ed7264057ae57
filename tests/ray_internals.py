"""What tests alone take from Ray's private modules, written against Ray 2.60; `tests/distributed/test_ray_compat.py` checks it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any


def list_actors() -> dict[str, Any]:
    """Return all actors by id; the public `ray.util.state` asks the dashboard, which the tests do not start."""
    import ray

    return dict(ray._private.state.actors())


def create_package(folder: Path, package: Path) -> None:
    """Zip a folder as a job's working directory, which `ray job submit` does before it uploads it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    packaging.create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())


def drain_timeout_variable() -> str:
    """Return the variable that says how long a node that gets SIGTERM drains."""
    from ray._private import ray_constants

    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, name)
    return name


def count_reserved_nodes(requester: str) -> int:
    """Return how many nodes Ray has reserved for a Ray Train run."""
    import ray

    return len(ray.get(_coordinator().get_reserved_resources.remote(requester)))


def reserve(requester: str, resources: dict[str, float]) -> None:
    """Reserve resources as a Ray Train run does."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import ResourceRequestPriority

    request = _coordinator().request_resources
    ray.get(request.remote(requester, [resources], expire_after_s=3600, priority=ResourceRequestPriority.HIGH))


def _coordinator() -> Any:
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator()


def prepare_cluster_config(config: dict[str, Any]) -> dict[str, Any]:
    """Complete and validate a configuration as `ray up` does before it asks the cloud. Raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(complete)
    return complete
