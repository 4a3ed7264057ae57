"""The top N items for every user of a domain, into Parquet: `antdist score`.

The catalogue is embedded once, in ranges, which all workers then share through Ray's object store. A part of the output is a
run of blocks of users of one shard: read, scored and written by one worker, finished on disk before its next, so a job that
is killed goes on where it stopped. How users are cut into parts depends on the domain alone.

A row is a user, with lists of items and scores: user ids, which are long, stand there once, and what is shown to a user is
read together. `UNNEST` makes it long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import IntArray
from antdist.distributed.local_ray import ray_data_session
from antdist.errors import UserError, redact
from antdist.features.catalogue import open_optional_table
from antdist.io.files import file_sha256
from antdist.io.progress import track
from antdist.model.io import WEIGHTS
from antdist.report import Report
from antdist.serving.output import SUMMARY, Output
from antdist.serving.recommend import TOGETHER
from antdist.serving.use import FoundModel, catalogue_for

if TYPE_CHECKING:
    import pyarrow as pa

    from antdist.data.domain import Domain
    from antdist.data.shards import UserBlock
    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender

RANGE_ITEMS = 65536  # items embedded by one task, to the next end of a shard: 64 MiB of vectors
PARTS, PART_BLOCKS = 64, 64  # parts that a small domain is cut into, and blocks of a large domain's parts


@dataclass(frozen=True)
class Part:
    """Blocks `first` to `last - 1` of a sequence shard, by `histories`."""

    number: int
    shard: int
    first: int
    last: int
    users: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Task:
    """What every worker is told. `domain` and `out` are absolute."""

    domain: str
    out: str
    n: int
    include_seen: bool
    batch_size: int
    device: str
    threads: int | None


@dataclass(frozen=True, repr=False)
class ScoreReport(Report):
    """What `score` did. `rows` counts (user, item) pairs; `fresh_users` those that this run scored, in `seconds`."""

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
        """Users a second, the embedding of the catalogue apart; None if all were scored before."""
        return self.fresh_users / self.seconds if self.fresh_users and self.seconds > 0 else None

    def lines(self) -> list[str]:
        told = f"{self.rows:,} items for {self.users:,} users in {self.parts:,} files in {self.out}"
        if self.fresh_parts < self.parts:
            told += f", {self.parts - self.fresh_parts:,} of them finished before"
        if self.rate is None:
            return [told]
        workers = f"{self.workers or 'no'} worker{'' if self.workers == 1 else 's'}"
        catalogue = f"the catalogue embedded in {self.embedding_seconds:.1f} s"
        return [told, f"{self.rate:,.0f} users/s, {self.seconds:.1f} s, {workers}; {catalogue}"]

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
    batch_size: int = TOGETHER,
    device: str = "auto",
    threads: int | None = None,
) -> ScoreReport:
    """Write the n items of highest cosine for every user of the domain, those included who wait for a third interaction: all
    histories whole, all items of its catalogue, those included that no training saw.

    Args:
        found: the model (`antdist.serving.use.find_model`).
        out: a folder, which the nodes of a cluster share, or a URI that fsspec knows.
        include_seen: rank what a user has had, too.
        workers: Ray actors; 0: in this process, without Ray.
        batch_size: histories encoded and scored together.
        device: `auto`, `cpu` or `cuda`.
        threads: CPU threads a worker; None: its share of the cores.

    Raises:
        UserError: features missing or of other encoders, ANT_t on another catalogue, a damaged shard, a model whose vectors
            are not finite; `out` holds something else, or cannot be written.
    """
    assert n > 0 and batch_size > 0
    catalogue_for(found.card, domain)  # before anything is written
    place = out if "://" in out else str(Path(out).resolve())
    output, inputs = Output(place), _inputs(found, domain, n, include_seen)
    output.claim(inputs)
    parts, finished = domain_parts(domain), output.finished()
    missing = [part for part in parts if part.number not in finished]
    embedded, start = 0.0, time.monotonic()
    if missing:
        output.remove(SUMMARY)
        task = Task(domain.address, place, n, include_seen, batch_size, device, threads)
        with _here(found, task, missing) if workers == 0 else _with_ray(found, task, missing, workers) as notes:
            embedded, start = time.monotonic() - start, time.monotonic()
            users = sum(part.users for part in missing)
            for note in track(notes, "users scored", users, size=lambda note: int(note["users"])):
                finished[note["number"]] = note
    report = _finish(output, found, domain, inputs, [finished[part.number] for part in parts])
    return ScoreReport(
        out=redact(out),
        users=report["users"],
        rows=report["rows"],
        parts=len(parts),
        fresh_parts=len(missing),
        fresh_users=sum(part.users for part in missing),
        embedding_seconds=embedded,
        seconds=time.monotonic() - start,
        workers=workers,
    )


def _inputs(found: FoundModel, domain: Domain, n: int, include_seen: bool) -> dict[str, str]:
    """What decides what is written, in digests."""
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


def domain_parts(domain: Domain) -> list[Part]:
    """How its users are cut: by whole blocks, into some 64 parts, of a large domain into parts of 64 blocks."""
    manifest, waiting = domain.manifest, domain.pending
    blocks = max(1, min(PART_BLOCKS, manifest.blocks // PARTS))
    parts: list[Part] = []
    for number, shard in enumerate([*manifest.sequence_shards, *([waiting] if waiting else [])]):
        for first in range(0, len(shard.blocks), blocks):
            mine = shard.blocks[first : first + blocks]
            users = sum(block.users for block in mine)
            parts.append(Part(len(parts), number, first, first + len(mine), users))
    return parts


def _finish(
    output: Output, found: FoundModel, domain: Domain, inputs: dict[str, str], notes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Write the summary, once all parts can be seen from here.

    Raises:
        UserError: they cannot: the nodes do not share the folder.
    """
    if lost := output.lost(notes):
        raise UserError(
            f"{lost[0]}, which a worker wrote, is not there",
            where=output.place,
            remedy="name a folder that all nodes of the cluster share, or a URI",
        )
    output.sweep()
    summary = {
        "model": redact(found.uri),
        "domain": domain.name,
        "inputs": inputs,
        "users": sum(note["users"] for note in notes),
        "rows": sum(note["rows"] for note in notes),
        "files": [{key: note[key] for key in ("name", "users", "rows", "bytes", "sha256")} for note in notes],
    }
    output.write_json(SUMMARY, summary)
    return summary


