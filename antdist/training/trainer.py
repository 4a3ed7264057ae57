"""The training loop: pre-training and re-learning alike, one process a rank.

    resume, or begin
    while epochs remain:
        for each batch left of the epoch:  step; log now and then; checkpoint if due; stop if asked
        validate if due  ->  count validations without a better one
        checkpoint, the best weights with it: a snapshot at once, written in the background

All state that survives is in `Progress` and the engine; order, noise and learning rate are functions of the step.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from antdist import faults
from antdist.batch import GlobalBatch
from antdist.config.schema import TrainingConfig
from antdist.data.stream.stream import Stream, StreamState
from antdist.distributed.world import World, agree, barrier, row_gather, sum_over_ranks
from antdist.errors import Preempted, UserError
from antdist.io.files import flush_to_disk
from antdist.io.logs import get_logger
from antdist.model.ops.products import exact_products
from antdist.profiling import part, profiled
from antdist.training.checkpoints.local import (
    Checkpoint,
    best_weights,
    describe,
    drop_newer,
    known_best,
    load_latest,
    progress_of_all,
    save_checkpoint,
    write_tensors,
)
from antdist.training.checkpoints.remote import Remote
from antdist.training.checkpoints.saver import Saver
from antdist.training.checkpoints.uploads import Uploads
from antdist.training.engines.plain import Engine, EngineState
from antdist.training.feed import Feed, StepInput
from antdist.training.memory import keep_memory, release_now_and_then
from antdist.training.noise import seed_noise
from antdist.training.numbers import REMEMBERED, WINDOW, forget_from, in_a_row, spike, within_window, write_down
from antdist.training.schedule import learning_rate
from antdist.training.status import Live, log_line
from antdist.training.watchdog import Watchdog

logger = get_logger(__name__)

CHOSEN_BY = "Recall@10"  # on validation users (spec, section 7)
SHOWN = ("loss", f"validation/{CHOSEN_BY}", "validation/NDCG@10")  # after each validation
SKIPPED = "skipped.jsonl"
Metrics = dict[str, float]
Asked = Literal["save", "stop"] | None


class Diverged(UserError):
    """Loss, gradients or weights are no numbers: all ranks see it in the same step, and trying again would end the same way."""


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint holds beside weights and moments. Plain JSON."""

    step: int = 0  # the next optimizer step: epoch times steps an epoch, plus batch
    epoch: int = 0  # the epoch that the next step belongs to
    batch: int = 0  # the next step's batch in it
    epoch_loss: float = 0.0  # predictions times loss, so far in this epoch
    epoch_predictions: int = 0
    best: float | None = None  # the best validation's metric
    best_epoch: int | None = None
    worse: int = 0  # validations since then
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an epoch
    finished: str | None = None  # why, once nothing is left to do
    skipped: list[int] = field(default_factory=list)  # those of the last steps, from 1, that were no use
    recent: list[float] = field(default_factory=list)  # the loss at the last points of its curve


@dataclass(frozen=True)
class Job:
    """One training run on this rank.

    `validate` is collective and returns the same metrics on every rank; `report` gets curves and `live` how it goes, on the
    leader. `asked` tells on each rank, where the curves get a point, whether to take a checkpoint and perhaps to stop: what one
    rank hears, all do. `start` is a state to begin from where neither `folder` nor `remote`, its copy, of which the
    leader alone takes note, has a checkpoint. `profile`: each rank writes a trace of some steps to `folder/profile`.
    """

    engine: Engine
    feed: Feed
    config: TrainingConfig
    world: World
    folder: Path
    seed: int
    validate: Callable[[], Metrics]
    report: Callable[[Metrics, int], None]
    live: Callable[[Live], None] = log_line
    asked: Callable[[], Asked] = lambda: None
    name: str = "training"
    start: Checkpoint | None = None
    remote: Remote | None = None
    profile: bool = False


