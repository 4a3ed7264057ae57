"""The engines: equal weights after equal steps at every ZeRO stage, and a common state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from antdist.config.schema import TrainingConfig
from antdist.distributed.world import current_world, row_gather, row_ranges
from antdist.errors import UserError
from antdist.training.engines.base import EngineState
from antdist.training.engines.deepspeed import (
    DeepSpeedEngine,
    check_reserved_keys,
    check_with_deepspeed,
    deepspeed_config,
)
from antdist.training.engines.plain import PlainEngine
from tests.ranks import on_ranks

STEPS = 4


def small_model() -> torch.nn.Module:
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    model[2].requires_grad_(False)  # like the frozen transformer of relearn
    return model


def arrays(state: EngineState) -> dict[str, Any]:
    return {
        "weights": {name: value.numpy() for name, value in state.weights.items()},
        "moments": {m: {name: value.numpy() for name, value in kept.items()} for m, kept in state.moments.items()},
        "updates": state.updates,
    }


def run(
    kind: str, stage: int, first: int, last: int, start: dict[str, Any] | None, clip: float | None
) -> dict[str, Any]:
    """Train steps first..last on this rank's half of a fixed batch; accumulate two micro-batches."""
    world = current_world()
    config = TrainingConfig(zero_stage=stage, accumulation=2, clip=clip, learning_rate=0.05)
    engine: Any = (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(small_model(), config, world)
    if start is not None:
        engine.load(
            EngineState(
                {name: torch.from_numpy(value) for name, value in start["weights"].items()},
                {
                    m: {name: torch.from_numpy(value) for name, value in kept.items()}
                    for m, kept in start["moments"].items()
                },
                start["updates"],
            )
        )
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(2, 12, 6, generator=generator)
        for micro in range(2):
            begin, end = row_ranges(12, world.size)[world.rank]
            loss = (engine.forward(x[micro, begin:end]) - 1).square().sum() / 24
            engine.backward(loss, last=micro == 1)
        engine.update(0.05 / (step + 1))
    return arrays(engine.state())


def close(a: dict[str, Any], b: dict[str, Any], tolerance: float) -> None:
    assert a["updates"] == b["updates"] > 0
    assert a["weights"].keys() == b["weights"].keys()
    for name in a["weights"]:
        np.testing.assert_allclose(a["weights"][name], b["weights"][name], rtol=tolerance, atol=tolerance, err_msg=name)
    for moment in a["moments"]:
        assert a["moments"][moment].keys() == b["moments"][moment].keys()
        for name in a["moments"][moment]:
            np.testing.assert_allclose(
                a["moments"][moment][name], b["moments"][moment][name], rtol=1e-4, atol=tolerance
            )


def everything(stage: int) -> list[dict[str, Any]]:
    """Run plain, uninterrupted DeepSpeed, and DeepSpeed in two halves; return their states."""
    plain = run("plain", 0, 0, STEPS, None, 0.1)
    straight = run("deepspeed", stage, 0, STEPS, None, 0.1)
    half = run("deepspeed", stage, 0, STEPS // 2, None, 0.1)
    resumed = run("deepspeed", stage, STEPS // 2, STEPS, half, 0.1)
    return [plain, straight, half, resumed]


@pytest.mark.parametrize("stage", [0, 1, 2, 3], ids="zero{}".format)
def test_deepspeed_equals_plain_and_resume_is_exact(stage: int) -> None:
    plain, straight, half, resumed = on_ranks(2, everything, stage)[0]
    one_rank = run("plain", 0, 0, STEPS, None, 0.1)
    close(straight, plain, 1e-6)
    close(one_rank, plain, 1e-6)
    close(run("plain", 0, STEPS // 2, STEPS, half, 0.1), plain, 1e-6)  # a state of two ranks resumes on one
    for name, weight in straight["weights"].items():
        np.testing.assert_array_equal(resumed["weights"][name], weight, err_msg=name)
    for moment in straight["moments"]:
        for name in straight["moments"][moment]:
            np.testing.assert_array_equal(resumed["moments"][moment][name], straight["moments"][moment][name])


def gathered_gradient() -> tuple[np.ndarray, np.ndarray]:
    world = current_world()
    whole = torch.arange(15.0).reshape(5, 3)
    start, stop = row_ranges(5, world.size)[world.rank]
    local = whole[start:stop].clone().requires_grad_(True)
    rows = row_gather(world, 5)(local)
    (rows.square().sum() * (world.rank + 1)).backward()
    assert local.grad is not None
    return rows.detach().numpy(), local.grad.numpy()


@pytest.mark.parametrize("size", [2, 3])
def test_row_gather_sums_gradients(size: int) -> None:
    whole = np.arange(15.0).reshape(5, 3)
    results = on_ranks(size, gathered_gradient)
    for rows, _ in results:
        np.testing.assert_array_equal(rows, whole)
    factor = sum(range(1, size + 1))
    np.testing.assert_allclose(np.concatenate([gradient for _, gradient in results]), 2 * whole * factor)


def test_reserved_deepspeed_keys_are_refused() -> None:
    with pytest.raises(UserError, match=r"training.deepspeed.optimizer: .*Remove it and set training.learning_rate"):
        check_reserved_keys({"optimizer": {"type": "Adam"}})
    with pytest.raises(UserError, match=r"training\.zero_stage"):
        check_reserved_keys({"zero_optimization": {"stage": 3}})


def test_deepspeed_section_is_merged() -> None:
    config = TrainingConfig(
        zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True}
    )
    merged = deepspeed_config(config)
    assert merged["zero_optimization"] == {"stage": 2, "overlap_comm": False, "compute_grad_norm": False}
    assert merged["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"wall_clock_brekdown": True},
            "wall_clock_brekdown: DeepSpeed has no such key; did you mean wall_clock_breakdown?",
        ),
        ({"zzz": 1, "compile": {}}, "training.deepspeed.zzz: DeepSpeed has no such key. Correct it"),
        ({"zero_optimization": {"overlap_com": True}}, "training.deepspeed: DeepSpeed rejects it: "),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "training.deepspeed: DeepSpeed rejects it: "),
        ({"checkpoint": 3}, "training.deepspeed: DeepSpeed rejects it: "),
    ],
)
def test_invalid_deepspeed_keys_are_reported(section: dict[str, Any], message: str) -> None:
    """DeepSpeed itself ignores unknown keys at the top level."""
    with pytest.raises(UserError) as caught:
        check_with_deepspeed(TrainingConfig(deepspeed=section))
    assert message in str(caught.value)


def test_valid_deepspeed_keys_pass() -> None:
    sections = {
        "activation_checkpointing": {"partition_activations": False},
        "aio": {"queue_depth": 8},
        "comms_logger": {"enabled": False},
        "communication_data_type": "fp32",
        "compile": {"deepcompile": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "flops_profiler": {"enabled": True, "profile_step": 5},
        "prescale_gradients": False,
        "steps_per_print": 10,
        "tensorboard": {"enabled": False},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
    }
    for precision in ("fp32", "bf16"):
        check_with_deepspeed(TrainingConfig(deepspeed=sections, precision=precision))


@pytest.mark.parametrize(
    "needs_it",
    [
        {"clip": 1.0},
        {"precision": "fp16"},
        {"zero_stage": 0},
        {"zero_stage": 3},
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    ],
)
def test_deepspeed_computes_the_gradient_norm_if_needed(needs_it: dict[str, Any]) -> None:
    """Otherwise it would read it on the host in each step for nothing."""
    assert "compute_grad_norm" not in deepspeed_config(TrainingConfig(**needs_it))["zero_optimization"]


@pytest.mark.parametrize("kind", ["plain", "deepspeed"])
def test_engine_state_is_a_copy_in_reused_memory(kind: str) -> None:
    on_ranks(1, _states, kind)


def _states(kind: str) -> None:
    config = TrainingConfig(zero_stage=0, learning_rate=0.05)
    engine: Any = (DeepSpeedEngine if kind == "deepspeed" else PlainEngine)(small_model(), config, current_world())

    def step() -> None:
        engine.backward((engine.forward(torch.ones(2, 6)) - 1).square().sum(), last=True)
        engine.update(0.05)

    step()
    first = engine.state()
    held = {name: value.clone() for name, value in first.weights.items()}
    moment = first.moments["exp_avg"]["0.weight"].clone()
    step()
    assert all(torch.equal(first.weights[name], value) for name, value in held.items())
    assert torch.equal(first.moments["exp_avg"]["0.weight"], moment)
    places = {name: value.data_ptr() for name, value in first.weights.items()}
    second = engine.state(first)
    assert {name: value.data_ptr() for name, value in second.weights.items()} == places
    assert second.updates == 2 and not torch.equal(second.weights["0.weight"], held["0.weight"])
    assert not torch.equal(second.moments["exp_avg"]["0.weight"], moment)