# ----------------------------------------------------------------------------------------------------- the catalogue


def item_ranges(domain: Domain) -> list[tuple[int, int]]:
    """Runs of item shards, [first, last), of `RANGE_ITEMS` items or little more."""
    ranges, first, items = [], 0, 0
    shards = domain.manifest.item_shards
    for number, shard in enumerate(shards):
        items += shard.items
        if items >= RANGE_ITEMS or number == len(shards) - 1:
            ranges.append((first, number + 1))
            first, items = number + 1, 0
    return ranges


def embed_range(
    model: Recommender, card: ModelCard, domain: Domain, shards: tuple[int, int], device: str
) -> tuple[NDArray[np.float32], pa.LargeStringArray]:
    """Embeddings (n, d) and ids of the items of a run of shards."""
    import pyarrow as pa

    from antdist.evaluation.ranking import embed_catalogue

    mine = domain.manifest.item_shards[slice(*shards)]
    ids = [record.item_id for shard in mine for record in domain.items(shard)]
    numbers = np.arange(mine[0].first, mine[0].first + len(ids))
    vectors = embed_catalogue(model.to(device), catalogue_for(card, domain), numbers)
    return vectors.float().cpu().numpy(), pa.array(ids, pa.large_string())


def pick_device(device: str) -> str:
    """Raises UserError: there is no GPU here."""
    import torch

    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("there is no GPU", where="--device cuda", remedy="use --device auto or cpu")
    return "cuda" if there and device != "cpu" else "cpu"


# --------------------------------------------------------------------------------------------------------- the users


