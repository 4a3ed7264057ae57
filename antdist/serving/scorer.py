"""A worker of `antdist score`: embed the catalogue in ranges, then score parts of the users."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from antdist import faults, ragged
from antdist.batch import IntArray
from antdist.data.domain import Domain, open_domain
from antdist.data.shards import UserBlock
from antdist.errors import UserError
from antdist.serving.apply import open_catalogue
from antdist.serving.score_folder import ScoreFolder

if TYPE_CHECKING:
    import pyarrow as pa

    from antdist.model.io import ModelCard
    from antdist.model.recommender import Recommender

RANGE_ITEMS = 65536  # items embedded by one task, up to the next end of a shard: 64 MiB of vectors


@dataclass(frozen=True)
class UserPart:
    """Blocks `first` to `last - 1` of a sequence shard, by `iterate_histories`."""

    number: int
    shard: int
    first: int
    last: int
    users: int

    @property
    def name(self) -> str:
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class ScoreTask:
    """The settings of every worker. `domain` and `out` are absolute."""

    domain: str
    out: str
    n: int
    include_seen: bool
    batch_size: int
    device: str
    threads: int | None


def item_ranges(domain: Domain) -> list[tuple[int, int]]:
    """Return runs of item shards, [first, last), of `RANGE_ITEMS` items or little more."""
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
    """Embed the items of a run of shards. Returns vectors (n, d) and ids."""
    import pyarrow as pa

    from antdist.evaluation.ranking import embed_catalogue

    mine = domain.manifest.item_shards[slice(*shards)]
    ids = [record.item_id for shard in mine for record in domain.items(shard)]
    numbers = np.arange(mine[0].first, mine[0].first + len(ids))
    vectors = embed_catalogue(model.to(device), open_catalogue(card, domain), numbers)
    return vectors.float().cpu().numpy(), pa.array(ids, pa.large_string())


def resolve_device(device: str) -> str:
    """Resolve `auto` to `cuda` or `cpu`. Raises UserError for `cuda` without a GPU."""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("there is no GPU", where="--device cuda", remedy="use --device auto or cpu")
    return "cuda" if available and device != "cpu" else "cpu"


def output_schema() -> pa.Schema:
    """Return the columns of a part: user_id, items, scores."""
    import pyarrow as pa

    return pa.schema([("user_id", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])


def iterate_histories(domain: Domain, shard: int) -> Iterator[tuple[list[str], UserBlock]]:
    """Iterate over ids and complete histories of a shard's users, a block at a time.

    The number after the last shard stands for the pending users, who have fewer than three interactions.
    """
    if shard == len(domain.manifest.sequence_shards):
        return domain.pending_histories()
    return ((ids, block) for _, ids, block in domain.blocks_with_ids(shard))


class Scorer:
    """Scores parts: a model, the embedded catalogue in ranges of rows, and the items' ids.

    Raises:
        UserError: see `antdist.serving.score.score`.
    """

    def __init__(
        self, task: ScoreTask, model: Recommender, ranges: Sequence[NDArray[np.float32]], item_ids: pa.LargeStringArray
    ) -> None:
        import torch

        if task.threads is not None:
            torch.set_num_threads(task.threads)
        self.task, self.item_ids = task, item_ids
        self.domain, self.folder = open_domain(task.domain), ScoreFolder(task.out)
        self.device = resolve_device(task.device)
        self.model = model.to(self.device)
        self.ranges = [_shared_tensor(vectors) for vectors in ranges]
        self.bounds = ragged.offsets([len(vectors) for vectors in ranges])
        if self.device != "cpu":
            free, _ = torch.cuda.mem_get_info()
            if sum(vectors.nbytes for vectors in ranges) < free / 2:  # else a range at a time is copied there
                self.ranges = [vectors.to(self.device) for vectors in self.ranges]

    def score(self, part: UserPart) -> dict[str, Any]:
        """Read the part's users, score them, write the file and then its note, which is returned."""
        import pyarrow.parquet as pq

        users = rows = 0
        blocks = islice(iterate_histories(self.domain, part.shard), part.first, part.last)
        with self.folder.writing(part.name) as (path, facts):
            with pq.ParquetWriter(path, output_schema(), compression="zstd") as writer:
                for user_ids, block in blocks:
                    table = self._make_table(user_ids, block)
                    writer.write_table(table)
                    users, rows = users + len(user_ids), rows + len(table["items"].combine_chunks().values)
            faults.inject("score", step=part.number)
        note = {**facts, "number": part.number, "users": users, "rows": rows}
        self.folder.write_json(f"_parts/{part.number:05d}.json", note)
        return note

    def _make_table(self, user_ids: list[str], block: UserBlock) -> pa.Table:
        """Make a table of one row a user."""
        import pyarrow as pa

        indices, scores = self._rank(block)
        is_item = indices >= 0
        offsets = pa.array(ragged.offsets(is_item.sum(1)), pa.int32())
        items = self.item_ids.take(pa.array(indices[is_item])).cast(pa.string())
        columns = [
            pa.array(user_ids, pa.string()),
            pa.ListArray.from_arrays(offsets, items),
            pa.ListArray.from_arrays(offsets, pa.array(scores[is_item])),
        ]
        return pa.Table.from_arrays(columns, schema=output_schema())

    def _rank(self, block: UserBlock) -> tuple[IntArray, NDArray[np.float32]]:
        """Rank the items of a block's users: indices and scores, (U, n or all), -1 where there are no more."""
        from antdist.evaluation.ranking import encode_histories
        from antdist.model.ops.scores import unit_or_fail
        from antdist.serving.top_n import top_items

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
            vectors = unit_or_fail(
                encode_histories(self.model, self._gather(distinct), tokens, offsets), "user vectors"
            )
            seen = None
            if not self.task.include_seen:
                history, bounds = ragged.slices(known, starts[users], ends[users])
                seen = np.repeat(np.arange(len(users)), np.diff(bounds)), history
            ranges = (vectors.to(self.device) for vectors in self.ranges)
            indices[users], scores[users] = top_items(vectors, ranges, width, seen)
        return indices, scores

    def _gather(self, items: IntArray) -> Any:
        """Gather the embeddings (m, d) of items, given by rising index."""
        import torch

        cuts = np.searchsorted(items, self.bounds)
        found = [
            vectors[torch.from_numpy(items[cuts[k] : cuts[k + 1]] - self.bounds[k]).to(vectors.device)]
            for k, vectors in enumerate(self.ranges)
            if cuts[k + 1] > cuts[k]
        ]
        return torch.cat(found).to(self.device)


def _shared_tensor(vectors: NDArray[np.float32]) -> Any:
    """Make a tensor on memory that Ray shares read-only; nothing writes to it."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(vectors)
