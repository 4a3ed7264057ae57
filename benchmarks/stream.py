"""Users a second of one process from shards in the page cache, shuffled.

`antdist.data.stream.stream.Stream` in both modes, against the usual webdataset pipeline over the same shards: each user is a
sample, shards and users are shuffled (a buffer of 10,000), batches are collated to ids and offsets. The stream in `sequence`
mode also reads from a URI whose shards are in the node's cache.
A window of the stream is a user's training items: in `sequence` mode once, in `prefix` mode each of its prefixes.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from antdist import ragged
from antdist.config.schema import StreamConfig
from antdist.data.cache import Cache
from antdist.data.domain import Domain, Sequences, open_domain
from antdist.data.shards import ItemRecord
from antdist.data.stream.stream import Stream
from antdist.data.writing import write_domain
from benchmarks.report import Line, Options, Report, alternate, ratio

LENGTH, SHARDS, BATCH, BUFFER = 8, 16, 2048, 10_000


def write_users(folder: Path, users: int, items: int) -> Domain:
    """Write a domain of users with eight random items each, in sixteen shards."""
    random = np.random.default_rng(0)
    blocks = -(-users // 1024)
    write_domain(
        folder / "users",
        "users",
        (ItemRecord(i, f"i{i}", None, None, []) for i in range(items)),
        Sequences(
            np.arange(users + 1, dtype=np.int64) * LENGTH,
            random.integers(0, items, users * LENGTH),
            np.arange(users * LENGTH, dtype=np.int64),
        ),
        [f"u{u}" for u in range(users)],
        {},
        blocks_per_shard=-(-blocks // SHARDS),
    )
    return open_domain(folder / "users")


def webdataset_pipeline(shards: list[str], users_a_batch: int) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Make a webdataset pipeline: blocks split into one sample a user, shuffled, batched."""
    import webdataset

    def explode(blocks: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
        for block in blocks:
            offsets, items = (np.load(io.BytesIO(block[f"{name}.npy"])) for name in ("offsets", "items"))
            for first, last in itertools.pairwise(offsets.tolist()):
                yield items[first : last - 2]

    def collate(samples: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        lengths = np.array([len(sample) for sample in samples])
        items = np.concatenate([sample[:-1] for sample in samples])
        targets = np.concatenate([sample[1:] for sample in samples])
        return items, targets, ragged.offsets(lengths - 1)

    return webdataset.DataPipeline(
        webdataset.SimpleShardList(shards, seed=0),
        webdataset.shuffle(len(shards)),
        webdataset.tarfile_to_samples(),
        explode,
        webdataset.shuffle(BUFFER),
        webdataset.batched(users_a_batch, collation_fn=collate),
    )


def run(options: Options) -> Report:
    users, items = (20_000, 500) if options.short else (1_000_000, 50_000)
    with tempfile.TemporaryDirectory() as folder:
        domain = write_users(Path(folder), users, items)
        cached = open_domain(f"file://{folder}/users", Cache(Path(folder) / "cache", 10**12))
        cached.sequences()  # fetches all
        shards = [str(domain.folder / shard.name) for shard in domain.manifest.sequence_shards]
        predictions = LENGTH - 3
        epochs = itertools.count()

        def ours(mode: str, domain: Domain = domain) -> float:
            config = StreamConfig.model_validate({"mode": mode, "batch_size": BATCH})
            stream, seen = Stream([domain], config, max_length=50, seed=0), 0
            for batch in stream.batches(next(epochs)):
                seen += batch.predictions
            assert seen == users * predictions
            return seen / predictions

        def theirs() -> float:
            return (
                sum(len(targets) for _, targets, _ in webdataset_pipeline(shards, BATCH // predictions)) / predictions
            )

        counted: dict[str, float] = {}

        def count(name: str, seen: float) -> None:
            counted[name] = seen

        seconds = alternate(
            {
                "sequence": lambda: count("sequence", ours("sequence")),
                "sequence from the cache": lambda: count("sequence from the cache", ours("sequence", cached)),
                "prefix": lambda: count("prefix", ours("prefix")),
                "webdataset": lambda: count("webdataset", theirs()),
            },
            options.repeats,
        )
    rates = {name: [counted[name] / found for found in values] for name, values in seconds.items()}
    return Report(
        "stream",
        f"{users:,} users of {LENGTH} items in {len(shards)} shards in the page cache, one process, one epoch a "
        f"repeat, shuffled, batches of about {BATCH} predictions: the stream in both modes, from a folder and from a URI whose "
        f"shards lie in the node's cache, against a webdataset pipeline that makes each user a sample (as in sequence mode), shuffles in a buffer of {BUFFER:,} and collates",
        [
            *(Line(name, found, "users/s") for name, found in rates.items()),
            ratio("sequence over webdataset", rates["sequence"], rates["webdataset"]),
            ratio("prefix over webdataset", rates["prefix"], rates["webdataset"]),
            ratio("from the cache over from the folder", rates["sequence from the cache"], rates["sequence"]),
        ],
        ["a user in prefix mode gives five windows"],
    )
