"""Memory of a work is what it allocates; work in processes of their own comes back, or fails with its reason."""

from __future__ import annotations

import os

import numpy as np
import pytest

from benchmarks.processes import in_fresh_process, on_ranks, seconds_and_extra_bytes


def extra_of(megabytes: int) -> int:
    np.ones(200 << 17)  # an earlier, higher peak does not count
    return seconds_and_extra_bytes(lambda: np.ones(megabytes << 17))[1]


def sum_of_ranks(rank: int, factor: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(factor * (rank + 1))
    dist.all_reduce(total)
    return rank, int(total)


def test_extra_memory_is_the_peak_above_the_start() -> None:
    # in a process of its own: one that has trained keeps what it frees
    assert in_fresh_process(extra_of, 128) == pytest.approx(128 << 20, rel=0.05)


def test_a_fresh_process_passes_its_exception_on() -> None:
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_fresh_process(divmod, 1, 0)


def test_ranks_form_one_group() -> None:
    assert on_ranks(2, sum_of_ranks, 10) == [(0, 30), (1, 30)]