def train(job: Job) -> Progress:
    """Run until the last epoch, `patience` or `stop_after`. The best weights are then in `best_weights(job.folder, ...)`, and
    all that was to be saved is on disk, on whichever rank this returns; where it raises, what had been begun is.

    Raises:
        Diverged: too many steps were skipped for a loss or gradients that are no numbers; the weights are none. On all ranks.
        Preempted: `job.asked` to stop; a checkpoint of the last step is on disk. On all ranks.
        UserError: a checkpoint cannot be written; one that is there does not fit. On all ranks.
    """
    with Watchdog(job.folder, job.world.rank, job.name, job.config.hang) as watchdog:
        return _train(job, watchdog)


def _train(job: Job, watchdog: Watchdog) -> Progress:
    progress = _resume(job)
    stop_at = None if job.config.stop_after is None else progress.step + job.config.stop_after
    trace = job.folder / "profile" / f"rank-{job.world.rank}.json.gz" if job.profile else None
    on_gpu = job.world.device.type == "cuda"
    if not on_gpu:
        keep_memory()
    with (
        exact_products(job.world.device),
        _uploading(job) as uploads,
        Saver(job.folder, uploads) as saver,
        profiled(trace, on_gpu=on_gpu) as step_done,
    ):
        meter = Meter(job, progress.step, step_done)
        while progress.finished is None and (stop_at is None or progress.step < stop_at):
            if _train_epoch(job, progress, meter, saver, stop_at, watchdog):
                watchdog.at("checkpoint")
                _end_epoch(job, progress)
            watchdog.at("checkpoint")
            _checkpoint(job, progress, saver)
            watchdog.at("step")
        watchdog.at("checkpoint")
        _await_save(job, saver)
    barrier(job.world)
    return progress


def _uploading(job: Job) -> contextlib.AbstractContextManager[Uploads | None]:
    """On the leader of a run with a copy elsewhere: what keeps that up to date."""
    if job.remote is None or not job.world.leader:
        return contextlib.nullcontext()
    hang = job.config.hang
    # waiting for the last one, the leader must not look as if it hung
    patience = 60 * min(hang.start_minutes, hang.step_minutes, hang.checkpoint_minutes) / 2
    return Uploads(job.remote, job.folder, job.config.keep_checkpoints, job.config.keep_every, patience)


def _resume(job: Job) -> Progress:
    """Take up the newest whole checkpoint of the folder or its copy elsewhere, else `job.start`, else begin. The leader decides for all: what it
    cannot take up, all ranks raise."""
    found, failure = _find(job) if job.world.leader else (None, None)
    document, failure = agree(job.world, (found.progress if found else None, failure))
    if failure is not None:
        raise failure
    if document is None:
        if job.world.leader:
            forget_from(job.folder / SKIPPED, 0)
        return Progress()
    job.feed.stream.check_state(StreamState(**document["stream"]))
    job.engine.load(found.state if found else EngineState())
    progress = Progress(**document["progress"])
    progress.finished = _finished(job.config, progress)
    if found is not None:
        if progress.finished:
            logger.info(f"{job.name}: is finished ({progress.finished}, step {progress.step}): nothing is trained")
        else:
            forget_from(job.folder / SKIPPED, progress.step)
            ranks = f"{job.world.size} worker{'s' if job.world.size > 1 else ''}"
            where = f"at step {progress.step}, epoch {progress.epoch + 1}, {ranks}, from {found.folder}"
            logger.info(f"{job.name}: {'goes on' if progress.step else 'begins'} {where}")
    barrier(job.world)
    return progress


def _find(job: Job) -> tuple[Checkpoint | None, UserError | None]:
    """On the leader: the checkpoint to go on from, its best weights in this run's folder; or why there is none that fits."""
    try:
        if job.remote is not None:
            job.remote.bring(job.folder)
        found = load_latest(job.folder / "checkpoints") or job.start
        if found is not None:
            drop_newer(job.folder / "checkpoints", found.folder)
            _check_fits(job, found)
            _bring_best(job, found.folder, found.progress["progress"]["best_epoch"])
    except UserError as error:
        return None, error
    return found, None


def beginning_with(found: Checkpoint, stream: Stream) -> Checkpoint:
    """A checkpoint's weights, moments and their counter, at the very beginning of another run over `stream`."""
    document = {"progress": asdict(Progress()), "stream": asdict(stream.state(0, 0))}
    return replace(found, progress=document)


