"""The ranks of a run, and the few collectives that training and evaluation need.

Each is the identity for a single rank without a process group, so the same code runs in one plain process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from antdist.data.stream.shard_batch import partition_rows

T = TypeVar("T")
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """This process's rank, and the number of ranks. Collectives use the default process group."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leader(self) -> bool:
        return self.rank == 0


def current_world() -> World:
    """Return the world of the current process group, on its local GPU if it has one.

    Without a group it is a single rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        return World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def row_ranges(rows: int, parts: int) -> list[tuple[int, int]]:
    """`rows` cut into `parts` contiguous ranges, as `shard_batch` shares items among ranks."""
    return [partition_rows(rows, part, parts) for part in range(parts)]


def row_gather(world: World, rows: int) -> Gather | None:
    """Make a differentiable function that gathers this rank's (n_r, w) rows to all (rows, w).

    It is None for a single rank.

    The gradient of a row is summed over the ranks that used it, and returns to the rank that computed it (law 2).
    """
    if world.size == 1:
        return None
    return lambda local: _GatherRows.apply(local, world, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: Tensor, world: World, rows: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.world, ctx.sizes = world, [stop - start for start, stop in row_ranges(rows, world.size)]
        padded = local.new_zeros(ctx.sizes[0], local.shape[1])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in ctx.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, ctx.sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        # each rank receives the gradients of its rows from all ranks, and adds them in rank order
        own = ctx.sizes[ctx.world.rank]
        parts = gradient.new_empty(ctx.world.size, own, gradient.shape[1])
        dist.all_to_all_single(parts.flatten(0, 1), gradient.contiguous(), [own] * ctx.world.size, ctx.sizes)
        return parts.sum(0), None, None


def sum_over_ranks(world: World, value: Tensor) -> Tensor:
    """Return the elementwise sum of `value` over all ranks, in a new tensor."""
    total = value.detach().clone()
    if world.size > 1:
        dist.all_reduce(total)
    return total


def gather_objects(world: World, value: T) -> list[T]:
    """Return every rank's `value`, in rank order.

    For trusted peers only: torch sends it pickled within the job.
    """
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def agree(world: World, value: T) -> T:
    """Return the leader's `value` on all ranks, so that they decide alike."""
    if world.size == 1:
        return value
    box: list[T | None] = [value if world.leader else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()
