"""What turns losses into weight updates: the interface, and the plain-torch engine (the tested twin of DeepSpeed's).

Both hold the full-precision weights and Adam's moments; both give them out whole, by parameter name, on rank 0, so that a
checkpoint knows nothing of ranks or ZeRO stages.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antdist.config.schema import TrainingConfig
from antdist.distributed.world import World, agree

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class EngineState:
    """Everything an engine must get back to go on, free of topology; on the leader only (empty elsewhere).

    `weights` are float32, `moments[name of moment][parameter]` likewise; `updates` counts optimizer steps; `scale` is the
    loss scale of fp16, None otherwise.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    updates: int = 0
    scale: float | None = None


class Engine(Protocol):
    """One micro-batch: `forward`, then `backward`; after the last one of a step: `update`."""

    model: nn.Module

    def forward(self, *args: object) -> object:
        """The model's forward pass, in the configured precision."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's contribution to the loss; the sum over micro-batches and ranks is the step's."""

    def update(self, learning_rate: float) -> Tensor:
        """One optimizer step; on all ranks none, if a gradient is no number on any. Gives 1 then, else 0, of shape (), on
        the device. Nothing in it waits for the device, where clipping or fp16 do not ask for it."""

    def whole_model(self) -> nn.Module:
        """The model with all its present weights on this rank, to evaluate with. Collective: all ranks call it."""

    def state(self, into: EngineState | None = None) -> EngineState:
        """A copy in the CPU's memory that training on does not touch; in the memory of `into`, an earlier one that nobody
        needs any more, which saves the system from finding it anew. Collective: all ranks call it."""

    def load(self, state: EngineState) -> None:
        """Collective: all ranks call it; only the leader's `state` counts."""


def copy_to(kept: dict[str, Tensor], name: str, value: Tensor) -> None:
    """A float32 copy of `value` to `kept[name]` in the CPU's memory, over what lies there if something does."""
    if name not in kept:
        kept[name] = torch.empty(value.shape, dtype=torch.float32)
    kept[name].copy_(value.detach())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in `precision`; what needs float32 stays there ("fused precision")."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def optimizer_for(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay over the learned parameters, fused where the device has it."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        learned,
        lr=config.learning_rate,
        betas=BETAS,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def refuse_broken_gradients(optimizer: torch.optim.Optimizer, world: World) -> Tensor:
    """Have the fused optimizer's coming step change nothing, neither weights nor moments nor their counter, if on any rank
    a gradient that it holds is no number. Gives 1 then, else 0, on the device. Collective."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # a sum is a number only if all its terms are
    whole = torch.nn.utils.get_total_norm(gradients, 1.0).to(world.device)
    broken = (~whole.isfinite()).float()
    if world.size > 1:
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    optimizer.found_inf = broken  # type: ignore[attr-defined]  # what torch.amp.GradScaler sets
    return broken


class PlainEngine:
    """Torch alone: gradients are summed over the ranks of the process group, if there is one."""

    def __init__(self, model: nn.Module, config: TrainingConfig, world: World) -> None:
        self.model = model.to(world.device)
        self.config, self.world = config, world
        self.optimizer = optimizer_for(model, config, world.device)
        self.optimizer.register_step_pre_hook(self._before_step)
        self._broken = torch.zeros((), device=world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        if world.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def forward(self, *args: object) -> object:
        with autocast(self.config.precision, self.world.device):
            return self.model(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._broken = refuse_broken_gradients(optimizer, self.world)

    def update(self, learning_rate: float) -> Tensor:
        learned = self._learned()
        for parameter in learned.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size > 1:
            self._sum_gradients(list(learned.values()))
        self.scaler.unscale_(self.optimizer)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(learned.values(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self._broken

    def whole_model(self) -> nn.Module:
        return self.model

    def _updates(self) -> int:
        """Optimizer steps taken; those whose gradients are no numbers are not."""
        counters = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        return int(counters[0]) if counters else 0

    def _learned(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @staticmethod
    def _sum_gradients(parameters: list[nn.Parameter]) -> None:
        flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        dist.all_reduce(flat)
        start = 0
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def state(self, into: EngineState | None = None) -> EngineState:
        if not self.world.leader:
            return EngineState()
        whole = into or EngineState(moments={moment: {} for moment in MOMENTS})
        for name, weight in self.model.named_parameters():
            copy_to(whole.weights, name, weight)
        for name, parameter in self._learned().items():
            for moment in MOMENTS:
                kept = self.optimizer.state.get(parameter, {}).get(moment)
                copy_to(whole.moments[moment], name, torch.zeros_like(parameter) if kept is None else kept)
        whole.updates = self._updates()
        whole.scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        return whole

    def load(self, state: EngineState) -> None:
        state = agree(self.world, state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.weights[name])
        for name, parameter in self._learned().items():
            moments = {moment: state.moments[moment][name].to(parameter.device).clone() for moment in MOMENTS}
            counter = torch.tensor(float(state.updates), device=parameter.device)
            self.optimizer.state[parameter] = {"step": counter, **moments}
        if state.scale is not None and self.scaler.is_enabled():
            self.scaler = torch.amp.GradScaler(self.world.device.type, init_scale=state.scale)
