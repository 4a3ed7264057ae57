"""The engine interface, and what the plain and the DeepSpeed engine share.

Both keep float32 master weights and Adam's moments, and both export them complete, by parameter name, on the leader: a
checkpoint knows neither ranks nor ZeRO stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antdist.config.schema import TrainingConfig
from antdist.distributed.world import World

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


def empty_moments() -> dict[str, dict[str, Tensor]]:
    """A dictionary by parameter name for each of Adam's moments."""
    return {moment: {} for moment in MOMENTS}


@dataclass
class EngineState:
    """All that an engine needs to resume, independent of topology. Filled on the leader, empty elsewhere.

    `weights` are float32, and so is `moments[moment][parameter]`; `updates` counts optimizer steps; `scale` is the loss
    scale of fp16, None otherwise.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int = 0
    scale: float | None = None


class Engine(Protocol):
    """Turns losses into updates: `forward` and `backward` per micro-batch, `update` per step."""

    model: nn.Module

    def forward(self, *args: object) -> object:
        """Run the model's forward pass in the configured precision."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add this rank's gradient; a step's gradient is the sum over micro-batches and ranks."""

    def update(self, learning_rate: float) -> Tensor:
        """Take one optimizer step, or none on any rank if a gradient is NaN or Inf on one.

        Does not wait for the device unless clipping or fp16 require it.

        Returns:
            (), on the device: 1 if the step was skipped, else 0.
        """

    def full_model(self) -> nn.Module:
        """Return the model with its complete current weights on this rank, for evaluation. Collective."""

    def state(self, into: EngineState | None = None) -> EngineState:
        """Copy the state to CPU memory, where further training does not change it. Collective.

        Args:
            into: an earlier state that is no longer needed; its memory is reused, which saves page faults.
        """

    def load(self, state: EngineState) -> None:
        """Restore a state; only the leader's counts. Collective."""


def copy_to_cpu(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Copy `value` as float32 into `tensors[name]` in CPU memory, which is reused if it exists."""
    if name not in tensors:
        tensors[name] = torch.empty(value.shape, dtype=torch.float32)
    tensors[name].copy_(value.detach())


def build_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Build Adam with decoupled weight decay over the trainable parameters, fused if supported."""
    return torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def count_updates(optimizer: torch.optim.Optimizer) -> int:
    """Count the optimizer steps taken; skipped ones are not among them."""
    counters = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(counters[0]) if counters else 0


def skip_nonfinite_step(optimizer: torch.optim.Optimizer, world: World) -> Tensor:
    """Make the fused optimizer's next step a no-op if any rank holds a NaN or Inf gradient. Collective.

    The fused kernels read `found_inf` on the device and leave weights, moments and step counter unchanged if it is set,
    so the decision needs no synchronisation with the host.

    Returns:
        (), on the device: 1 if the step will be skipped, else 0.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # one norm instead of a test of each element: it is finite only if all its terms are
    norm = torch.nn.utils.get_total_norm(gradients, 1.0).to(world.device)
    nonfinite = (~norm.isfinite()).float()
    if world.size > 1:
        dist.all_reduce(nonfinite, dist.ReduceOp.MAX)
    optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # the attribute that torch.amp.GradScaler sets
    return nonfinite


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the shape of the complete parameter, also where ZeRO stage 3 keeps a partition on each rank."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def local_values(parameter: nn.Parameter, rank: int) -> Tensor:
    """Return what this rank holds of a parameter: under ZeRO stage 3 its partition without padding."""
    partition = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.detach()
    first = rank * partition.numel()
    values: Tensor = partition.detach()[: max(full_shape(parameter).numel() - first, 0)]
    return values
