"""The latest 1 % of the interactions appended to a domain, against preparing all from scratch.

Each measurement runs in a process of its own; memory is its peak resident memory, imports included.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from antdist.training.memory import peak_bytes
from benchmarks.prepare import write_source
from benchmarks.processes import run_in_fresh_process
from benchmarks.report import Line, Options, Report, ratio

SHARE = 0.01  # of the interactions, the latest


def split_source(folder: Path, interactions: int) -> None:
    """Write `early.csv` and `late.csv`, both with the header."""
    first = interactions - int(SHARE * interactions)
    with (folder / "interactions.csv").open() as rows:
        header = next(rows)
        with (folder / "early.csv").open("w") as early, (folder / "late.csv").open("w") as late:
            early.write(header)
            late.write(header)
            for number, row in enumerate(rows):
                (early if number < first else late).write(row)


def prepare_from(folder: Path, interactions: str, out: str, threads: int) -> tuple[float, float]:
    """Prepare a domain. Returns seconds, and peak memory in GiB."""
    start = time.perf_counter()
    import pyarrow

    from antdist.data.ingest.prepare import prepare_domain

    pyarrow.set_cpu_count(threads)
    source, items = folder / interactions, folder / "items.csv"
    prepare_domain(interactions=source, items=items, domain="generated", out=folder / out, overwrite=True)
    return time.perf_counter() - start, peak_bytes() / 2**30


def append_late(folder: Path, threads: int) -> tuple[float, float, int]:
    """Append the late interactions. Returns seconds, peak memory in GiB, and users that grew."""
    start = time.perf_counter()
    import pyarrow

    from antdist.data.ingest.append import append_to_domain

    pyarrow.set_cpu_count(threads)
    report = append_to_domain(interactions=folder / "late.csv", domain="generated", out=folder / "grown")
    return time.perf_counter() - start, peak_bytes() / 2**30, report.updated_users


def run(options: Options) -> Report:
    interactions, users, items = (20_000, 2_000, 400) if options.short else (10_000_000, 1_000_000, 200_000)
    anew, appended, grown = [], [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_in_fresh_process(write_source, folder, interactions, users, items)
        split_source(folder, interactions)
        run_in_fresh_process(prepare_from, folder, "early.csv", "early", options.threads)
        for _ in range(options.repeats):
            shutil.rmtree(folder / "grown", ignore_errors=True)
            shutil.copytree(folder / "early", folder / "grown")
            *figures, grown = run_in_fresh_process(append_late, folder, options.threads)
            appended.append(figures)
            anew.append(run_in_fresh_process(prepare_from, folder, "interactions.csv", "anew", options.threads))
    seconds = {"prepare": [s for s, _ in anew], "prepare --append": [s for s, _ in appended]}
    memory = {"prepare": [peak for _, peak in anew], "prepare --append": [peak for _, peak in appended]}
    return Report(
        "append",
        f"{interactions:,} interactions of {users:,} users and {items:,} items in plain CSV, tabular: the last "
        f"{int(SHARE * interactions):,} of them, of {grown:,} known users, appended to a domain of the rest, against "
        "preparing all anew",
        [
            *(Line(f"{name}: time", values, "s") for name, values in seconds.items()),
            *(Line(f"{name}: peak memory", values, "GiB") for name, values in memory.items()),
            ratio(
                "append is faster", [1 / s for s in seconds["prepare --append"]], [1 / s for s in seconds["prepare"]]
            ),
            ratio("append's memory, of preparing's", memory["prepare --append"], memory["prepare"]),
        ],
        ["the files are in the page cache; append checks the digest of all old sequence shards"],
    )
