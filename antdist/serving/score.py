"""The top N items for every user of a domain, into Parquet: `antdist score`.

The catalogue is embedded once, in ranges that all workers then share through Ray's object store. A part of the output is
a run of blocks of users of one shard; one worker reads, scores and writes it, finished on disk before its next, so a job
that is killed continues where it stopped. How users are cut into parts depends on the domain alone.

A row is a user with lists of items and scores: user ids, which are long, occur once, and the items of a user are read
together. `UNNEST` turns the lists into rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.domain import Domain, open_domain
from antdist.distributed.local_ray import ray_data_session
from antdist.errors import UserError, redact
from antdist.features.catalogue import open_optional_table
from antdist.io.files import file_sha256
from antdist.io.progress import track
from antdist.model.io import WEIGHTS
from antdist.report import Report, count
from antdist.serving.apply import FoundModel, open_catalogue
from antdist.serving.score_folder import SUMMARY, ScoreFolder
from antdist.serving.scorer import Scorer, ScoreTask, UserPart, embed_range, item_ranges, resolve_device
from antdist.serving.top_n import HISTORY_BATCH

if TYPE_CHECKING:
    import pyarrow as pa

    from antdist.model.recommender import Recommender

PARTS, PART_BLOCKS = 64, 64  # parts that a small domain is cut into, and blocks of a large domain's parts


@dataclass(frozen=True, repr=False)
class ScoreReport(Report):
    """The result of `score`: `rows` are (user, item) pairs, `fresh_users` were scored in `seconds`."""

    out: str
    users: int
    rows: int
    parts: int
    fresh_parts: int
    fresh_users: int
    embedding_seconds: float
    seconds: float
    workers: int

    @property
    def rate(self) -> float | None:
        """Users a second, without the embedding of the catalogue; None if all were scored before."""
        return self.fresh_users / self.seconds if self.fresh_users and self.seconds > 0 else None

    def lines(self) -> list[str]:
        result = (
            f"{count(self.rows, 'item')} for {count(self.users, 'user')} in {count(self.parts, 'file')} in {self.out}"
        )
        if self.fresh_parts < self.parts:
            result += f", {self.parts - self.fresh_parts:,} of them finished before"
        if self.rate is None:
            return [result]
        workers = count(self.workers, "worker") if self.workers else "no workers"
        catalogue = f"the catalogue embedded in {self.embedding_seconds:.1f} s"
        return [result, f"{self.rate:,.0f} users/s, {self.seconds:.1f} s, {workers}; {catalogue}"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"users_per_second": self.rate}


def score(
    found: FoundModel,
    domain: Domain,
    out: str,
    *,
    n: int = 10,
    include_seen: bool = False,
    workers: int = 2,
    batch_size: int = HISTORY_BATCH,
    device: str = "auto",
    threads: int | None = None,
) -> ScoreReport:
    """Write the n items of highest cosine for every user of the domain, pending users included.

    Histories are complete, and all items of the catalogue are ranked, including those that no training saw.

    Args:
        found: the model (`antdist.serving.apply.find_model`).
        out: a folder that the nodes of a cluster share, or a URI that fsspec knows.
        include_seen: rank the items of a user's history, too.
        workers: Ray actors; 0: in this process, without Ray.
        batch_size: histories encoded and scored together.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads a worker; None: its share of the cores.

    Raises:
        UserError: features missing or of other encoders, ANT_t on another catalogue, a damaged shard, a model whose
            vectors are NaN or Inf; `out` holds something else, or is not writable.
    """
    assert n > 0 and batch_size > 0
    open_catalogue(found.card, domain)  # before anything is written
    place = out if "://" in out else str(Path(out).resolve())
    folder, inputs = ScoreFolder(place), _digest_inputs(found, domain, n, include_seen)
    folder.claim(inputs)
    parts, finished = cut_into_parts(domain), folder.read_finished()
    missing = [part for part in parts if part.number not in finished]
    embedded, start = 0.0, time.monotonic()
    if missing:
        folder.remove(SUMMARY)
        task = ScoreTask(domain.address, place, n, include_seen, batch_size, device, threads)
        scoring = _score_here(found, task, missing) if workers == 0 else _score_on_ray(found, task, missing, workers)
        with scoring as notes:
            embedded, start = time.monotonic() - start, time.monotonic()
            users = sum(part.users for part in missing)
            for note in track(notes, "users scored", users, size=lambda note: int(note["users"])):
                finished[note["number"]] = note
    summary = _write_summary(folder, found, domain, inputs, [finished[part.number] for part in parts])
    return ScoreReport(
        out=redact(out),
        users=summary["users"],
        rows=summary["rows"],
        parts=len(parts),
        fresh_parts=len(missing),
        fresh_users=sum(part.users for part in missing),
        embedding_seconds=embedded,
        seconds=time.monotonic() - start,
        workers=workers,
    )


def _digest_inputs(found: FoundModel, domain: Domain, n: int, include_seen: bool) -> dict[str, str]:
    """Return digests of everything that determines the output."""
    card = found.card
    inputs = {
        "model.weights": file_sha256(found.folder / WEIGHTS),
        "model.config": _digest([card.config.model_dump(mode="json"), card.dims]),
        "domain": domain.fingerprint,
        "waiting users": domain.pending.sha256 if domain.pending else "none",
        "n": str(n),
        "include_seen": str(include_seen),
    }
    for modality in card.dims:
        table = open_optional_table(domain, modality)
        parts = [] if table is None else [[part.sha256, part.present_sha256] for part in table.meta.parts]
        inputs[f"features.{modality}"] = _digest(parts)
    return inputs


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def cut_into_parts(domain: Domain) -> list[UserPart]:
    """Cut the users by blocks into some 64 parts, those of a large domain into parts of 64 blocks."""
    manifest, pending = domain.manifest, domain.pending
    blocks = max(1, min(PART_BLOCKS, manifest.blocks // PARTS))
    parts: list[UserPart] = []
    for number, shard in enumerate([*manifest.sequence_shards, *([pending] if pending else [])]):
        for first in range(0, len(shard.blocks), blocks):
            mine = shard.blocks[first : first + blocks]
            users = sum(block.users for block in mine)
            parts.append(UserPart(len(parts), number, first, first + len(mine), users))
    return parts


def _write_summary(
    folder: ScoreFolder, found: FoundModel, domain: Domain, inputs: dict[str, str], notes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the summary, once this process sees all parts.

    Raises:
        UserError: it does not: the nodes do not share the folder.
    """
    if missing := folder.find_missing(notes):
        raise UserError(
            f"{missing[0]}, which a worker wrote, is not there",
            where=folder.place,
            remedy="name a folder that all nodes of the cluster share, or a URI",
        )
    folder.remove_partial()
    summary = {
        "model": redact(found.uri),
        "domain": domain.name,
        "inputs": inputs,
        "users": sum(note["users"] for note in notes),
        "rows": sum(note["rows"] for note in notes),
        "files": [{key: note[key] for key in ("name", "users", "rows", "bytes", "sha256")} for note in notes],
    }
    folder.write_json(SUMMARY, summary)
    return summary


