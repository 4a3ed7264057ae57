"""The memory of a work is what it allocates; work in separate processes returns or raises."""

from __future__ import annotations

import os

import numpy as np
import pytest

from benchmarks.processes import measure_memory, run_in_fresh_process, run_on_ranks


def extra_of(megabytes: int) -> int:
    np.ones(200 << 17)  # an earlier, higher peak does not count
    return measure_memory(lambda: np.ones(megabytes << 17))[1]


def sum_of_ranks(rank: int, factor: int) -> tuple[int, int]:
    import torch
    import torch.distributed as dist

    total = torch.tensor(factor * (rank + 1))
    dist.all_reduce(total)
    return rank, int(total)


def test_extra_memory_is_the_peak_above_the_start() -> None:
    # in a fresh process: one that has trained keeps the memory that it frees
    assert run_in_fresh_process(extra_of, 128) == pytest.approx(128 << 20, rel=0.05)


def test_a_fresh_process_passes_its_exception_on() -> None:
    assert run_in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        run_in_fresh_process(divmod, 1, 0)


def test_ranks_form_one_group() -> None:
    assert run_on_ranks(2, sum_of_ranks, 10) == [(0, 30), (1, 30)]
