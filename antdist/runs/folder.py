"""A run's folder: the name of every file in it, and in the folder of each trial.

STORAGE/NAME/           of a pre-training
  config.yaml           the resolved configuration, which a later start must agree with
  run.json              RunRecord
  outcome.json          PretrainResult
  log.txt               what the leading worker logs
  live.json             Status: step, loss, rate, time left
  stop                  exists while the workers are asked to save their state and end
  hang/                 stacks of a rank that made no progress
  skipped.jsonl         skipped steps and their data
  lock, leader.lock     held by the command, and by the leading worker
  settling.lock         held while the configuration or the sources are written
  checkpoints/  best/  model/  training_state/
  from.json  from-*/    Source of each MODEL that the run starts from, and a copy of its files
  profile/              traces of some steps, with profile=true
STORAGE/NAME/TARGET/    of an adaptation: config.yaml, from.json, locks and
  preempted.json        Preemption
  verdict.json          Judgement
  STRATEGY-seedN/       a trial: as above, with TrialResult in outcome.json, and
    validation.npz, test.npz    the rank of each user's target

With `ray.remote_storage` the checkpoints, the best weights, config.yaml and run.json have a copy there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from antdist.config.schema import PretrainConfig, RayConfig, RelearnConfig, Strategy
from antdist.io.files import read_json, write_json
from antdist.io.storage import is_uri
from antdist.runs.records import PretrainResult, RunRecord, Source, TrialResult
from antdist.tracking.registry import MODEL, TRAINING_STATE
from antdist.training.checkpoints import BEST, CHECKPOINTS
from antdist.training.status import Status

if TYPE_CHECKING:
    from antdist.training.checkpoints.remote import Remote

Result = TypeVar("Result", PretrainResult, TrialResult)


class _Inside:
    """A file or folder of a fixed name in a run's folder, as an attribute."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: RunFolder, _: type[RunFolder]) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run or a trial. `copy` is the URI or path of its copy in `ray.remote_storage`."""

    path: Path
    copy: str | None = field(default=None, repr=False)  # may hold a password

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def trial(self, strategy: Strategy, seed: int) -> RunFolder:
        """The folder of one trial of an adaptation."""
        name = f"{strategy}-seed{seed}"
        return RunFolder(self.path / name, self.copy and f"{self.copy}/{name}")

    config_file = _Inside("config.yaml")
    record_file = _Inside("run.json")
    result_file = _Inside("outcome.json")
    preemption_file = _Inside("preempted.json")
    judgement_file = _Inside("verdict.json")
    sources_file = _Inside("from.json")
    log_file = _Inside("log.txt")
    status_file = _Inside("live.json")
    stop_file = _Inside("stop")
    command_lock = _Inside("lock")
    leader_lock = _Inside("leader.lock")
    files_lock = _Inside("settling.lock")
    checkpoints = _Inside(CHECKPOINTS)
    best = _Inside(BEST)
    model = _Inside(MODEL)
    training_state = _Inside(TRAINING_STATE)
    profile = _Inside("profile")
    partial_source = _Inside("from.partial")  # while the files of a source are copied

    def ranks_file(self, split: str) -> Path:
        return self.path / f"{split}.npz"

    def source(self, digest: str) -> Path:
        """The copy of the model or training state with this digest."""
        return self.path / f"from-{digest[:12]}"

    def has_undelivered(self) -> bool:
        """Whether tracking records wait in an outbox here."""
        return any(outbox.stat().st_size for outbox in self.path.glob("outbox-*.jsonl"))

    def read_record(self) -> RunRecord | None:
        return RunRecord.read(self.record_file)

    def read_copied_record(self) -> RunRecord | None:
        """The record in the copy of this folder. Raises UserError if `ray.remote_storage` does not answer."""
        remote = self.open_copy()
        text = None if remote is None else remote.read(self.record_file.name)
        return None if remote is None or text is None else RunRecord.parse(json.loads(text), remote.uri)

    def write_record(self, record: RunRecord) -> None:
        """Write it here and to the copy of this folder."""
        record.write(self.record_file)
        if (remote := self.open_copy()) is not None:
            remote.write(self.record_file.name, json.dumps(record.to_json()).encode())

    def read_result(self, kind: type[Result]) -> Result | None:
        return kind.read(self.result_file)

    def read_sources(self) -> dict[str, Source]:
        """The sources of this run by MODEL, as the configuration names it."""
        content = read_json(self.sources_file) or {}
        return {model: Source.parse(source, self.sources_file) for model, source in content.items()}

    def write_source(self, model: str, source: Source) -> None:
        sources = self.read_sources() | {model: source}
        write_json(self.sources_file, {model: each.to_json() for model, each in sources.items()})

    def read_status(self) -> Status | None:
        content = read_json(self.status_file)
        return None if content is None else Status(**content)

    def write_status(self, status: Status) -> None:
        write_json(self.status_file, asdict(status), sync="none")

    def open_copy(self) -> Remote | None:
        """The copy of this folder; None without `ray.remote_storage`. Raises UserError if that cannot be used."""
        from antdist.training.checkpoints.remote import Remote

        return None if self.copy is None else Remote(self.copy)


def run_folder(config: PretrainConfig | RelearnConfig) -> RunFolder:
    """The folder of a pre-training, STORAGE/NAME, or of an adaptation, STORAGE/NAME/TARGET; absolute."""
    parts = [config.name] if isinstance(config, PretrainConfig) else [config.name, str(config.target)]
    place = "/".join(parts)
    return RunFolder(storage(config.ray) / place, _copy(config.ray, place))


def storage(config: RayConfig) -> Path:
    """The absolute path of `ray.storage`."""
    return Path(config.storage).resolve()


def absolute(place: str) -> str:
    """An absolute path; a URI without its trailing slashes."""
    return place.rstrip("/") if is_uri(place) else str(Path(place).resolve())


def _copy(config: RayConfig, place: str) -> str | None:
    return None if config.remote_storage is None else f"{absolute(config.remote_storage)}/{place}"