def _finished(config: TrainingConfig, progress: Progress) -> str | None:
    """Why nothing is left to do, None if something is. Asked anew after a resume: more epochs or patience go on."""
    if progress.epoch >= config.epochs:
        return "all epochs done"
    if config.patience is not None and progress.worse >= config.patience:
        return f"no better validation {CHOSEN_BY} in {progress.worse} validations"
    return None


def _check_fits(job: Job, found: Checkpoint) -> None:
    """The leader's word before anything is loaded: the state must be of this very model."""
    here = {name: _shape(parameter) for name, parameter in job.engine.model.named_parameters()}
    there = {name: weight.shape for name, weight in found.state.weights.items()}
    learned = {name for name, parameter in job.engine.model.named_parameters() if parameter.requires_grad}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    differing += sorted(learned ^ found.state.moments["exp_avg"].keys())
    if differing:
        raise UserError(
            f"the training state is of another model: {differing[0]} differs",
            where=found.folder,
            remedy="resume with the model: section of the first start, or start a new run",
        )


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Of the whole parameter, also where DeepSpeed's stage 3 keeps a part of it on each rank."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _train_epoch(
    job: Job, progress: Progress, meter: Meter, saver: Saver, stop_at: int | None, watchdog: Watchdog
) -> bool:
    """The rest of the epoch. False if `stop_after` ended it early."""
    job.engine.model.train()
    for step_input in meter.timed(job.feed.epoch(progress.epoch, progress.batch)):
        faults.at("step", rank=job.world.rank, step=step_input.step)
        losses = train_step(job, step_input)
        watchdog.at("step")
        progress.step, progress.batch = step_input.step + 1, step_input.whole.index + 1
        meter.add(progress, losses, step_input.whole)
        if progress.step == stop_at and progress.batch < job.feed.stream.steps_per_epoch:
            meter.flush(progress)
            return False
        _heed(job, progress, meter, saver, watchdog)
        if job.config.checkpoint_every and progress.step % job.config.checkpoint_every == 0:
            meter.flush(progress)
            # weights that give no numbers may be what a step before made of them: the last good checkpoint stays
            if not in_a_row(progress.skipped, progress.step):
                watchdog.at("checkpoint")
                _checkpoint(job, progress, saver)
                watchdog.at("step")
    meter.flush(progress)
    _heed(job, progress, meter, saver, watchdog)
    return True


def _heed(job: Job, progress: Progress, meter: Meter, saver: Saver, watchdog: Watchdog) -> None:
    """Do what a rank was asked for, as the meter heard. At an epoch's end that is before the validation: a resume makes up
    for it."""
    asked, meter.asked = meter.asked, None
    if asked is None:
        return
    watchdog.at("checkpoint")
    if not in_a_row(progress.skipped, progress.step):
        _checkpoint(job, progress, saver)
    _await_save(job, saver)
    if asked == "stop":
        raise Preempted(f"{job.name}: stopped after step {progress.step}, as asked; the same command goes on")
    if job.world.leader:
        logger.info(f"{job.name}: a checkpoint of step {progress.step}, as a node is about to go")
    watchdog.at("step")


def train_step(job: Job, step_input: StepInput) -> Tensor:
    """One optimizer step. Returns (total, recommendation, alignment) of the global batch: this rank's part of the sum; and
    1 if the step was left out since a gradient is no number, else 0."""
    parts = torch.zeros(3, device=job.world.device)
    for index, micro in enumerate(step_input.micros):
        with part("copy to device"):
            batch, features = job.feed.bring(micro)
        seed_noise(job.seed, step_input.step, index, job.world.rank)
        with part("forward"):
            losses: Any = job.engine.forward(features, batch, row_gather(job.world, len(batch.item_ids)), job.feed.loss)
        spoilt = faults.at("loss", rank=job.world.rank, step=step_input.step)
        total = losses.total * math.nan if spoilt else losses.total
        # a loss that is no number makes each gradient none; one that is, is multiplied by 1
        sound = 1 + 0 * total.detach()
        with part("backward"):
            job.engine.backward(total * sound * micro.weight, last=index == len(step_input.micros) - 1)
        parts += torch.stack([total, losses.recommendation, losses.alignment]).detach().float() * micro.weight
    rate = learning_rate(
        job.config.schedule,
        job.config.learning_rate,
        step_input.step,
        job.feed.stream.steps_per_epoch,
        job.config.epochs,
    )
    with part("update"):
        broken = job.engine.update(rate)
    return torch.cat([parts, broken.to(parts).reshape(1)])


