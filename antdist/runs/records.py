"""The JSON files of a run's folder, each as a model.

Folders that earlier versions wrote still load: names of files and keys stay as they are, and unknown keys are ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from antdist.errors import UserError
from antdist.io.files import read_json, write_json

Metrics = dict[str, int | float]


class Record(BaseModel):
    """One JSON file. Only keys that were set are written."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the file; None if there is none. Raises UserError if it is damaged."""
        content = read_json(path)
        return None if content is None else cls.parse(content, path)

    @classmethod
    def parse(cls, content: Any, where: object) -> Self:
        """Validate the content of a file. Raises UserError naming the file and the first key that is wrong."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(
                f"the file is damaged: {key}: {first['msg']}",
                where=where,
                remedy="restore it from a copy, or remove it",
            ) from None

    def write(self, path: Path) -> None:
        """Write the file so that a reader sees all of it or none, after a power cut too."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


class RunRecord(Record):
    """`run.json`: the MLflow run that a run or a trial writes to, over restarts, and what it started from."""

    run_id: str | None  # None: the tracking store does not know the run that the copy of the folder names
    parent: str | None = None
    data: dict[str, str] | None = None  # fingerprint of each domain of a pre-training
    tags: dict[str, str] | None = None  # of a pre-training that continues another


class ErrorRecord(Record):
    """A `UserError` on its way from the workers to the driver."""

    what: str
    where: str | None = None
    remedy: str | None = None

    @classmethod
    def of(cls, error: UserError) -> Self:
        return cls.model_validate(error.to_dict())

    def to_error(self) -> UserError:
        return UserError.from_dict(self.model_dump())


class PretrainResult(Record):
    """`outcome.json` of a pre-training: how the last session ended."""

    finished: str | None = None  # why nothing is left to train; None if training.stop_after ended the session
    best: float | None = None  # validation Recall@10
    history: list[Metrics] = []
    preempted: str | None = None
    error: ErrorRecord | None = None


class TrialResult(Record):
    """`outcome.json` of a trial: the metrics of its best epoch, or the error that ended it."""

    epoch: int | None = None
    epochs: int | None = None
    finished: str | None = None
    validation: Metrics = {}
    test: Metrics = {}
    error: ErrorRecord | None = None


class Preemption(Record):
    """`preempted.json`: where the workers of an adaptation stopped, as asked."""

    preempted: str


class Source(Record):
    """An entry of `from.json`: what a MODEL was when the run resolved it."""

    uri: str
    run_id: str | None = None
    digest: str
    resolved: str = Field(alias="looked_up")  # date and time
