"""Does `sequence` mode cost quality against `prefix`? Both from scratch on real data, a seed a repeat.

    python -m benchmarks quality --data DATA/scientific --repeats 3 --set model.modalities='[text]' --picture curves.svg

Full-catalogue loss, best epoch by validation Recall@10, one test; the metric of each user is averaged over seeds and the
modes are compared by a paired t-test over users. The curves show the best validation Recall@10 so far against wall time,
training and validation included. The two modes of a seed run one after the other.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from antdist.config.load import load_config
from antdist.config.schema import RelearnConfig
from antdist.data.domain import Domain, open_domain
from antdist.errors import UserError
from antdist.evaluation.metrics import per_user, summary
from antdist.evaluation.ranking import Ranks, embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.evaluation.significance import compare
from antdist.features.catalogue import Catalogue, open_optional_table
from antdist.model.recommender import Recommender
from antdist.training.adaptation import adapt
from antdist.training.progress import SELECTION_METRIC
from benchmarks.report import Line, Options, Report
from benchmarks.trainers import train_to_best
from benchmarks.worlds import RandomFeatures, Shape, write_world

MODES = ("prefix", "sequence")
TESTED = ("Recall@10", "NDCG@10")


@dataclass(frozen=True)
class Fit:
    """One training run: its curve (seconds, best validation Recall@10 so far), and its test ranks."""

    curve: list[tuple[float, float]]
    test: Ranks


def run(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        if options.short:
            domain = write_world(Path(folder), Shape(60, 50, 7.0))
            catalogue: Any = RandomFeatures(50, {"text": 16})
            settings = ["training.epochs=2", "model.dim=16", "stream.batch_size=64", *options.settings]
        elif options.data is None:
            raise UserError(
                "quality is measured on real data",
                where="--data",
                remedy="name a prepared and featurized domain: --data DATA/NAME",
            )
        else:
            domain, settings = open_domain(options.data), list(options.settings)
            modalities = load_config(RelearnConfig, None, settings).model.modalities
            tables = {m: open_optional_table(domain, m) for m in modalities}
            catalogue = Catalogue([domain], [m for m, table in tables.items() if table and table.meta.present])
        configs = {
            mode: load_config(RelearnConfig, None, ["training.engine=plain", *settings, f"stream.mode={mode}"])
            for mode in MODES
        }
        fits: dict[str, list[Fit]] = {mode: [] for mode in MODES}
        for seed in range(options.repeats):
            for mode in MODES:
                fits[mode].append(fit(configs[mode], domain, catalogue, seed, Path(folder) / f"{mode}-{seed}"))
    if options.picture is not None:
        draw(fits, domain.name, options.picture)
    lines, notes = compare_modes(fits)
    return Report(
        "quality",
        f"sequence against prefix mode on {domain.name} ({', '.join(catalogue.dims)}), from scratch, seeds 0 to "
        f"{options.repeats - 1}; {' '.join(settings) or 'default configuration'}",
        lines,
        notes,
    )


def fit(config: RelearnConfig, domain: Domain, catalogue: Any, seed: int, folder: Path) -> Fit:
    """Train from scratch and test the best epoch."""
    means = catalogue.means() if config.model.initial_shift == "mean" else None
    model = adapt("scratch", config.model, catalogue.dims, parent=None, means=means, seed=seed)
    sequences, longest = domain.sequences(), config.model.max_length
    queries = validation_queries(sequences, longest)
    start, curve = time.perf_counter(), list[tuple[float, float]]()

    def validate() -> dict[str, float]:
        found = summary(rank_queries(model, catalogue, queries))
        best = max([found[SELECTION_METRIC], *(value for _, value in curve)])
        curve.append((time.perf_counter() - start, best))
        return found

    train_to_best(
        model,
        domain,
        catalogue,
        loss=config.loss,
        stream=config.stream,
        training=config.training,
        seed=seed,
        folder=folder,
        evaluate=validate,
    )
    return Fit(curve, rank_queries(model, catalogue, test_queries(sequences, longest)))


def rank_queries(model: Recommender, catalogue: Any, queries: Any) -> Ranks:
    return rank_targets(model, embed_catalogue(model, catalogue), queries)


def compare_modes(fits: dict[str, list[Fit]]) -> tuple[list[Line], list[str]]:
    """Make a line for each figure of each mode, and notes with the results of the t-tests."""
    lines, notes = [], []
    for mode, runs in fits.items():
        for metric in TESTED:
            lines.append(Line(f"{mode}: test {metric}", [float(per_user(f.test, metric).mean()) for f in runs], ""))
        lines.append(Line(f"{mode}: best validation {SELECTION_METRIC}", [f.curve[-1][1] for f in runs], ""))
        lines.append(Line(f"{mode}: all epochs", [f.curve[-1][0] for f in runs], "s"))
    slowest = min(f.curve[-1][1] for f in fits["prefix"])
    for mode, runs in fits.items():
        reached = [next((s for s, value in f.curve if value >= 0.99 * slowest), f.curve[-1][0]) for f in runs]
        lines.append(Line(f"{mode}: to 99 % of prefix's lowest best validation", reached, "s"))
    for metric in TESTED:
        metrics = [np.stack([per_user(f.test, metric) for f in fits[mode]]) for mode in ("sequence", "prefix")]
        found = compare(*metrics)
        worse = "worse" if found.difference < 0 else "better"
        verdict = f"significantly {worse}" if found.significant else "no significant difference"
        notes.append(
            f"{metric}: sequence - prefix = {found.difference:+.4f}, p = {found.p_value:.3f} over {found.users} users, "
            f"{found.seeds} seeds: {verdict}"
        )
    return lines, notes


def draw(fits: dict[str, list[Fit]], domain: str, path: Path) -> None:
    """Draw both modes' curves against wall time, a thin line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for mode, colour in zip(MODES, ("tab:orange", "tab:blue"), strict=True):
        for number, one in enumerate(fits[mode]):
            seconds, values = zip(*one.curve, strict=True)
            axes.plot(seconds, values, color=colour, linewidth=1.2, label=None if number else mode)
    axes.set(
        xlabel="seconds, training and validation", ylabel=f"best validation {SELECTION_METRIC} so far", title=domain
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
