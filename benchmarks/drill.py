"""A small training run that is killed and started again, with a ledger of what it was trained on.

An *attempt* is one start of the run: some ranks of one gloo group, each a process that takes the run up from its last
checkpoint, with the faults that it is asked for (`antdist.faults`). Each rank writes a line into the ledger after each step.
A step that is done again after a restart counts once, as the last attempt that reached it did it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from antdist import faults
from antdist.io.logs import setup_logging

# what a rank imports, torch's own late imports too: a second each otherwise
PRELOADED = [
    "torch._dynamo",
    "antdist.training.adaptation",
    "antdist.training.trainer",
    "benchmarks.jobs",
    "benchmarks.worlds",
]
PATIENCE = 30.0  # seconds that a rank may outlive the first that failed, before it is killed


@dataclass(frozen=True)
class Run:
    """A run of the plain engine on one prepared domain. All its files are below `folder`."""

    domain: Path
    folder: Path
    kind: Literal["pretraining", "adaptation"] = "pretraining"
    epochs: int = 3
    batch_size: int = 60
    checkpoint_every: int | None = 3
    dim: int = 8

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Line:
    """One step as one rank did it: `mine` are checksums of the windows that it was dealt. On the leader, of the whole
    global batch: the user of each window, its checksum and how many predictions it made."""

    attempt: int
    rank: int
    step: int
    epoch: int
    time: float
    mine: list[int]
    users: list[int]
    windows: list[int]
    predictions: list[int]


# -- the ranks -------------------------------------------------------------------------------------------------------


def start(run: Run, ranks: int, attempt: int, wanted: list[faults.Fault]) -> list[BaseProcess]:
    """The processes of one attempt, in rank order. They are forked from a server that has imported all they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    (run.folder / "ledger").mkdir(parents=True, exist_ok=True)
    arguments = (ranks, port, run, attempt, json.dumps(wanted) if wanted else "")
    processes: list[BaseProcess] = [
        context.Process(target=_rank_main, args=(rank, *arguments), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess]) -> list[int]:
    """Wait for all; those that outlive a failed one by `PATIENCE` are killed. The exit codes; minus the signal if killed."""
    alive: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    deadline: float | None = None
    while alive:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for sentinel in wait(list(alive), timeout=left):
            ended = alive.pop(sentinel)
            ended.join()
            if ended.exitcode and deadline is None:
                deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() >= deadline:
            for process in alive.values():
                process.kill()
    return [process.exitcode or 0 for process in processes]