def _end_epoch(job: Job, progress: Progress) -> None:
    _refuse_broken(job, progress)
    if not progress.epoch_predictions:
        raise _diverged(job, f"no step of epoch {progress.epoch + 1} had a loss and gradients that are numbers")
    entry: dict[str, float] = {"epoch": progress.epoch + 1, "loss": progress.epoch_loss / progress.epoch_predictions}
    last = progress.epoch + 1 == job.config.epochs
    if (progress.epoch + 1) % job.config.validate_every == 0 or last:
        faults.at("validate", rank=job.world.rank, step=progress.step)
        with part("validate"):
            metrics = job.validate()
        entry |= {f"validation/{name}": value for name, value in metrics.items()}
        _judge(progress, metrics[CHOSEN_BY])
    progress.history.append(entry)
    progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.epoch_loss, progress.epoch_predictions = 0.0, 0
    progress.finished = _finished(job.config, progress)
    if job.world.leader:
        if len(entry) > 2:  # validated
            shown = [f"{name} {entry[name]:.4f}" for name in SHOWN]
            logger.info(f"{job.name}: epoch {progress.epoch} of {job.config.epochs}: {', '.join(shown)}")
        job.report({**{k: v for k, v in entry.items() if k != "epoch"}, "epoch": progress.epoch}, progress.step)


def _judge(progress: Progress, metric: float) -> None:
    """Whether this validation is the best so far; the earlier epoch wins a tie."""
    if progress.best is not None and metric <= progress.best:
        progress.worse += 1
        return
    progress.best, progress.best_epoch, progress.worse = metric, progress.epoch + 1, 0


def _bring_best(job: Job, checkpoint: Path, epoch: int | None) -> None:
    """A run that goes on elsewhere brings the best weights so far along (they lie beside the checkpoints)."""
    if epoch is None:
        return
    here, there = best_weights(job.folder, epoch), best_weights(checkpoint.parent.parent, epoch)
    if here == there:
        return
    if not there.is_file():
        raise UserError(f"the best weights (epoch {epoch}) are missing", where=there)
    partial = here.with_suffix(".partial")
    try:
        here.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(there, partial)
        flush_to_disk(partial)
        partial.rename(here)
    except OSError as error:
        raise UserError(
            f"the best weights (epoch {epoch}) cannot be brought here ({error.strerror or error})",
            where=error.filename or here,
            remedy="make room or mend the storage; the same command tries again",
        ) from error


def _checkpoint(job: Job, progress: Progress, saver: Saver) -> None:
    """Take a snapshot, and begin to write it once the one before is on disk. Collective."""
    faults.at("checkpoint", rank=job.world.rank, step=progress.step)
    with part("checkpoint"):
        _await_save(job, saver)
        _refuse_broken(job, progress)
        state = saver.snapshot = job.engine.state(saver.snapshot)
        if job.world.leader:
            position = job.feed.stream.state(progress.epoch, progress.batch)
            document = {"progress": asdict(progress), "stream": asdict(position)}
            saver.begin(lambda: _write(job.folder, state, document, job.config, saver.uploads))


def _await_save(job: Job, saver: Saver) -> None:
    """Until the save that was begun is on disk. Collective: if it failed, all ranks raise why."""
    failure = agree(job.world, saver.wait() if job.world.leader else None)
    if failure is not None:
        raise failure


