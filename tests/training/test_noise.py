"""Noise is a function of seed, step, micro-batch and rank."""

from __future__ import annotations

import torch

from antdist.training.noise import seed_noise


def draw(*place: int) -> tuple[float, ...]:
    seed_noise(*place)
    return tuple(torch.rand(4).tolist())


def test_noise_depends_on_seed_step_micro_batch_and_rank() -> None:
    places = [(3, 5, 1, 2), (4, 5, 1, 2), (3, 6, 1, 2), (3, 5, 2, 2), (3, 5, 1, 3), (3, 51, 2), (35, 1, 2)]
    first = [draw(*place) for place in places]
    torch.rand(100)  # draws in between do not matter
    assert [draw(*place) for place in places] == first
    assert len(set(first)) == len(places)
