"""The DeepSpeed engine: ZeRO stages 0 to 3, its state taken out and put back whole.

DeepSpeed's own checkpoints know the number of ranks and the stage; ours must not (architecture, law 6), so weights and
moments are gathered by parameter name here.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterator, KeysView
from typing import Any

import torch
from torch import Tensor, nn

from antdist.config.schema import TrainingConfig
from antdist.distributed.world import World, agree
from antdist.errors import UserError
from antdist.training.engines.plain import MOMENTS, EngineState, copy_to, optimizer_for, refuse_broken_gradients

OURS = {
    "train_batch_size": "stream.batch_size",
    "train_micro_batch_size_per_gpu": "stream.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_clipping": "training.clip",
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.schedule",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "torch_autocast": "training.precision",
}


def check_passthrough(section: dict[str, Any]) -> None:
    """Refuse keys of `training.deepspeed` that another key of ours decides. Raises UserError."""
    for key in sorted(section.keys() & OURS.keys()):
        raise UserError(
            "this is decided elsewhere in the configuration",
            where=f"training.deepspeed.{key}",
            remedy=f"remove it and set {OURS[key]}",
        )
    if not isinstance(zero := section.get("zero_optimization", {}), dict):
        raise UserError(
            f"is a section of keys, not {zero!r}",
            where="training.deepspeed.zero_optimization",
            remedy="write it as in DeepSpeed's documentation; its stage is training.zero_stage",
        )
    if "stage" in zero:
        raise UserError(
            "this is decided elsewhere in the configuration",
            where="training.deepspeed.zero_optimization.stage",
            remedy="remove it and set training.zero_stage",
        )


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for ours, with the `deepspeed:` section merged in."""
    check_passthrough(config.deepspeed)
    ours: dict[str, Any] = {
        # what a "sample" is, is our stream's business; DeepSpeed only needs numbers that multiply
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip or 0.0,
        "steps_per_print": 1 << 40,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": config.zero_stage},
    }
    if config.precision != "fp32":
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.precision]
        ours["torch_autocast"] = {"enabled": True, "dtype": dtype}
    if _norm_is_unused(config):
        ours["zero_optimization"]["compute_grad_norm"] = False
    for key, value in config.deepspeed.items():
        ours[key] = {**ours[key], **value} if isinstance(value, dict) and isinstance(ours.get(key), dict) else value
    return ours


def check_with_deepspeed(config: TrainingConfig) -> None:
    """Let DeepSpeed read its section, if there is one. Of keys at the top of it that it does not know it says nothing: those
    that it did not look for are refused here.

    Raises:
        UserError: naming the key, or with DeepSpeed's words.
    """
    if not config.deepspeed:
        return
    logging.disable(logging.WARNING)  # it misses a GPU, which the driver's node may lack
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    finally:
        logging.disable(logging.NOTSET)
    noting = _Noting(deepspeed_config(config))
    with _refusals_told():
        DeepSpeedConfig(noting)
    for key in sorted(config.deepspeed.keys() - noting.looked_for):
        near = difflib.get_close_matches(key, noting.looked_for - OURS.keys(), n=1)
        raise UserError(
            "DeepSpeed knows no such key" + (f"; did you mean {near[0]}?" if near else ""),
            where=f"training.deepspeed.{key}",
            remedy="correct it after DeepSpeed's documentation, or leave it out",
        )


class _Noting(dict[str, Any]):
    """A mapping that notes which keys it was asked for."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.looked_for: set[str] = set()

    def __copy__(self) -> _Noting:
        return self

    def __contains__(self, key: object) -> bool:
        self.looked_for.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.looked_for.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_for.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # whose `in` asks us
        return KeysView(self)


@contextlib.contextmanager
def _refusals_told() -> Iterator[None]:
    """What DeepSpeed raises of its configuration, as a UserError."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError, DeepSpeedConfigError) as error:
        raise UserError(
            f"DeepSpeed refuses it: {' '.join(str(error).split())[:300]}",
            where="training.deepspeed",
            remedy="correct it after DeepSpeed's documentation, or leave it out",
        ) from error


def _norm_is_unused(config: TrainingConfig) -> bool:
    """Whether DeepSpeed may leave the gradient's norm alone, which it looks at on the host in each step: clipping needs it,
    and so does fp16, to find gradients that overflow. Other stages, and offloading, do not let it."""
    zero = config.deepspeed.get("zero_optimization", {})
    return (
        config.clip is None
        and config.precision != "fp16"
        and config.zero_stage in (1, 2)
        and not zero.keys() & {"offload_optimizer", "cpu_offload", "zenflow"}
    )


