"""Time of the chunked softmax over many candidates, and its extra memory.

`antdist.model.ops.softmax_loss.softmax_loss`, forward and backward, gradients for users and candidates, float32. Against it, at a
number of candidates at which all fit: the naive loss, which holds the matrix of logits, and torch's own chunked loss,
`linear_cross_entropy`, where the installed torch has it; all in the matrix products that training uses. Each measurement
is a process of its own, warmed up on a small problem: extra memory is its peak resident memory during forward and
backward, less what was resident before and less the bytes of the gradients that remain. First touches of memory are part
of the seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from antdist.config.schema import LossConfig
from antdist.model.ops.products import exact_products
from antdist.model.ops.softmax_loss import softmax_loss
from benchmarks.processes import measure_memory, run_in_fresh_process
from benchmarks.report import Line, Options, Report, ratio

CPU = torch.device("cpu")
TEMPERATURE = 0.07
DEFAULT = LossConfig().chunk
CHUNKS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked(users: Tensor, candidates: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return softmax_loss(users, candidates, targets, temperature=TEMPERATURE, chunk=chunk)


def naive(users: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
    logits = F.normalize(users, dim=1) @ F.normalize(candidates, dim=1).T / TEMPERATURE
    return F.cross_entropy(logits, targets, reduction="sum")


def torch_chunked(users: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(
        F.normalize(users, dim=1) / TEMPERATURE,
        F.normalize(candidates, dim=1),
        targets,
        reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(),
    )


def measure(name: str, chunk: int, predictions: int, candidates: int, dim: int, threads: int) -> tuple[float, float]:
    """Measure forward and backward in this process. Returns seconds, and extra memory in MB (10^6 bytes)."""
    torch.set_num_threads(threads)
    losses: dict[str, Loss] = {
        "chunked": lambda u, c, t: chunked(u, c, t, chunk),
        "naive": naive,
        "torch": torch_chunked,
    }
    loss = losses[name]
    inputs = _draw_inputs(predictions, candidates, dim)
    with exact_products(CPU):
        _run_once(loss, *_draw_inputs(256, 1000, dim))
        gc.collect()
        seconds, extra = measure_memory(lambda: _run_once(loss, *inputs))
    gradients = sum(x.grad.nbytes for x in inputs if x.grad is not None)
    return seconds, (extra - gradients) / 1e6


def _draw_inputs(predictions: int, candidates: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    users = torch.randn(predictions, dim, generator=random).requires_grad_()
    items = torch.randn(candidates, dim, generator=random).requires_grad_()
    return users, items, torch.randint(candidates, (predictions,), generator=random)


def _run_once(loss: Loss, users: Tensor, candidates: Tensor, targets: Tensor) -> None:
    loss(users, candidates, targets).backward()


def run(options: Options) -> Report:
    predictions, dim = (256, 64) if options.short else (4096, 256)
    some, many = (20_000, 40_000) if options.short else (65_536, 1_000_000)
    chunks = (DEFAULT,) if options.short else CHUNKS
    rivals = ["naive"] + ["torch"] * hasattr(F, "linear_cross_entropy")
    cases = [("chunked", chunk, some) for chunk in chunks] + [(rival, 0, some) for rival in rivals]
    cases.append(("chunked", DEFAULT, many))
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for _ in range(options.repeats):
        for (name, chunk, candidates), values in found.items():
            values.append(run_in_fresh_process(measure, name, chunk, predictions, candidates, dim, options.threads))

    def column(case: tuple[str, int, int], at: int) -> list[float]:
        return [values[at] for values in found[case]]

    lines = []
    for case in cases:
        name, chunk, candidates = case
        called = f"chunk {chunk}" if name == "chunked" else {"naive": "naive", "torch": "linear_cross_entropy"}[name]
        lines.append(Line(f"{candidates:,} candidates, {called}: extra memory", column(case, 1), "MB"))
        lines.append(Line(f"{candidates:,} candidates, {called}: time", column(case, 0), "s"))
    ours = ("chunked", DEFAULT, some)
    for rival in rivals:
        theirs = (rival, 0, some)
        lines.append(ratio(f"memory of {rival} over chunk {DEFAULT}", column(theirs, 1), column(ours, 1)))
        lines.append(ratio(f"time of {rival} over chunk {DEFAULT}", column(theirs, 0), column(ours, 0)))
    logits = 4 * predictions * some / 1e6
    return Report(
        "loss",
        f"forward and backward of the softmax loss for {predictions:,} queries, d = {dim}, float32; extra memory beyond "
        "inputs and their gradients; the default chunk is " + str(DEFAULT),
        lines,
        [
            f"the naive loss must hold its {logits:,.0f} MB of logits at least twice (with their gradient): a check "
            "of the measurement"
        ],
    )
