"""The plain-torch engine: the tested twin of the DeepSpeed engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from antdist.config.schema import TrainingConfig
from antdist.distributed.world import World, agree
from antdist.training.engines.base import (
    MOMENTS,
    EngineState,
    build_optimizer,
    copy_to_cpu,
    count_updates,
    empty_moments,
    skip_nonfinite_step,
)


class PlainEngine:
    """Implements `Engine` with torch alone; gradients are summed over the ranks of the process group."""

    def __init__(self, model: nn.Module, config: TrainingConfig, world: World) -> None:
        self.model = model.to(world.device)
        self.config, self.world = config, world
        self.optimizer = build_optimizer(model, config, world.device)
        self.optimizer.register_step_pre_hook(self._before_step)
        self._nonfinite = torch.zeros((), device=world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        if world.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def forward(self, *args: object) -> object:
        precision = self.config.precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        with torch.autocast(self.world.device.type, dtype=dtype, enabled=precision != "fp32"):
            return self.model(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.scaler.scale(loss).backward()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._nonfinite = skip_nonfinite_step(optimizer, self.world)

    def update(self, learning_rate: float) -> Tensor:
        trainable = self._trainable()
        for parameter in trainable.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world.size > 1:
            self._sum_gradients(list(trainable.values()))
        self.scaler.unscale_(self.optimizer)
        if self.config.clip is not None:
            torch.nn.utils.clip_grad_norm_(trainable.values(), self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self._nonfinite

    def full_model(self) -> nn.Module:
        return self.model

    def _trainable(self) -> dict[str, nn.Parameter]:
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
        state = into or EngineState(moments=empty_moments())
        for name, weight in self.model.named_parameters():
            copy_to_cpu(state.weights, name, weight)
        for name, parameter in self._trainable().items():
            for moment in MOMENTS:
                value = self.optimizer.state.get(parameter, {}).get(moment)
                copy_to_cpu(state.moments[moment], name, torch.zeros_like(parameter) if value is None else value)
        state.updates = count_updates(self.optimizer)
        state.scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        return state

    def load(self, state: EngineState) -> None:
        state = agree(self.world, state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(state.weights[name])
        for name, parameter in self._trainable().items():
            moments = {moment: state.moments[moment][name].to(parameter.device).clone() for moment in MOMENTS}
            counter = torch.tensor(float(state.updates), device=parameter.device)
            self.optimizer.state[parameter] = {"step": counter, **moments}
        if state.scale is not None and self.scaler.is_enabled():
            self.scaler = torch.amp.GradScaler(self.world.device.type, init_scale=state.scale)
