"""The training loop of pre-training and adaptation alike, one process a rank.

    resume, or begin
    while epochs remain:
        for each batch left of the epoch:  step; log a point if due; stop if requested; checkpoint if due
        validate if due  ->  count validations since the best one
        checkpoint: a snapshot at once, written in the background with the best weights

All state that survives is in `Progress` and the engine; order, noise and learning rate are functions of the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antdist import faults
from antdist.config.schema import TrainingConfig
from antdist.data.stream.stream import StreamState
from antdist.distributed.world import World, agree, barrier, row_gather
from antdist.errors import Preempted, UserError
from antdist.io.logs import get_logger
from antdist.model.ops.products import exact_products
from antdist.profiling import profile_steps, trace_part
from antdist.training.checkpoints.local import Checkpoint
from antdist.training.checkpoints.remote import Remote
from antdist.training.checkpoints.saver import Saver
from antdist.training.checkpoints.uploads import Uploads
from antdist.training.divergence import Diverged, weights_are_finite
from antdist.training.engines.base import Engine, EngineState
from antdist.training.feed import Feed, StepInput
from antdist.training.memory import keep_freed_memory
from antdist.training.meter import LossMeter, Window
from antdist.training.noise import seed_noise
from antdist.training.progress import SELECTION_METRIC, Metrics, Progress
from antdist.training.resuming import find_checkpoint
from antdist.training.schedule import learning_rate
from antdist.training.signals import ControlSignals, Signal
from antdist.training.skipping import SkipPolicy, consecutive_skips
from antdist.training.spikes import RECENT_POINTS, loss_spike
from antdist.training.status import Status, StatusReporter, log_status
from antdist.training.watchdog import Watchdog

logger = get_logger(__name__)

SHOWN_METRICS = ("loss", f"validation/{SELECTION_METRIC}", "validation/NDCG@10")  # after each validation


@dataclass(repr=False, eq=False)
class Trainer:
    """One training run on this rank; `train` runs it, once.

    Args:
        folder: gets checkpoints, best weights and `skipped.jsonl`.
        evaluate: returns the validation metrics, the same on every rank. Collective.
        log_metrics: receives the points of the curves, on the leader.
        show_status: receives the status, at most once a second, on the leader.
        poll_signal: asked on each rank at each point of the curves; all ranks follow the signal of any.
        start: the state to begin with if neither `folder` nor `remote` has a checkpoint; the leader's counts.
        remote: storage that checkpoints are copied to and fetched from; the leader's counts.
        profile: write a trace of a few steps to `folder/profile` on each rank.
    """

    engine: Engine
    feed: Feed
    config: TrainingConfig
    world: World
    folder: Path
    seed: int
    evaluate: Callable[[], Metrics]
    log_metrics: Callable[[Metrics, int], None]
    show_status: Callable[[Status], None] = log_status
    poll_signal: Callable[[], Signal | None] = lambda: None
    name: str = "training"
    start: Checkpoint | None = None
    remote: Remote | None = None
    profile: bool = False
    progress: Progress = field(init=False, default_factory=Progress)
    stop_at: int | None = field(init=False, default=None)  # the step of `training.stop_after`
    saver: Saver = field(init=False)
    status: StatusReporter = field(init=False)
    profile_step: Callable[[], None] = field(init=False)

    def __post_init__(self) -> None:
        self.watchdog = Watchdog(self.folder, self.world.rank, self.name, self.config.hang)
        self.meter, self.signals = LossMeter(self.world), ControlSignals(self.poll_signal)
        self.skips = SkipPolicy(self.name, self.folder, self.feed.stream, self.config, self.world.leader)

    def train(self) -> Progress:
        """Train until the last epoch, `patience` or `stop_after`.

        When it returns on any rank, the checkpoints and the best weights (`best_weights(folder, ...)`) are on disk; when
        it raises, the saves that had begun are.

        Raises:
            Diverged: too many steps were skipped, or the weights are NaN or Inf. On all ranks.
            Preempted: a signal to stop; a checkpoint of the last step is on disk. On all ranks.
            UserError: a checkpoint cannot be written, or the one found does not fit. On all ranks.
        """
        with self.watchdog, contextlib.ExitStack() as resources:
            self.resume()
            self._set_up(resources)
            while not self._is_done():
                if self.train_epoch():
                    self.end_epoch()
                self.checkpoint()
            with self.watchdog.phase("checkpoint"):
                self._await_save()
                resources.close()
                barrier(self.world)
        return self.progress

    def resume(self) -> None:
        """Load the newest complete checkpoint, else `start`, else start over; the leader decides."""
        found: Checkpoint | None = None
        failure: UserError | None = None
        try:
            if self.world.leader:
                found = find_checkpoint(self.folder, self.remote, self.start, self.engine.model)
        except UserError as error:
            failure = error
        document, failure = agree(self.world, (found.document if found else None, failure))
        if failure is not None:
            raise failure
        if document is None:
            if self.world.leader:
                self.skips.forget_after(0)
            return
        self.feed.stream.check_state(StreamState(**document["stream"]))
        self.engine.load(found.state if found else EngineState())
        self.progress = progress = Progress(**document["progress"])
        progress.check_finished(self.config)
        if found is not None:
            if progress.finished:
                logger.info(
                    f"{self.name}: already finished ({progress.finished}, step {progress.step}): nothing to train"
                )
            else:
                self.skips.forget_after(progress.step)
                workers = f"{self.world.size} worker{'s' if self.world.size > 1 else ''}"
                where = f"at step {progress.step}, epoch {progress.epoch + 1}, {workers}, from {found.folder}"
                logger.info(f"{self.name}: {'resumes' if progress.step else 'begins'} {where}")
        barrier(self.world)

    def _set_up(self, resources: contextlib.ExitStack) -> None:
        """Acquire what the loop needs: exact matrix products, uploads, saver and profiler."""
        on_gpu, step = self.world.device.type == "cuda", self.progress.step
        if not on_gpu:
            keep_freed_memory()
        resources.enter_context(exact_products(self.world.device))
        uploads = None
        if self.remote is not None and self.world.leader:
            config, hang = self.config, self.config.hang
            # at the end the leader waits for the last upload, and its peers for the leader: below the watchdog's limits
            patience = 60 * min(hang.start_minutes, hang.step_minutes, hang.checkpoint_minutes) / 2
            uploads = resources.enter_context(
                Uploads(self.remote, self.folder, config.keep_checkpoints, config.keep_every, patience)
            )
        self.saver = resources.enter_context(Saver(self.folder, self.config, uploads))
        trace = self.folder / "profile" / f"rank-{self.world.rank}.json.gz" if self.profile else None
        self.profile_step = resources.enter_context(profile_steps(trace, on_gpu=on_gpu))
        self.stop_at = None if self.config.stop_after is None else step + self.config.stop_after
        steps = self.config.epochs * self.feed.stream.steps_per_epoch
        self.status = StatusReporter(self.name, self.show_status, step, steps)

    def _is_done(self) -> bool:
        return self.progress.finished is not None or (self.stop_at is not None and self.progress.step >= self.stop_at)

    def train_epoch(self) -> bool:
        """Train the rest of the epoch. Returns False if `stop_after` ends it early."""
        progress, steps_per_epoch = self.progress, self.feed.stream.steps_per_epoch
        self.engine.model.train()
        for step_input in self.meter.measure_wait(self.feed.epoch(progress.epoch, progress.batch)):
            faults.inject("step", rank=self.world.rank, step=step_input.step)
            losses = self.step(step_input)
            self.watchdog.step_done()
            progress.step, progress.batch = step_input.step + 1, step_input.batch.index + 1
            self.meter.add(losses, step_input.batch)
            if progress.step % self.config.log_every == 0:
                self.log_point()
            if progress.step == self.stop_at and progress.batch < steps_per_epoch:
                self.log_point()
                return False
            self.follow_signal()
            if self.config.checkpoint_every and progress.step % self.config.checkpoint_every == 0:
                self.log_point()
                self._checkpoint_unless_skipped()
            self.profile_step()
        self.log_point()
        self.follow_signal()  # before the validation: a resume makes up for it
        return True

    def step(self, step_input: StepInput) -> Tensor:
        """Take one optimizer step.

        Returns:
            (4,) on the device: this rank's part of the global batch's total, recommendation and alignment loss, to be
            summed over ranks; then 1 if the update was skipped for a NaN or Inf gradient, else 0.
        """
        losses = torch.zeros(3, device=self.world.device)
        for index in range(len(step_input.micro_batches)):
            losses += self._forward_backward(step_input, index)
        rate = learning_rate(
            self.config.schedule,
            self.config.learning_rate,
            step_input.step,
            self.feed.stream.steps_per_epoch,
            self.config.epochs,
        )
        with trace_part("update"):
            skipped = self.engine.update(rate)
        return torch.cat([losses, skipped.to(losses).reshape(1)])

    def _forward_backward(self, step_input: StepInput, index: int) -> Tensor:
        """Run one micro-batch. Returns its (3,) losses, weighted by its part of the step's predictions."""
        micro, last = step_input.micro_batches[index], index == len(step_input.micro_batches) - 1
        with trace_part("copy to device"):
            batch, features = self.feed.to_device(micro)
        seed_noise(self.seed, step_input.step, index, self.world.rank)
        with trace_part("forward"):
            gather = row_gather(self.world, len(batch.item_ids))
            losses: Any = self.engine.forward(features, batch, gather, self.feed.loss)
        spoil = faults.inject("loss", rank=self.world.rank, step=step_input.step)
        total = losses.total * math.nan if spoil else losses.total
        # times 1 if the loss is finite; else times NaN, so that every gradient is NaN and the update is skipped
        factor = 1 + 0 * total.detach()
        with trace_part("backward"):
            self.engine.backward(total * factor * micro.weight, last=last)
        return torch.stack([total, losses.recommendation, losses.alignment]).detach().float() * micro.weight

    def log_point(self) -> None:
        """Add the pending losses to the epoch's mean and the curves, and receive signals. Collective."""
        if self.meter.is_empty:
            return
        progress = self.progress
        window = self.meter.reduce(self.signals)
        skipped = self.skips.find(window)
        point = {"train/predictions_per_s": window.predictions_per_s, "train/data_wait": window.data_wait}
        if skipped.any():
            point["train/skipped"] = float(skipped.sum())
            self.skips.record(progress, window, skipped)
        weights = window.weights(skipped)
        if weights.any():
            point |= self._loss_point(window, skipped, weights)
        if self.world.leader:
            self.log_metrics(point, progress.step)
        self.meter.restart()

    def _loss_point(self, window: Window, skipped: Tensor, weights: Tensor) -> Metrics:
        """Add the window's losses to the epoch's mean; return the point of the loss curves, and report a spike."""
        progress = self.progress
        total, recommendation, alignment = window.mean_losses(skipped, weights)
        if not math.isfinite(total):
            raise Diverged(f"the loss is {total} at step {progress.step} (epoch {progress.epoch + 1})", self.name)
        progress.epoch_loss += total * float(weights.sum())
        progress.epoch_predictions += int(weights.sum())
        point = {"train/loss": total, "train/recommendation": recommendation, "train/alignment": alignment}
        spike = loss_spike(progress.recent, total)
        progress.recent = [*progress.recent, total][-RECENT_POINTS:]
        if spike is not None:
            point["train/spike"] = spike
        if self.world.leader:
            if spike is not None:
                logger.warning(
                    f"{self.name}: loss spike to {total:.4f} at step {progress.step}, {spike:.0f} median absolute "
                    "deviations above the median"
                )
            self.status.report(progress.step, total, window.predictions_per_s, window.data_wait)
        return point

    def follow_signal(self) -> None:
        """Save a checkpoint if any rank received a signal, and raise Preempted if it was to stop. Collective."""
        signal = self.signals.take()
        if signal is None:
            return
        step = self.progress.step
        with self.watchdog.phase("checkpoint"):
            self._checkpoint_unless_skipped()
            self._await_save()
            if signal == "stop":
                raise Preempted(f"{self.name}: stopped after step {step}; run the same command to continue")
            if self.world.leader:
                logger.info(f"{self.name}: saved a checkpoint of step {step}, as a node is about to leave")

    def _checkpoint_unless_skipped(self) -> None:
        """Save a checkpoint, unless the last step was skipped: the weights may be the cause."""
        if not consecutive_skips(self.progress):
            self.checkpoint()

    def end_epoch(self) -> None:
        """Validate if due, and close the epoch. Collective."""
        progress = self.progress
        with self.watchdog.phase("checkpoint"):
            self._check_weights()
            if not progress.epoch_predictions:
                raise Diverged(
                    f"the loss or gradient of every step of epoch {progress.epoch + 1} is NaN or Inf", self.name
                )
            entry: Metrics = {"epoch": progress.epoch + 1, "loss": progress.epoch_loss / progress.epoch_predictions}
            is_last = progress.epoch + 1 == self.config.epochs
            if (progress.epoch + 1) % self.config.validate_every == 0 or is_last:
                entry |= {f"validation/{name}": value for name, value in self.validate().items()}
            progress.begin_next_epoch(entry)
            progress.check_finished(self.config)
            if self.world.leader:
                if len(entry) > 2:  # validated
                    shown = ", ".join(f"{name} {entry[name]:.4f}" for name in SHOWN_METRICS)
                    logger.info(f"{self.name}: epoch {progress.epoch}/{self.config.epochs}: {shown}")
                self.log_metrics(dict(entry), progress.step)

    def validate(self) -> Metrics:
        """Evaluate on the validation users, and note whether the weights are the best so far. Collective."""
        faults.inject("validate", rank=self.world.rank, step=self.progress.step)
        with trace_part("validate"):
            metrics = self.evaluate()
        self.progress.record_validation(metrics[SELECTION_METRIC])
        return metrics

    def checkpoint(self) -> None:
        """Take a snapshot once the previous one is on disk, and write it in the background. Collective."""
        with self.watchdog.phase("checkpoint"):
            faults.inject("checkpoint", rank=self.world.rank, step=self.progress.step)
            with trace_part("checkpoint"):
                self._await_save()
                self._check_weights()
                state = self.saver.snapshot = self.engine.state(self.saver.snapshot)
                if self.world.leader:
                    position = self.feed.stream.state(self.progress.epoch, self.progress.batch)
                    self.saver.save(state, {"progress": asdict(self.progress), "stream": asdict(position)})

    def _await_save(self) -> None:
        """Wait until the save that was begun is on disk. Collective: if it failed, all ranks raise why."""
        failure = agree(self.world, self.saver.wait() if self.world.leader else None)
        if failure is not None:
            raise failure

    def _check_weights(self) -> None:
        """Refuse to save or validate weights that are NaN or Inf, or whose last losses are. Raises Diverged.

        A restart could not recover from them.
        """
        if consecutive_skips(self.progress) > 1:
            raise self.skips.too_many(self.progress)
        if not weights_are_finite(self.engine.model, self.world):
            step, epoch = self.progress.step, self.progress.epoch + 1
            raise Diverged(f"weights are NaN or Inf after step {step} (epoch {epoch})", self.name)
