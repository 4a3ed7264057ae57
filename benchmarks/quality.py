"""Does `sequence` mode cost quality against `prefix`? Both trained from scratch on a real domain, a seed a repeat.

    python -m benchmarks quality --data DATA/scientific --repeats 3 --set model.modalities='[text]' --picture curves.svg

Full-catalogue loss, best epoch by validation Recall@10, one test; the metric of each user is averaged over seeds and the
modes are compared by a paired t-test over users. Curves against wall time: the best validation Recall@10 so far, training
and validation included. The two modes of a seed run one after the other.
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
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World
from antdist.errors import UserError
from antdist.evaluation.metrics import per_user, summary
from antdist.evaluation.ranking import Ranks, embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.evaluation.significance import compare
from antdist.features.catalogue import Catalogue, open_optional_table
from antdist.model.recommender import Recommender
from antdist.training.adaptation import adapt
from antdist.training.checkpoints.local import best_weights
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed
from antdist.training.progress import SELECTION_METRIC
from antdist.training.trainer import Trainer
from benchmarks.report import Line, Options, Report
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
                "quality is measured on real data", remedy="name a prepared and featurized domain: --data DATA/NAME"
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
    lines, notes = compared(fits)
    return Report(
        "quality",
        f"sequence against prefix mode on {domain.name} ({', '.join(catalogue.dims)}), from scratch, seeds 0 to "
        f"{options.repeats - 1}; {' '.join(settings) or 'default configuration'}",
        lines,
        notes,
    )


def fit(config: RelearnConfig, domain: Domain, catalogue: Any, seed: int, folder: Path) -> Fit:
    """Train from scratch and test the best epoch."""
    from safetensors.torch import load_file

    means = catalogue.means() if config.model.initial_shift == "mean" else None
    model = adapt("scratch", config.model, catalogue.dims, parent=None, means=means, seed=seed)
    sequences, longest, world = domain.sequences(), config.model.max_length, World()
    watched = validation_queries(sequences, longest)
    start, curve = time.perf_counter(), list[tuple[float, float]]()

    def validate() -> dict[str, float]:
        found = summary(ranks_of(model, catalogue, watched))
        best = max([found[SELECTION_METRIC], *(value for _, value in curve)])
        curve.append((time.perf_counter() - start, best))
        return found

    stream = Stream([domain], config.stream, max_length=longest, seed=seed)
    feed = Feed(stream, catalogue, config.loss, domain.popularity(), config.training.accumulation, seed, world)
    engine = PlainEngine(model, config.training, world)
    trainer = Trainer(
        engine, feed, config.training, world, folder, seed, validate, lambda metrics, step: None, name=folder.name
    )
    progress = trainer.train()
    assert progress.best_epoch is not None
    model.load_state_dict(load_file(best_weights(folder, progress.best_epoch)))
    return Fit(curve, ranks_of(model, catalogue, test_queries(sequences, longest)))


def ranks_of(model: Recommender, catalogue: Any, queries: Any) -> Ranks:
    return rank_targets(model, embed_catalogue(model, catalogue), queries)


def compared(fits: dict[str, list[Fit]]) -> tuple[list[Line], list[str]]:
    """A line for each figure of each mode, and what the t-tests say."""
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
    """Both modes' curves against wall time, a thin line a seed."""
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