class DeepSpeedEngine:
    """Implements `antdist.training.engines.plain.Engine`; needs the process group that Ray Train or a test has set up."""

    def __init__(self, model: nn.Module, config: TrainingConfig, world: World) -> None:
        import deepspeed

        self.config, self.world = config, world
        _adopt_process_group(world)
        # under stage 3 evaluation runs on a copy: its ranks do not take the same number of forward passes
        self._copy = copy.deepcopy(model) if config.zero_stage == 3 else None
        model.to(world.device)
        with _refusals_told() if config.deepspeed else contextlib.nullcontext():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer_for(model, config, world.device),
                config=deepspeed_config(config),
                dist_init_required=False,
            )
        self.model: nn.Module = self.engine.module
        # within DeepSpeed's step: the gradients are then averaged, this rank's part of them
        self._adam.register_step_pre_hook(self._before_step)
        self._broken: Tensor | None = None

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._broken = refuse_broken_gradients(optimizer, self.world)

    def forward(self, *args: object) -> object:
        return self.engine(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks and micro-batches; ours are contributions to a sum
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world.size * self.config.accumulation))

    def update(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._broken = None
        self.engine.step()
        # where DeepSpeed computes the gradient's norm, it leaves out by itself a step for which that is no number
        return torch.ones((), device=self.world.device) if self._broken is None else self._broken

    def whole_model(self) -> nn.Module:
        if self._copy is None:
            return self.model
        copied = dict(self._copy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                copied[name].copy_(self._gathered(parameter))
        return self._copy.to(self.world.device)

    # -- state, whole and by name ------------------------------------------------------------------------------------

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The torch optimizer inside whatever DeepSpeed wrapped around it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _updates(self) -> int:
        counters = [state["step"] for state in self._adam.state.values() if "step" in state]
        return int(counters[0]) if counters else 0

    def state(self, into: EngineState | None = None) -> EngineState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        updates = self._updates()
        whole = into or EngineState(moments={moment: {} for moment in MOMENTS})
        for name, parameter in self.model.named_parameters():
            weight = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            weight = self._gathered(parameter) if weight is None else weight
            moments: dict[str, Tensor | None] = {}
            if parameter.requires_grad:
                for moment in MOMENTS:
                    if not updates:
                        moments[moment] = torch.zeros_like(weight)
                    elif self.config.zero_stage == 0:
                        moments[moment] = self._adam.state[parameter][moment]
                    else:
                        moments[moment] = safe_get_full_optimizer_state(parameter, moment)
            if self.world.leader:
                copy_to(whole.weights, name, weight)
                for moment, value in moments.items():
                    assert value is not None, f"DeepSpeed kept no {moment} of {name}"
                    copy_to(whole.moments[moment], name, value.reshape(weight.shape))
        whole.updates = updates
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if self.config.precision == "fp16" and scaler is not None:
            whole.scale = float(scaler.cur_scale if hasattr(scaler, "cur_scale") else scaler.loss_scale)
        return whole if self.world.leader else EngineState()

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's value, whole, also under stage 3."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.config.zero_stage == 3):
            return parameter.detach().clone()

    def load(self, state: EngineState) -> None:
        state = agree(self.world, state)
        if state.updates and self.config.zero_stage:
            self._make_moments(state.updates)
        for name, parameter in self.model.named_parameters():
            weight = state.weights[name].to(self.world.device)
            self._set_weight(parameter, weight)
            if not parameter.requires_grad:
                continue
            self._set_partition(parameter, weight, None)
            for moment in MOMENTS if state.updates else ():
                self._set_partition(parameter, state.moments[moment][name].to(self.world.device), moment)
            if state.updates and not self.config.zero_stage:
                self._adam.state[parameter]["step"] = torch.tensor(float(state.updates), device=self.world.device)
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if state.scale is not None and scaler is not None and hasattr(scaler, "cur_scale"):
            scaler.cur_scale = state.scale

    def _set_weight(self, parameter: nn.Parameter, weight: Tensor) -> None:
        """The weight that the forward pass reads."""
        import deepspeed

        partitioned = self.config.zero_stage == 3
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
            if not partitioned or self.world.leader:
                parameter.copy_(weight)

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """This rank's part of the master weight (`moment` None) or of one of Adam's moments."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self.config.zero_stage == 0:
            if moment is not None:
                self._adam.state[parameter][moment] = value.clone()
        elif self.config.zero_stage == 3:
            # the whole-value setter of stage 3 fails where a parameter does not divide by the ranks
            part: int = parameter.partition_numel()  # type: ignore[attr-defined]
            padded = torch.nn.functional.pad(value.flatten(), (0, part * self.world.size - value.numel()))
            local = padded[self.world.rank * part : (self.world.rank + 1) * part]
            if moment is None:
                safe_set_local_fp32_param(parameter, local)
            else:
                safe_set_local_optimizer_state(parameter, local, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def _make_moments(self, updates: int) -> None:
        """Adam makes its state in its first step; a fresh one that is to be loaded needs it before."""
        # stage 3 hands its flat partitions to Adam only while it steps
        partitions = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is None:
            partitions = [flat for group in self._adam.param_groups for flat in group["params"]]
        for flat in partitions:
            self._adam.state[flat] = {
                "step": torch.tensor(float(updates), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        link = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()


def _adopt_process_group(world: World) -> None:
    import deepspeed
    import deepspeed.ops

    # its shared-memory helper for CPU would be compiled for 45 s
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", verbose=False)
