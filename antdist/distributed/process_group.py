"""How Ray Train's workers find each other on a network of several machines. Imports ray: it is imported lazily."""

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
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

from antdist import faults

INTERFACE = "GLOO_SOCKET_IFNAME"
APART = "the workers do not find each other"


@dataclass
class GroupConfig(TorchConfig):
    """A process group on the interfaces that Ray uses, tried `max_failures` times more where the workers do not find each
    other; -1: for ever."""

    max_failures: int = 0

    @property
    def backend_cls(self) -> type[GroupBackend]:
        return GroupBackend


class GroupBackend(_TorchBackend):
    """Lives in Ray Train's controller, and starts the process group for each new set of workers."""

    def __init__(self) -> None:
        self.failed = 0

    def on_start(self, worker_group: Any, backend_config: GroupConfig) -> None:
        """Ray Train ends a run whose process group does not start, though it may be a node that was lost meanwhile, and
        where it tries again the first try's placement group keeps the resources. Both are mended here."""
        try:
            worker_group.execute(join)
            super().on_start(worker_group, backend_config)
        except (RayActorError, RayTaskError) as error:
            worker_group.get_worker_group_state().shutdown()
            self.failed += 1
            reason = f"{APART} ({str(error).strip().splitlines()[-1]})"
            if 0 <= backend_config.max_failures < self.failed:
                raise RuntimeError(reason) from error
            raise WorkerGroupStartupFailedError(reason) from error
        self.failed = 0


def join() -> None:
    """On a worker, before it meets the others."""
    faults.inject("join", rank=ray.train.get_context().get_world_rank())
    address = ray.util.get_node_ip_address()
    name = interface_of(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)
    if ipaddress.ip_address(address).is_loopback:
        _keep_store_at(address)


def _keep_store_at(address: str) -> None:
    """The store over which a group's members meet listens at this address alone; torch has it listen at all, whatever it is
    told, and asks nobody who he is."""
    from torch.distributed import TCPStore

    def store(*, port: int, is_master: bool, **options: Any) -> TCPStore:
        if is_master:
            options["master_listen_fd"] = socket.create_server((address, port)).detach()
        return TCPStore(port=port, is_master=is_master, **options)

    # by its name, as torch.distributed, which has imported it, has a function called like this module
    vars(sys.modules["torch.distributed.rendezvous"])["TCPStore"] = store


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None if none has, as behind a translation of addresses.

    By itself gloo takes the address that the machine's own name stands for, which is often one of loopback (127.0.1.1 in
    Debian's /etc/hosts) that no other machine reaches. Ray has found an address that they do reach.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None