class Scorer:
    """Scores parts: a model, the embedded catalogue in ranges of rows, and the items' ids.

    Raises:
        UserError: see `score`.
    """

    def __init__(
        self, task: Task, model: Recommender, ranges: Sequence[NDArray[np.float32]], item_ids: pa.LargeStringArray
    ) -> None:
        import torch

        from antdist.data.domain import open_domain

        if task.threads is not None:
            torch.set_num_threads(task.threads)
        self.task, self.item_ids = task, item_ids
        self.domain, self.output = open_domain(task.domain), Output(task.out)
        self.device = pick_device(task.device)
        self.model = model.to(self.device)
        self.ranges = [_shared_tensor(vectors) for vectors in ranges]
        self.bounds = ragged.offsets([len(vectors) for vectors in ranges])
        if self.device != "cpu":
            free, _ = torch.cuda.mem_get_info()
            if sum(vectors.nbytes for vectors in ranges) < free / 2:  # else they go there a range at a time
                self.ranges = [vectors.to(self.device) for vectors in self.ranges]

    def score(self, part: Part) -> dict[str, Any]:
        """Read the part's users, score them, write the file and then its note, which is returned."""
        import pyarrow.parquet as pq

        from antdist import faults

        users = rows = 0
        blocks = islice(histories(self.domain, part.shard), part.first, part.last)
        with self.output.writing(part.name) as (path, facts):
            with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
                for user_ids, block in blocks:
                    table = self.table(user_ids, block)
                    writer.write_table(table)
                    users, rows = users + len(user_ids), rows + len(table["items"].combine_chunks().values)
            faults.at("score", step=part.number)
        note = {**facts, "number": part.number, "users": users, "rows": rows}
        self.output.write_json(f"_parts/{part.number:05d}.json", note)
        return note

    def table(self, user_ids: list[str], block: UserBlock) -> pa.Table:
        """A row a user."""
        import pyarrow as pa

        indices, scores = self.best(block)
        there = indices >= 0
        offsets = pa.array(ragged.offsets(there.sum(1)), pa.int32())
        items = self.item_ids.take(pa.array(indices[there])).cast(pa.string())
        columns = [
            pa.array(user_ids, pa.string()),
            pa.ListArray.from_arrays(offsets, items),
            pa.ListArray.from_arrays(offsets, pa.array(scores[there])),
        ]
        return pa.Table.from_arrays(columns, schema=schema())

    def best(self, block: UserBlock) -> tuple[IntArray, NDArray[np.float32]]:
        """Items and scores of a block's users, (U, n or all), -1 where there are no more."""
        from antdist.evaluation.ranking import encode_histories
        from antdist.model.ops.scores import unit_or_fail
        from antdist.serving.top import top_items

        starts, ends, known = block.offsets[:-1], block.offsets[1:], block.items.astype(np.int64)
        width = min(self.task.n, len(self.item_ids))
        indices = np.full((len(ends), width), -1, np.int64)
        scores = np.full((len(ends), width), -np.inf, np.float32)
        by_length = np.argsort(ends - starts, kind="stable")  # attention costs as much as the longest of a batch
        for first in range(0, len(ends), self.task.batch_size):
            users = by_length[first : first + self.task.batch_size]
            recent = np.maximum(starts[users], ends[users] - self.model.config.max_length)
            items, offsets = ragged.slices(known, recent, ends[users])
            distinct, tokens = np.unique(items, return_inverse=True)
            vectors = unit_or_fail(encode_histories(self.model, self._rows(distinct), tokens, offsets), "user vectors")
            seen = None
            if not self.task.include_seen:
                whole, bounds = ragged.slices(known, starts[users], ends[users])
                seen = np.repeat(np.arange(len(users)), np.diff(bounds)), whole
            ranges = (vectors.to(self.device) for vectors in self.ranges)
            indices[users], scores[users] = top_items(vectors, ranges, width, seen)
        return indices, scores

    def _rows(self, items: IntArray) -> Any:
        """The embeddings (m, d) of some items, by rising index."""
        import torch

        cuts = np.searchsorted(items, self.bounds)
        found = [
            vectors[torch.from_numpy(items[cuts[k] : cuts[k + 1]] - self.bounds[k]).to(vectors.device)]
            for k, vectors in enumerate(self.ranges)
            if cuts[k + 1] > cuts[k]
        ]
        return torch.cat(found).to(self.device)


def schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([("user_id", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])


def histories(domain: Domain, shard: int) -> Iterator[tuple[list[str], UserBlock]]:
    """Ids and whole histories of a shard's users, a block at a time; after the last shard come the users who wait for a
    third interaction."""
    if shard == len(domain.manifest.sequence_shards):
        return domain.pending_histories()
    return ((ids, block) for _, ids, block in domain.blocks_with_ids(shard))


def _shared_tensor(vectors: NDArray[np.float32]) -> Any:
    """A tensor on memory that Ray shares read-only; nobody writes to it."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(vectors)


# ------------------------------------------------------------------------------------------------------ who does it


@contextlib.contextmanager
def _here(found: FoundModel, task: Task, parts: Sequence[Part]) -> Iterator[Iterator[dict[str, Any]]]:
    """The notes of the parts, scored in this process; the catalogue is embedded when the block begins."""
    import pyarrow as pa

    from antdist.data.domain import open_domain

    domain, device = open_domain(task.domain), pick_device(task.device)
    shards = item_ranges(domain)
    embedded = [
        embed_range(found.model, found.card, domain, run, device)
        for run in track(shards, "ranges of items embedded", len(shards))
    ]
    item_ids = pa.concat_arrays([ids for _, ids in embedded])
    scorer = Scorer(task, found.model, [vectors for vectors, _ in embedded], item_ids)
    yield (scorer.score(part) for part in parts)


class Worker:
    """A `Scorer` as Ray Data calls it: a row in, a row out; a user's mistake comes back as a row."""

    def __init__(self, task: Task, shared: Sequence[Any]) -> None:
        import ray

        model, item_ids, *ranges = ray.get(list(shared))
        self.scorer = Scorer(task, model, ranges, item_ids)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            note = self.scorer.score(Part(**json.loads(row["part"])))
            return {"note": json.dumps(note), "error": ""}
        except UserError as error:
            return {"note": "", "error": json.dumps([error.what, error.where, error.remedy])}
        except OSError as error:
            told = [f"cannot be written ({error.strerror or error})", self.scorer.task.out, None]
            return {"note": "", "error": json.dumps(told)}


@contextlib.contextmanager
def _with_ray(found: FoundModel, task: Task, parts: Sequence[Part], workers: int) -> Iterator[Iterator[dict[str, Any]]]:
    """As `_here`, on the Ray that runs, or on a local one that is started here and stopped at the end."""
    workers = min(workers, len(parts))
    with ray_data_session(workers, task.threads) as share:
        import ray

        task = replace(task, threads=share)
        gpus = ray.cluster_resources().get("GPU", 0) if task.device != "cpu" else 0
        resources = {"num_cpus": share, "num_gpus": min(1.0, gpus / workers) if gpus else None}
        shared = _embed_with_ray(found, task, resources)
        rows = [{"part": json.dumps(asdict(part))} for part in parts]
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,
            fn_constructor_args=(task, shared),
            compute=ray.data.ActorPoolStrategy(size=workers),
            **resources,
        )
        yield map(_note, scored.iter_rows())


def _note(row: dict[str, Any]) -> dict[str, Any]:
    if row["error"]:
        what, where, remedy = json.loads(row["error"])
        raise UserError(what, where=where, remedy=remedy)
    note: dict[str, Any] = json.loads(row["note"])
    return note


def _embed_with_ray(found: FoundModel, task: Task, resources: dict[str, Any]) -> list[Any]:
    """References to the model, the items' ids and the ranges of vectors, in Ray's object store."""
    import pyarrow as pa
    import ray
    from ray.exceptions import RayTaskError

    from antdist.data.domain import open_domain

    def embed(model: Recommender, shards: tuple[int, int]) -> tuple[NDArray[np.float32], pa.LargeStringArray]:
        import torch

        from antdist.data.domain import open_domain

        torch.set_num_threads(task.threads or 1)
        return embed_range(model, found.card, open_domain(task.domain), shards, pick_device(task.device))

    model, remote = ray.put(found.model), ray.remote(embed).options(num_returns=2, **resources)
    ranges = [remote.remote(model, shards) for shards in item_ranges(open_domain(task.domain))]
    try:
        ids = [ray.get(item_ids) for _, item_ids in track(ranges, "ranges of items embedded", len(ranges))]
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, UserError) else error) from None
    return [model, ray.put(pa.concat_arrays(ids)), *(vectors for vectors, _ in ranges)]
