"""Where a training run stands: the part of a checkpoint beside weights and moments."""

from __future__ import annotations

from dataclasses import dataclass, field

from antdist.config.schema import TrainingConfig

SELECTION_METRIC = "Recall@10"  # of the validation users: the best weights are those that maximise it (spec, section 7)
Metrics = dict[str, float]


@dataclass
class Progress:
    """A run's position, curves and early-stopping state: the JSON in `progress.json`."""

    step: int = 0  # the next optimizer step: epoch times steps an epoch, plus batch
    epoch: int = 0  # the epoch of the next step
    batch: int = 0  # the next step's batch within its epoch
    epoch_loss: float = 0.0  # sum of predictions times loss, in this epoch so far
    epoch_predictions: int = 0
    best: float | None = None  # the best value of the selection metric
    best_epoch: int | None = None
    worse: int = 0  # validations since the best one
    history: list[Metrics] = field(default_factory=list)  # one entry an epoch
    finished: str | None = None  # the reason, once the run is finished
    skipped: list[int] = field(default_factory=list)  # recently skipped steps, counted from 1
    recent: list[float] = field(default_factory=list)  # the last points of the loss curve

    def record_validation(self, metric: float) -> None:
        """Note whether this epoch's validation is the best so far; the earlier epoch wins a tie."""
        if self.best is not None and metric <= self.best:
            self.worse += 1
        else:
            self.best, self.best_epoch, self.worse = metric, self.epoch + 1, 0

    def begin_next_epoch(self, entry: Metrics) -> None:
        """Append the epoch's entry to the history and move to the start of the next epoch."""
        self.history.append(entry)
        self.epoch, self.batch = self.epoch + 1, 0
        self.epoch_loss, self.epoch_predictions = 0.0, 0

    def check_finished(self, config: TrainingConfig) -> None:
        """Set `finished`; again after a resume, as more epochs or patience let a finished run continue."""
        self.finished = None
        if self.epoch >= config.epochs:
            self.finished = "all epochs done"
        elif config.patience is not None and self.worse >= config.patience:
            validations = f"{self.worse} validation{'s' if self.worse > 1 else ''}"
            self.finished = f"no better validation {SELECTION_METRIC} in {validations}"