def _rank_main(rank: int, ranks: int, port: int, run: Run, attempt: int, wanted: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ[faults.VARIABLE] = wanted
    with (run.folder / "ledger" / f"attempt-{attempt:04d}-rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    setup_logging()
    try:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        train_noting(run, attempt)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a group whose peers are gone may not be left in order
    dist.destroy_process_group()


def train_noting(run: Run, attempt: int) -> None:
    """Take the run up and train it to its end; a line into the ledger after each step."""
    import numpy as np

    from antdist.distributed.world import current_world
    from antdist.training.trainer import Trainer

    world = current_world()
    ledger = run.folder / "ledger" / f"attempt-{attempt:04d}-rank-{world.rank}.jsonl"
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    step = Trainer.step

    def noted(trainer: Trainer, step_input: Any) -> Any:
        losses = step(trainer, step_input)
        whole, mine = step_input.batch, list[int]()
        for micro in step_input.micro_batches:
            items = micro.batch.item_ids[micro.batch.tokens].numpy()
            mine += _checksums(items, micro.batch.offsets.numpy())
        line: dict[str, Any] = {"step": step_input.step, "epoch": whole.epoch, "time": time.time(), "mine": mine}
        if world.leader:
            made = np.diff(np.searchsorted(whole.predict_at, whole.offsets))
            windows = _checksums(whole.items, whole.offsets)
            line |= {"users": whole.users.tolist(), "windows": windows, "predictions": made.tolist()}
        os.write(descriptor, (json.dumps(line) + "\n").encode())  # one call: whole, whatever kills us
        return losses

    Trainer.step = noted  # type: ignore[method-assign, assignment]  # this process does nothing else
    _job(run, world).train()


def _checksums(items: Any, offsets: Any) -> list[int]:
    return [zlib.crc32(items[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]


def _job(run: Run, world: Any) -> Any:
    """With dropout and routing noise; its validation is a function of the weights."""
    from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
    from antdist.data.domain import open_domain
    from antdist.model.recommender import build_recommender
    from antdist.training.adaptation import adapt
    from antdist.training.engines.plain import PlainEngine
    from benchmarks.jobs import make_trainer
    from benchmarks.worlds import RandomFeatures

    domain = open_domain(run.domain)
    catalogue = RandomFeatures(domain.manifest.items, {"text": 12, "image": 10, "price": 6})
    model = ModelConfig(dim=run.dim, experts=2, inner=run.dim, max_length=6, item_dropout=0.1, dropout=0.1)
    adapting = run.kind == "adaptation"
    loss = LossConfig(negatives="catalogue" if adapting else "in_batch", alignment=0.0 if adapting else 0.1)

    def engine_of(fresh: Any, config: TrainingConfig, world: Any) -> PlainEngine:
        parent = build_recommender(model, catalogue.dims, seed=7)
        learned = adapt("relearn", model, catalogue.dims, parent=parent) if adapting else fresh
        return PlainEngine(learned, config, world)

    trainer, _ = make_trainer(
        domain,
        catalogue,
        model=model,
        loss=loss,
        stream=StreamConfig(batch_size=run.batch_size, streams=2),
        training=TrainingConfig(
            engine="plain",
            epochs=run.epochs,
            learning_rate=0.01,
            log_every=2,
            schedule=ScheduleConfig(factor=0.9),
            checkpoint_every=run.checkpoint_every,
        ),
        world=world,
        engine_of=engine_of,
    )

    def validate() -> dict[str, float]:
        weight = next(p for p in trainer.engine.model.parameters() if p.requires_grad)
        return {"Recall@10": float(weight.detach().abs().mean()), "NDCG@10": float(weight.detach().std())}

    return replace(trainer, folder=run.folder, evaluate=validate)


# -- what is left of it ----------------------------------------------------------------------------------------------


def lines(run: Run) -> Iterator[Line]:
    """The whole ledger, attempt by attempt, rank by rank."""
    for file in sorted((run.folder / "ledger").glob("attempt-*.jsonl")):
        _, attempt, _, rank = file.stem.split("-")
        for text in file.read_text().splitlines():
            fields = {"users": [], "windows": [], "predictions": [], **json.loads(text)}
            yield Line(attempt=int(attempt), rank=int(rank), **fields)


def counted(run: Run) -> dict[int, list[Line]]:
    """The lines that count, by step, in rank order: an attempt that begins at a step undoes what earlier ones did from there."""
    by_attempt: dict[int, list[Line]] = {}
    for line in lines(run):
        by_attempt.setdefault(line.attempt, []).append(line)
    steps: dict[int, list[Line]] = {}
    for attempt in sorted(by_attempt):
        begin = min(line.step for line in by_attempt[attempt])
        steps = {step: kept for step, kept in steps.items() if step < begin}
        for line in by_attempt[attempt]:
            steps.setdefault(line.step, []).append(line)
    return steps


def end_state(run: Run) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's files and of the best weights that it names: weights, moments, progress,
    history."""
    from antdist.training.checkpoints.local import PREFIX, best_weights, steps_in

    folder = run.checkpoints / f"{PREFIX}{steps_in(run.checkpoints)[-1]:08d}"
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    best = json.loads(found["progress.json"])["progress"]["best_epoch"]
    return found | {"best": best_weights(run.folder, best).read_bytes()}
