"""Dropout and routing noise as a function of (seed, step, micro-batch, rank): no state to save."""

from __future__ import annotations

import hashlib

import torch


def seed_noise(seed: int, step: int, micro: int = 0, rank: int = 0) -> None:
    """Seed torch's generators (CPU and GPU) for one micro-batch of one rank.

    A resumed run thus draws the same noise as an uninterrupted one (law 3).
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