def _write(
    folder: Path, state: EngineState, document: dict[str, Any], config: TrainingConfig, uploads: Uploads | None
) -> None:
    """In the saver's thread: a checkpoint, after the best weights if these are they, before the old ones go."""
    progress, checkpoints = Progress(**document["progress"]), folder / "checkpoints"
    if progress.best_epoch is not None:
        path = best_weights(folder, progress.best_epoch)
        fresh = (progress.epoch, progress.batch) == (progress.best_epoch, 0)
        if fresh:
            faults.at("save", rank=0, step=progress.step, file="best")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, state.weights)
            flush_to_disk(path.parent)
        known = None if fresh else known_best(checkpoints, progress.best_epoch, before=progress.step)
        document["best"] = known or {"epoch": progress.best_epoch, "file": describe(path)}
    held = {uploads.copying} if uploads is not None and uploads.copying is not None else set[int]()
    save_checkpoint(checkpoints, progress.step, state, document, config.keep_checkpoints, config.keep_every, held)
    if uploads is not None:
        uploads.offer(progress.step)
    # each kept checkpoint may be the one that a restart falls back on, so its best weights stay too
    epochs = [kept["progress"]["best_epoch"] for kept in progress_of_all(checkpoints)]
    needed = {best_weights(folder, epoch) for epoch in epochs if epoch is not None}
    for path in (folder / "best").glob("*.safetensors"):
        if path not in needed:
            path.unlink()


def _refuse_broken(job: Job, progress: Progress) -> None:
    """No checkpoint and no validation of weights that are no numbers, or that give none: a restart could not mend them.
    Collective."""
    if in_a_row(progress.skipped, progress.step) > 1:
        raise _too_many_skipped(job, progress)
    held = [_held(parameter, job.world.rank) for parameter in job.engine.model.parameters()]
    # a sum is a number only if all its terms are: ten times as fast as asking each
    broken = ~torch.stack([weight.float().sum() for weight in held]).isfinite().all()
    if sum_over_ranks(job.world, broken.int()):
        raise _diverged(job, f"weights are no numbers after step {progress.step} (epoch {progress.epoch + 1})")


