"""Top 10 of every user: `antdist score` against the usual way, one user at a time.

Both use an untrained model of the default configuration (the cost does not depend on the weights), an embedded catalogue,
and the target's histories, or those of `--data`. Ours (one worker, without Ray) reads the users from their shards, scores
them and writes the Parquet files; the usual way has the histories in memory, calls `recommend` for some of the users, and
writes nothing.
"""

from __future__ import annotations

import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from antdist.config.schema import ModelConfig
from antdist.data.domain import open_domain
from antdist.model.recommender import build_recommender
from antdist.serving.score import cut_into_parts
from antdist.serving.scorer import Scorer, ScoreTask
from antdist.serving.top_n import HISTORY_BATCH, recommend
from benchmarks.report import Line, Options, Report, alternate, ratio
from benchmarks.worlds import TARGET, Shape, write_world

TOP = 10


def run(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        return _measure(options, Path(folder))


def _measure(options: Options, folder: Path) -> Report:
    if options.data is not None:
        domain = open_domain(options.data)
    else:
        domain = write_world(folder, Shape(300, 200, 7.0) if options.short else TARGET)
    sampled = min(20 if options.short else 500, domain.manifest.users)
    model = build_recommender(ModelConfig(modalities=["text"]), {"text": 768}).eval()
    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(domain.manifest.items, model.config.dim, generator=random)
    sequences, item_ids = domain.sequences(), domain.item_ids()
    users = np.linspace(0, domain.manifest.users - 1, sampled).astype(int)
    histories = [sequences.items[sequences.offsets[u] : sequences.offsets[u + 1]].tolist() for u in users]
    outs = (folder / f"out-{number}" for number in count())

    def score_all() -> float:
        out = next(outs)
        out.mkdir()
        task = ScoreTask(str(domain.folder), str(out), TOP, False, HISTORY_BATCH, "cpu", None)
        scorer = Scorer(task, model, [embeddings.numpy()], pa.array(item_ids, pa.large_string()))
        start = time.perf_counter()
        for part in cut_into_parts(domain):
            scorer.score(part)
        return domain.manifest.users / (time.perf_counter() - start)

    def one_at_a_time() -> float:
        start = time.perf_counter()
        for history in histories:
            recommend(model, embeddings, history, TOP)
        return sampled / (time.perf_counter() - start)

    score_all()
    written = dict(
        zip(*pq.read_table(folder / "out-0", columns=["user_id", "items"]).to_pydict().values(), strict=True)
    )
    ids = domain.user_ids()
    agrees = [
        written[ids[user]] == [item_ids[index] for index, _ in recommend(model, embeddings, history, TOP)]
        for user, history in zip(users, histories, strict=True)
    ]
    rates = alternate({"score": score_all, "one": one_at_a_time}, options.repeats)
    return Report(
        "score",
        f"top {TOP} of {domain.manifest.items:,} items for {domain.manifest.users:,} users of {domain.name}, one process; "
        f"one at a time: {sampled:,} of the users",
        [
            Line("antdist score, from shards to Parquet", rates["score"], "users/s"),
            Line("recommend, one user at a time", rates["one"], "users/s"),
            ratio("antdist score over one at a time", rates["score"], rates["one"]),
        ],
        [f"The same {TOP} items in the same order for {sum(agrees):,} of {sampled:,} users."],
    )
