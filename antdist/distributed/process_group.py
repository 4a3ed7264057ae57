"""The process group of Ray Train's workers, on a network of several machines.

It imports ray, so import it lazily.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.train.torch import TorchConfig

from antdist import faults
from antdist.distributed.ray_compat import shut_down_group, startup_error_class, torch_backend_class

INTERFACE = "GLOO_SOCKET_IFNAME"
NOT_CONNECTED = "the workers cannot connect to each other"

_TorchBackend: Any = torch_backend_class()


@dataclass
class GroupConfig(TorchConfig):
    """A process group on the interfaces that Ray uses.

    Args:
        max_failures: how often to start it again if the workers cannot connect to each other; -1: without limit.
    """

    max_failures: int = 0

    @property
    def backend_cls(self) -> type[GroupBackend]:
        return GroupBackend


class GroupBackend(_TorchBackend):
    """Start the process group of each new set of workers, in Ray Train's controller."""

    def __init__(self) -> None:
        self.failed = 0

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Start the process group, or raise an error after which Ray Train tries again.

        Ray Train itself ends a run whose process group does not start, although a node may have been lost meanwhile; and
        where it does try again, the placement group of the first attempt keeps the resources.
        """
        try:
            worker_group.execute(prepare_to_join)
            super().on_start(worker_group, backend_config)
        except (RayActorError, RayTaskError) as error:
            shut_down_group(worker_group)
            self.failed += 1
            reason = f"{NOT_CONNECTED} ({str(error).strip().splitlines()[-1]})"
            if 0 <= backend_config.max_failures < self.failed:
                raise RuntimeError(reason) from error
            raise startup_error_class()(reason) from error
        self.failed = 0


def prepare_to_join() -> None:
    """Choose the network interface, on a worker, before it connects to the others."""
    faults.inject("join", rank=ray.train.get_context().get_world_rank())
    address = ray.util.get_node_ip_address()
    name = find_interface(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)
    if ipaddress.ip_address(address).is_loopback:
        _bind_store_to(address)


def _bind_store_to(address: str) -> None:
    """Make the store through which the ranks find each other listen on this address only.

    torch makes it listen on all addresses, whatever address it is given, and it does not authenticate its clients.
    """
    from torch.distributed import TCPStore

    def store(*, port: int, is_master: bool, **options: Any) -> TCPStore:
        if is_master:
            options["master_listen_fd"] = socket.create_server((address, port)).detach()
        return TCPStore(port=port, is_master=is_master, **options)

    # through sys.modules, as the attribute torch.distributed.rendezvous is a function of the same name
    vars(sys.modules["torch.distributed.rendezvous"])["TCPStore"] = store


def find_interface(address: str) -> str | None:
    """Return the network interface that has this address.

    It is None if none has, as behind network address translation.

    By default gloo uses the address to which the host name resolves, which is often on loopback (127.0.1.1 in Debian's
    /etc/hosts) and unreachable from other machines. The address that Ray uses is reachable.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