def _held(parameter: torch.nn.Parameter, rank: int) -> Tensor:
    """What a rank holds of a parameter: under DeepSpeed's stage 3 a part, without what fills up the last ones."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter.detach()
    first = rank * part.numel()
    return part.detach()[: max(_shape(parameter).numel() - first, 0)]


def _too_many_skipped(job: Job, progress: Progress) -> Diverged:
    run = in_a_row(progress.skipped, progress.step)
    if run > 1 or not job.config.max_skipped:
        last = f"since step {progress.step - max(run, 1) + 1} (epoch {progress.epoch + 1})"
        return _diverged(
            job, f"the loss or its gradient is no number {last}; {SKIPPED} in the run's folder names the data"
        )
    return _diverged(
        job,
        f"{len(progress.skipped)} of the last {WINDOW * job.config.max_skipped} steps were skipped, as a loss or gradient was "
        f"no number (up to step {progress.skipped[-1]}; {SKIPPED} in the run's folder names the data)",
    )


def _diverged(job: Job, what: str) -> Diverged:
    return Diverged(
        what,
        where=job.name,
        remedy="lower training.learning_rate, set training.clip, or run in fp32; then start again: it goes on from the "
        "last checkpoint",
    )


class Meter:
    """Curves without a synchronisation a step: losses stay on the device until a point is due."""

    def __init__(self, job: Job, step: int, step_done: Callable[[], None]) -> None:
        self.job, self.step_done, self.pending = job, step_done, list[tuple[Tensor, GlobalBatch]]()
        self.waited, self.since = 0.0, 0.0
        self.asked: Asked = None  # by any rank, since the last point
        self.first, self.begun = step, time.perf_counter()
        self.told = self.begun

    def timed(self, inputs: Iterator[StepInput]) -> Iterator[StepInput]:
        """The same inputs; counts the time that the step waits for them."""
        self.waited, self.since = 0.0, time.perf_counter()  # what came between two epochs is no training
        while True:
            asked = time.perf_counter()
            with part("wait for data"):
                step_input = next(inputs, None)
            self.waited += time.perf_counter() - asked
            if step_input is None:
                return
            yield step_input
            self.step_done()

    def add(self, progress: Progress, losses: Tensor, batch: GlobalBatch) -> None:
        self.pending.append((losses, batch))
        if progress.step % self.job.config.log_every == 0:
            self.flush(progress)

    def flush(self, progress: Progress) -> None:
        """Sum the pending losses over ranks, into the epoch's mean and the curves; hear what ranks are asked. Collective."""
        if not self.pending:
            return
        asked = self.job.asked()
        heard = torch.tensor([[asked == "stop", asked == "save", 0, 0]]).to(self.pending[0][0])
        # one copy from the device for all pending steps
        rows = sum_over_ranks(self.job.world, torch.cat([torch.stack([losses for losses, _ in self.pending]), heard]))
        *_, (stop, save, _, _) = rows = rows.double().cpu()
        self.asked = "stop" if stop else "save" if save else self.asked
        losses = rows[:-1]
        counts = torch.tensor([batch.predictions for _, batch in self.pending], dtype=torch.float64)
        skipped = self._skipped(losses)
        weights = counts * ~skipped
        release_now_and_then()
        elapsed = time.perf_counter() - self.since
        rate, wait = float(counts.sum()) / elapsed, self.waited / elapsed
        point = {"train/predictions_per_s": rate, "train/data_wait": wait}
        if skipped.any():
            point["train/skipped"] = float(skipped.sum())
            self._note_skipped(progress, losses, skipped)
        if weights.any():
            total, recommendation, alignment = (
                (losses[~skipped, :3] * weights[~skipped, None]).sum(0) / weights.sum()
            ).tolist()
            if not math.isfinite(total):
                raise _diverged(self.job, f"the loss is {total} at step {progress.step} (epoch {progress.epoch + 1})")
            progress.epoch_loss += total * float(weights.sum())
            progress.epoch_predictions += int(weights.sum())
            point |= {"train/loss": total, "train/recommendation": recommendation, "train/alignment": alignment}
            point |= self._leap(progress, total)
            self._tell(progress, total, rate, wait)
        if self.job.world.leader:
            self.job.report(point, progress.step)
        self.pending.clear()
        self.waited, self.since = 0.0, time.perf_counter()

    def _skipped(self, losses: Tensor) -> Tensor:
        """(n,) which of the pending steps were left out for numbers that are none."""
        skipped = losses[:, 3] > 0
        if self.job.config.precision == "fp16":  # that looks for its scale by gradients that overflow
            skipped &= ~losses[:, 0].isfinite()
        return skipped

    def _note_skipped(self, progress: Progress, losses: Tensor, skipped: Tensor) -> None:
        """Say and write down which, and stop the run if there are too many. The same on all ranks."""
        most, stream = self.job.config.max_skipped, self.job.feed.stream
        for index in torch.nonzero(skipped).flatten().tolist():
            batch, loss = self.pending[index][1], float(losses[index, 0])
            step = batch.epoch * stream.steps_per_epoch + batch.index + 1
            progress.skipped.append(step)
            if self.job.world.leader:
                write_down(self.job.folder / SKIPPED, stream, step, batch, loss)
                what = "its gradient is no number" if math.isfinite(loss) else f"its loss is {loss}"
                logger.warning(
                    f"{self.job.name}: step {step} (epoch {batch.epoch + 1}) is skipped: {what}; see {SKIPPED}"
                )
        progress.skipped = within_window(progress.skipped, progress.step, most)
        if len(progress.skipped) > most:
            raise _too_many_skipped(self.job, progress)

    def _leap(self, progress: Progress, loss: float) -> Metrics:
        """The curve's last points, and a word where it leaps."""
        leap = spike(progress.recent, loss)
        progress.recent = [*progress.recent, loss][-REMEMBERED:]
        if leap is None:
            return {}
        if self.job.world.leader:
            logger.warning(
                f"{self.job.name}: the loss leaps to {loss:.4f} at step {progress.step}, {leap:.0f} deviations above its median"
            )
        return {"train/spike": leap}

    def _tell(self, progress: Progress, loss: float, rate: float, wait: float) -> None:
        now = time.perf_counter()
        if not self.job.world.leader or now - self.told < 1:
            return
        self.told = now
        steps = self.job.config.epochs * self.job.feed.stream.steps_per_epoch
        left = (steps - progress.step) * (now - self.begun) / (progress.step - self.first)
        self.job.live(Live(self.job.name, progress.step, steps, loss, rate, wait, left))
