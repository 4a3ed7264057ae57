"""Time and memory from a CSV file of interactions to a prepared domain, against pandas.

Each measurement runs in a process of its own; memory is its peak resident memory, imports included.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from antdist.training.memory import peak_bytes
from benchmarks.processes import run_in_fresh_process
from benchmarks.report import Line, Options, Report, ratio

K_CORE = 5


def write_source(folder: Path, interactions: int, users: int, items: int) -> None:
    """Write `interactions.csv` in order of time, with skewed users and items, and `items.csv`."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv

    random = np.random.default_rng(0)
    names: dict[str, list[str]] = {"user": [f"u{u}" for u in range(users)], "item": [f"i{i}" for i in range(items)]}
    user, item = (
        pa.DictionaryArray.from_arrays(
            pa.array((len(ids) * random.random(interactions) ** power).astype(np.int32)), pa.array(ids)
        ).dictionary_decode()
        for ids, power in ((names["user"], 1.2), (names["item"], 1.5))
    )
    times = pa.array(1_500_000_000 + np.arange(interactions))
    options = pa_csv.WriteOptions(quoting_style="none")
    table = pa.table({"user_id": user, "item_id": item, "timestamp": times})
    pa_csv.write_csv(table, folder / "interactions.csv", options)
    titles = pa.array([f"thing {i}" for i in range(items)])
    pa_csv.write_csv(pa.table({"item_id": names["item"], "title": titles}), folder / "items.csv", options)


def prepare_with_antdist(folder: Path, threads: int) -> tuple[float, float]:
    """Prepare the source. Returns seconds, and peak memory in GiB."""
    start = time.perf_counter()
    import pyarrow

    from antdist.data.ingest.prepare import prepare_domain

    pyarrow.set_cpu_count(threads)

    prepare_domain(folder, domain="generated", out=folder / "data", k_core=K_CORE, overwrite=True)
    return time.perf_counter() - start, peak_bytes() / 2**30


def prepare_with_pandas(folder: Path) -> tuple[float, float]:
    """Filter and sort likewise with pandas, to Parquet: without checks, digests or blocks."""
    start = time.perf_counter()
    import pandas

    table = pandas.read_csv(folder / "interactions.csv")
    items = pandas.read_csv(folder / "items.csv")
    while True:
        enough = table.groupby("user_id")["item_id"].transform("size") >= K_CORE
        enough &= table.groupby("item_id")["user_id"].transform("size") >= K_CORE
        if enough.all():
            break
        table = table[enough]
    table = table.sort_values(["user_id", "timestamp"], kind="stable")
    items = items[items["item_id"].isin(table["item_id"])]
    table["item"] = table["item_id"].map(dict(zip(items["item_id"], range(len(items)), strict=True)))
    table[["user_id", "item", "timestamp"]].to_parquet(folder / "usual-interactions.parquet")
    items.to_parquet(folder / "usual-items.parquet")
    return time.perf_counter() - start, peak_bytes() / 2**30


def run(options: Options) -> Report:
    interactions, users, items = (20_000, 2_000, 400) if options.short else (10_000_000, 1_000_000, 200_000)
    found: dict[str, list[tuple[float, float]]] = {"antdist": [], "pandas": []}
    with tempfile.TemporaryDirectory() as folder:
        run_in_fresh_process(write_source, Path(folder), interactions, users, items)
        for _ in range(options.repeats):
            found["antdist"].append(run_in_fresh_process(prepare_with_antdist, Path(folder), options.threads))
            found["pandas"].append(run_in_fresh_process(prepare_with_pandas, Path(folder)))
    rates = {name: [interactions / seconds for seconds, _ in values] for name, values in found.items()}
    memory = {name: [peak for _, peak in values] for name, values in found.items()}
    return Report(
        "prepare",
        f"{interactions:,} interactions of {users:,} users and {items:,} items in plain CSV, tabular, {K_CORE}-core: "
        "antdist prepare to shards and manifest, digests included, against pandas: read_csv, groupby until the core is "
        "left, sort_values, to_parquet",
        [
            *(Line(f"{name}: speed", values, "interactions/s") for name, values in rates.items()),
            *(Line(f"{name}: peak memory", values, "GiB") for name, values in memory.items()),
            ratio("antdist is faster", rates["antdist"], rates["pandas"]),
            ratio("antdist's memory, of pandas'", memory["antdist"], memory["pandas"]),
        ],
        ["the threads parse the CSV of interactions in antdist; all else on both sides is one thread"],
    )
