"""The DeepSpeed engine: ZeRO stages 0 to 3, with export and import of its complete state.

DeepSpeed's own checkpoints depend on the number of ranks and the ZeRO stage; ours must not (law 6), so weights and
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
from antdist.training.engines.base import (
    MOMENTS,
    EngineState,
    build_optimizer,
    copy_to_cpu,
    count_updates,
    empty_moments,
    skip_nonfinite_step,
)

# keys of DeepSpeed's configuration, and the key of ours that sets each
RESERVED_KEYS = {
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


def check_reserved_keys(section: dict[str, Any]) -> None:
    """Refuse keys of `training.deepspeed` that another configuration key sets. Raises UserError."""
    for key in sorted(section.keys() & RESERVED_KEYS.keys()):
        raise _reserved(key, RESERVED_KEYS[key])
    if not isinstance(zero := section.get("zero_optimization", {}), dict):
        raise UserError(
            f"must be a section of keys, not {zero!r}",
            where="training.deepspeed.zero_optimization",
            remedy="write it as in DeepSpeed's documentation; its stage is training.zero_stage",
        )
    if "stage" in zero:
        raise _reserved("zero_optimization.stage", "training.zero_stage")


def _reserved(key: str, ours: str) -> UserError:
    return UserError(
        f"this key is set by {ours}", where=f"training.deepspeed.{key}", remedy=f"remove it and set {ours}"
    )


def deepspeed_config(config: TrainingConfig) -> dict[str, Any]:
    """Translate our configuration to DeepSpeed's and merge the `training.deepspeed` section in."""
    check_reserved_keys(config.deepspeed)
    ours: dict[str, Any] = {
        # the stream forms the batches; DeepSpeed only checks that micro-batch size times accumulation is consistent
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
    """Let DeepSpeed validate `training.deepspeed`, and refuse top-level keys that it would ignore.

    Raises:
        UserError: naming the key, or with DeepSpeed's message.
    """
    if not config.deepspeed:
        return
    logging.disable(logging.WARNING)  # it warns if there is no GPU, which the driver's node may lack
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    finally:
        logging.disable(logging.NOTSET)
    recorded = _KeyRecorder(deepspeed_config(config))
    with _deepspeed_errors_as_user_errors():
        DeepSpeedConfig(recorded)
    for key in sorted(config.deepspeed.keys() - recorded.accessed):
        close = difflib.get_close_matches(key, recorded.accessed - RESERVED_KEYS.keys(), n=1)
        raise UserError(
            "DeepSpeed has no such key" + (f"; did you mean {close[0]}?" if close else ""),
            where=f"training.deepspeed.{key}",
            remedy="correct it by DeepSpeed's documentation, or remove it",
        )


class _KeyRecorder(dict[str, Any]):
    """A mapping that records which keys are accessed."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.accessed: set[str] = set()

    def __copy__(self) -> _KeyRecorder:
        return self

    def __contains__(self, key: object) -> bool:
        self.accessed.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.accessed.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.accessed.add(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # so that `in` on the view is recorded too
        return KeysView(self)


@contextlib.contextmanager
def _deepspeed_errors_as_user_errors() -> Iterator[None]:
    """Raise what DeepSpeed's configuration checks raise as a UserError."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except (ValueError, TypeError, AssertionError, AttributeError, KeyError, DeepSpeedConfigError) as error:
        raise UserError(
            f"DeepSpeed rejects it: {' '.join(str(error).split())[:300]}",
            where="training.deepspeed",
            remedy="correct it by DeepSpeed's documentation, or remove it",
        ) from error


def _norm_is_unused(config: TrainingConfig) -> bool:
    """Whether DeepSpeed may skip the gradient norm, which it reads on the host in each step.

    Clipping needs it, and so does fp16, to detect overflow. Only stages 1 and 2 without offloading can skip it.
    """
    zero = config.deepspeed.get("zero_optimization", {})
    return (
        config.clip is None
        and config.precision != "fp16"
        and config.zero_stage in (1, 2)
        and not zero.keys() & {"offload_optimizer", "cpu_offload", "zenflow"}
    )


class DeepSpeedEngine:
    """Implements `Engine` with DeepSpeed; needs the process group that Ray Train or a test has set up."""

    def __init__(self, model: nn.Module, config: TrainingConfig, world: World) -> None:
        import deepspeed

        self.config, self.world = config, world
        _adopt_process_group(world)
        # stage 3 gathers parameters in each forward pass, and ranks evaluate different numbers of batches: use a copy
        self._copy = copy.deepcopy(model) if config.zero_stage == 3 else None
        model.to(world.device)
        with _deepspeed_errors_as_user_errors() if config.deepspeed else contextlib.nullcontext():
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config, world.device),
                config=deepspeed_config(config),
                dist_init_required=False,
            )
        self.model: nn.Module = self.engine.module
        # called within DeepSpeed's step, when this rank's partition of the gradients has been averaged
        self._adam.register_step_pre_hook(self._before_step)
        self._nonfinite: Tensor | None = None

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._nonfinite = skip_nonfinite_step(optimizer, self.world)

    def forward(self, *args: object) -> object:
        return self.engine(*args)

    def backward(self, loss: Tensor, last: bool) -> None:
        # DeepSpeed averages over ranks and micro-batches; our losses are contributions to a sum
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * (self.world.size * self.config.accumulation))

    def update(self, learning_rate: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._nonfinite = None
        self.engine.step()
        # the hook has not run if DeepSpeed itself found a non-finite gradient norm and skipped the optimizer
        return torch.ones((), device=self.world.device) if self._nonfinite is None else self._nonfinite

    def full_model(self) -> nn.Module:
        if self._copy is None:
            return self.model
        copied = dict(self._copy.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                copied[name].copy_(self._gathered(parameter))
        return self._copy.to(self.world.device)

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper, if there is one."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def state(self, into: EngineState | None = None) -> EngineState:
        from deepspeed.utils import safe_get_full_fp32_param

        updates = count_updates(self._adam)
        state = into or EngineState(moments=empty_moments())
        for name, parameter in self.model.named_parameters():
            weight = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            weight = self._gathered(parameter) if weight is None else weight
            # gathering is collective: all ranks take part, the leader keeps the result
            moments = self._full_moments(parameter, weight, updates) if parameter.requires_grad else {}
            if self.world.leader:
                copy_to_cpu(state.weights, name, weight)
                for moment, value in moments.items():
                    assert value is not None, f"DeepSpeed kept no {moment} of {name}"
                    copy_to_cpu(state.moments[moment], name, value.reshape(weight.shape))
        state.updates = updates
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if self.config.precision == "fp16" and scaler is not None:
            state.scale = float(scaler.cur_scale if hasattr(scaler, "cur_scale") else scaler.loss_scale)
        return state if self.world.leader else EngineState()

    def _full_moments(self, parameter: nn.Parameter, weight: Tensor, updates: int) -> dict[str, Tensor | None]:
        """Gather Adam's moments of one parameter; zeros before the first update. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not updates:
            return {moment: torch.zeros_like(weight) for moment in MOMENTS}
        if self.config.zero_stage == 0:
            return {moment: self._adam.state[parameter][moment] for moment in MOMENTS}
        return {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """Copy a complete parameter, gathered from all ranks under stage 3."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], enabled=self.config.zero_stage == 3):
            return parameter.detach().clone()

    def load(self, state: EngineState) -> None:
        state = agree(self.world, state)
        if state.updates and self.config.zero_stage:
            self._create_moments(state.updates)
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
        """Set the weight that the forward pass reads."""
        import deepspeed

        partitioned = self.config.zero_stage == 3
        with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
            if not partitioned or self.world.leader:
                parameter.copy_(weight)

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set this rank's partition of the master weight (`moment` None) or of one of Adam's moments."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state
        from deepspeed.utils.tensor_fragment import safe_set_local_fp32_param, safe_set_local_optimizer_state

        if self.config.zero_stage == 0:
            if moment is not None:
                self._adam.state[parameter][moment] = value.clone()
        elif self.config.zero_stage == 3:
            # DeepSpeed's full-value setter for stage 3 fails if the size is not divisible by the number of ranks
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

    def _create_moments(self, updates: int) -> None:
        """Create Adam's state, which Adam itself does only in its first step, so that it can be loaded."""
        # stage 3 gives Adam its flat partitions only during a step
        partitions = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is None:
            partitions = [flat for group in self._adam.param_groups for flat in group["params"]]
        for flat in partitions:
            self._adam.state[flat] = {
                "step": torch.tensor(float(updates), device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        map_to_parameters = getattr(self.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if map_to_parameters is not None:
            map_to_parameters()


def _adopt_process_group(world: World) -> None:
    import deepspeed
    import deepspeed.ops

    # compiling its shared-memory helper for CPU would take 45 s
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", verbose=False)
