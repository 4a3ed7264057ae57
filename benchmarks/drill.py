"""A small training run that is killed and restarted, with a ledger of what it was trained on.

An *attempt* is one start of the run: the ranks of one gloo group, each a process that resumes from the last checkpoint, with
injected faults (`antdist.faults`). Each rank writes a line to the ledger after each step. A step that is repeated after a
restart counts once, as the last attempt that reached it.
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

# what a rank imports, including torch's late imports, which otherwise take a second in each rank
PRELOADED = [
    "torch._dynamo",
    "antdist.training.adaptation",
    "antdist.training.trainer",
    "benchmarks.trainers",
    "benchmarks.worlds",
]
KILL_AFTER = 30.0  # seconds that a rank may outlive the first that failed


@dataclass(frozen=True)
class DrillRun:
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
class LedgerLine:
    """One step of one rank: `mine` are checksums of the windows in its share.

    On the leader, for the global batch: the user of each window, its checksum and its number of predictions.
    """

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


def start(run: DrillRun, ranks: int, attempt: int, wanted: list[faults.Fault]) -> list[BaseProcess]:
    """Start the processes of one attempt, in rank order, forked from a server with all imports done."""
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
    """Wait for all ranks; kill those that outlive a failed one by `KILL_AFTER`. Returns exit codes.

    The code of a rank that was killed is minus the signal.
    """
    alive: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    deadline: float | None = None
    while alive:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        for sentinel in wait(list(alive), timeout=left):
            ended = alive.pop(sentinel)
            ended.join()
            if ended.exitcode and deadline is None:
                deadline = time.monotonic() + KILL_AFTER
        if deadline is not None and time.monotonic() >= deadline:
            for process in alive.values():
                process.kill()
    return [process.exitcode or 0 for process in processes]


def _rank_main(rank: int, ranks: int, port: int, run: DrillRun, attempt: int, wanted: str) -> None:
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
        train_with_ledger(run, attempt)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # a process group whose peers are gone may hang when it is destroyed
    dist.destroy_process_group()


def train_with_ledger(run: DrillRun, attempt: int) -> None:
    """Resume the run and train it to its end, with a line in the ledger after each step."""
    import numpy as np

    from antdist.distributed.world import current_world
    from antdist.training.trainer import Trainer

    world = current_world()
    ledger = run.folder / "ledger" / f"attempt-{attempt:04d}-rank-{world.rank}.jsonl"
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    step = Trainer.step

    def step_with_ledger(trainer: Trainer, step_input: Any) -> Any:
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
        os.write(descriptor, (json.dumps(line) + "\n").encode())  # one call, so a kill cannot cut the line
        return losses

    Trainer.step = step_with_ledger  # type: ignore[method-assign, assignment]  # this process trains nothing else
    _make_trainer(run, world).train()


def _checksums(items: Any, offsets: Any) -> list[int]:
    return [zlib.crc32(items[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]


def _make_trainer(run: DrillRun, world: Any) -> Any:
    """Make a trainer with dropout and routing noise, whose validation is a function of the weights."""
    from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
    from antdist.data.domain import open_domain
    from antdist.model.recommender import build_recommender
    from antdist.training.adaptation import adapt
    from antdist.training.engines.plain import PlainEngine
    from benchmarks.trainers import make_trainer
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


# -- reading the results ---------------------------------------------------------------------------------------------


def read_ledger(run: DrillRun) -> Iterator[LedgerLine]:
    """Read the complete ledger, attempt by attempt, rank by rank."""
    for file in sorted((run.folder / "ledger").glob("attempt-*.jsonl")):
        _, attempt, _, rank = file.stem.split("-")
        for text in file.read_text().splitlines():
            fields = {"users": [], "windows": [], "predictions": [], **json.loads(text)}
            yield LedgerLine(attempt=int(attempt), rank=int(rank), **fields)


def final_steps(run: DrillRun) -> dict[int, list[LedgerLine]]:
    """Return the lines that count, by step: an attempt replaces earlier ones from its first step on."""
    by_attempt: dict[int, list[LedgerLine]] = {}
    for line in read_ledger(run):
        by_attempt.setdefault(line.attempt, []).append(line)
    steps: dict[int, list[LedgerLine]] = {}
    for attempt in sorted(by_attempt):
        begin = min(line.step for line in by_attempt[attempt])
        steps = {step: kept for step, kept in steps.items() if step < begin}
        for line in by_attempt[attempt]:
            steps.setdefault(line.step, []).append(line)
    return steps


def end_state(run: DrillRun) -> dict[str, bytes]:
    """Return the bytes of the newest checkpoint's files and of the best weights that it names."""
    from antdist.training.checkpoints.local import best_weights, checkpoint_name, steps_in

    folder = run.checkpoints / checkpoint_name(steps_in(run.checkpoints)[-1])
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    best = json.loads(found["progress.json"])["progress"]["best_epoch"]
    return found | {"best": best_weights(run.folder, best).read_bytes()}