@contextlib.contextmanager
def _score_here(found: FoundModel, task: ScoreTask, parts: Sequence[UserPart]) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield the notes of the parts, scored in this process, after embedding the catalogue."""
    import pyarrow as pa

    domain, device = open_domain(task.domain), resolve_device(task.device)
    shards = item_ranges(domain)
    embedded = [
        embed_range(found.model, found.card, domain, run, device)
        for run in track(shards, "ranges of items embedded", len(shards))
    ]
    item_ids = pa.concat_arrays([ids for _, ids in embedded])
    scorer = Scorer(task, found.model, [vectors for vectors, _ in embedded], item_ids)
    yield (scorer.score(part) for part in parts)


class ScoreActor:
    """A `Scorer` as Ray Data calls it: a row in, a row out; a UserError is returned as a row."""

    def __init__(self, task: ScoreTask, shared: Sequence[Any]) -> None:
        import ray

        model, item_ids, *ranges = ray.get(list(shared))
        self.scorer = Scorer(task, model, ranges, item_ids)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            note = self.scorer.score(UserPart(**json.loads(row["part"])))
            return {"note": json.dumps(note), "error": ""}
        except UserError as error:
            return {"note": "", "error": json.dumps(error.to_dict())}
        except OSError as error:
            unwritable = UserError(f"cannot be written ({error.strerror or error})", where=self.scorer.task.out)
            return {"note": "", "error": json.dumps(unwritable.to_dict())}


@contextlib.contextmanager
def _score_on_ray(
    found: FoundModel, task: ScoreTask, parts: Sequence[UserPart], workers: int
) -> Iterator[Iterator[dict[str, Any]]]:
    """Yield the notes as `_score_here`, from actors of the running Ray or of a temporary local one."""
    workers = min(workers, len(parts))
    with ray_data_session(workers, task.threads) as share:
        import ray

        task = replace(task, threads=share)
        gpus = ray.cluster_resources().get("GPU", 0) if task.device != "cpu" else 0
        resources = {"num_cpus": share, "num_gpus": min(1.0, gpus / workers) if gpus else None}
        shared = _embed_on_ray(found, task, resources)
        rows = [{"part": json.dumps(asdict(part))} for part in parts]
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            ScoreActor,
            fn_constructor_args=(task, shared),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        yield map(_unpack_note, scored.iter_rows())


def _unpack_note(row: dict[str, Any]) -> dict[str, Any]:
    if row["error"]:
        raise UserError.from_dict(json.loads(row["error"]))
    note: dict[str, Any] = json.loads(row["note"])
    return note


def _embed_on_ray(found: FoundModel, task: ScoreTask, resources: dict[str, Any]) -> list[Any]:
    """Return references into Ray's object store: the model, the items' ids, and the ranges of vectors."""
    import pyarrow as pa
    import ray
    from ray.exceptions import RayTaskError

    def embed(model: Recommender, shards: tuple[int, int]) -> tuple[NDArray[np.float32], pa.LargeStringArray]:
        import torch

        torch.set_num_threads(task.threads or 1)
        return embed_range(model, found.card, open_domain(task.domain), shards, resolve_device(task.device))

    model, remote = ray.put(found.model), ray.remote(embed).options(num_returns=2, **resources)
    ranges = [remote.remote(model, shards) for shards in item_ranges(open_domain(task.domain))]
    try:
        ids = [ray.get(item_ids) for _, item_ids in track(ranges, "ranges of items embedded", len(ranges))]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    return [model, ray.put(pa.concat_arrays(ids)), *(vectors for vectors, _ in ranges)]
