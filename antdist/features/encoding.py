"""Encode item shards in this process, or on Ray Data actors that load each encoder once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from antdist.data.domain import open_domain
from antdist.distributed.local_ray import ray_data_session
from antdist.errors import UserError
from antdist.features.encoders.base import Encoded, Encoder, LoadedEncoder
from antdist.features.table import write_part
from antdist.features.tasks import PartRecord, Records, ShardTask, TableRequest
from antdist.io.files import write_json
from antdist.io.progress import track

if TYPE_CHECKING:
    from antdist.data.shards import ItemRecord

CHUNK = 512  # items whose images are in memory together


def encode_shards(
    tasks: list[ShardTask], encoders: dict[str, Encoder], workers: int, threads: int | None, device: str
) -> Records:
    """Encode the shards and write their parts; return the parts' records.

    Args:
        encoders: by modality.
        workers: Ray actors; 0: this process, without Ray.
        threads: CPU threads a worker; None: its share of the cores.
        device: `auto`, `cpu` or `cuda`; actors claim GPUs unless it is `cpu`.

    Raises:
        UserError: a shard is damaged, an encoder cannot be loaded, or a feature is NaN or Inf.
    """
    if not tasks:
        return {}
    if workers == 0:
        worker = EncodingWorker(encoders, threads)
        results: Iterator[list[PartRecord]] = (worker.encode(task) for task in tasks)
    else:
        results = _encode_with_ray(tasks, encoders, workers, threads, device)
    fresh: Records = {}
    for records in track(results, "item shards encoded", len(tasks)):
        fresh |= {record.key: record for record in records}
    return fresh


class EncodingWorker:
    """Encodes shards; loads each encoder at its first use and keeps it."""

    def __init__(self, encoders: dict[str, Encoder], threads: int | None = None) -> None:
        self.encoders = encoders
        self.loaded: dict[str, LoadedEncoder] = {}
        if threads is not None:
            import torch

            torch.set_num_threads(threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode a task that comes as a row of Ray Data; a UserError is returned as a row."""
        requests = [TableRequest(**request) for request in json.loads(row["requests"])]
        try:
            records = self.encode(ShardTask(row["domain"], int(row["shard"]), requests))
            return {"records": json.dumps([record.to_json() for record in records]), "error": ""}
        except UserError as error:
            return {"records": "[]", "error": json.dumps(error.to_dict())}

    def encode(self, task: ShardTask) -> list[PartRecord]:
        """Read the shard once, encode it for each request, and write the parts."""
        domain = open_domain(task.domain)
        shard = domain.manifest.item_shards[task.shard]
        for request in task.requests:
            if request.modality not in self.loaded:
                self.loaded[request.modality] = self.encoders[request.modality].load()
        chunks: dict[str, list[Encoded]] = {request.modality: [] for request in task.requests}
        seconds = dict.fromkeys(chunks, 0.0)
        records = domain.items(shard)
        while items := list(islice(records, CHUNK)):
            for request in task.requests:
                start = time.monotonic()
                encoded = self.loaded[request.modality](items)
                _check_finite(encoded, items, domain.name, request)
                chunks[request.modality].append(encoded)
                seconds[request.modality] += time.monotonic() - start
        return [
            _write_record(task.shard, shard.first, request, chunks[request.modality], seconds[request.modality])
            for request in task.requests
        ]


def _write_record(shard: int, first: int, request: TableRequest, chunks: list[Encoded], seconds: float) -> PartRecord:
    """Write the part of a shard, then its record."""
    present = np.concatenate([chunk.present for chunk in chunks])
    values = np.concatenate([chunk.values for chunk in chunks]).astype(request.dtype)
    values[~present] = 0
    part = write_part(request.folder, request.modality, shard, first=first, values=values, present=present)
    images = sum(chunk.images for chunk in chunks)
    faults = [list(fault) for chunk in chunks for fault in chunk.faults]
    record = PartRecord(request, shard, part, values.shape[1], images, faults, seconds)
    write_json(request.record_path(shard), record.document())
    return record


def _check_finite(encoded: Encoded, items: Sequence[ItemRecord], domain: str, request: TableRequest) -> None:
    """Refuse features that are NaN or Inf in the type in which they are stored."""
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = encoded.values.astype(request.dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(1) & encoded.present)
    if not len(bad):
        return
    what, remedy = "NaN or Inf", "use another encoder, or --device cpu, which computes in float32"
    if np.isfinite(encoded.values[bad[0]]).all():
        what, remedy = f"too large for {request.dtype}", "use --dtype float32"
    raise UserError(
        f"the {request.modality} features of item {items[bad[0]].item_id} are {what}",
        where=f"domain {domain}, encoder {request.encoder['name']}",
        remedy=remedy,
    )


def _encode_with_ray(
    tasks: list[ShardTask], encoders: dict[str, Encoder], workers: int, threads: int | None, device: str
) -> Iterator[list[PartRecord]]:
    """Encode through Ray Data, on a running Ray or on a local one that is stopped at the end."""
    workers = min(workers, len(tasks))
    rows = [
        {"domain": task.domain, "shard": task.shard, "requests": json.dumps([asdict(r) for r in task.requests])}
        for task in tasks
    ]
    with ray_data_session(workers, threads) as share:
        import ray

        gpus = ray.cluster_resources().get("GPU", 0) if device != "cpu" else 0
        encoded = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            EncodingWorker,
            fn_constructor_args=(encoders, share),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=share,
            num_gpus=min(1.0, gpus / workers) if gpus else None,
        )
        for row in encoded.iter_rows():
            if row["error"]:
                raise UserError.from_dict(json.loads(row["error"]))
            yield [PartRecord.from_json(record) for record in json.loads(row["records"])]
