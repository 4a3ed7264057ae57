"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from antdist.config.schema import ScheduleConfig


def learning_rate(config: ScheduleConfig, base: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Return the learning rate of global step `step` (from 0); `base` is the configured one.

    `decay` is the reference's: times `factor` after each epoch (spec, sections 5 and 6). Every kind starts with a
    linear warm-up of `warmup_steps`.
    """
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    epoch = step // steps_per_epoch
    match config.kind:
        case "constant":
            return base
        case "decay":
            return base * config.factor**epoch
        case "step":
            return base * config.factor ** sum(epoch >= milestone for milestone in config.milestones)
        case "cosine":
            last = max(epochs * steps_per_epoch - 1, config.warmup_steps + 1)
            share = (step - config.warmup_steps) / (last - config.warmup_steps)
            low = config.floor * base
            return low + (base - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
