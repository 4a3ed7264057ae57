"""Noise is drawn anew for each seed, step, micro-batch and rank, and is the same whenever that comes again."""

from __future__ import annotations

import torch

from antdist.training.noise import seed_noise


def draw(*place: int) -> tuple[float, ...]:
    seed_noise(*place)
    return tuple(torch.rand(4).tolist())


def test_noise_is_a_function_of_seed_step_micro_batch_and_rank() -> None:
    places = [(3, 5, 1, 2), (4, 5, 1, 2), (3, 6, 1, 2), (3, 5, 2, 2), (3, 5, 1, 3), (3, 51, 2), (35, 1, 2)]
    first = [draw(*place) for place in places]
    torch.rand(100)  # whatever was drawn in between
    assert [draw(*place) for place in places] == first
    assert len(set(first)) == len(places)
