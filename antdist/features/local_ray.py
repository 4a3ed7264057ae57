"""A Ray of the command's own listens on loopback alone: whoever reaches a Ray's ports may run code in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


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
