"""Divergence: NaN or Inf losses, gradients or weights from which a run cannot recover."""

from __future__ import annotations

import torch
from torch import nn

from antdist.distributed.world import World, sum_over_ranks
from antdist.errors import UserError
from antdist.training.engines.base import local_values


class Diverged(UserError):
    """The loss, gradients or weights are NaN or Inf. Raised on all ranks; a retry would end alike."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(
            what,
            where=where,
            remedy="lower training.learning_rate, set training.clip, or train in fp32; then start again: the run "
            "resumes from its last checkpoint",
        )


def weights_are_finite(model: nn.Module, world: World) -> bool:
    """Whether no weight on any rank is NaN or Inf. Collective."""
    # a sum is finite only if all its terms are, and is ten times as fast as testing each
    sums = torch.stack([local_values(weight, world.rank).float().sum() for weight in model.parameters()])
    return not sum_over_ranks(world, (~sums.isfinite().all()).int())
