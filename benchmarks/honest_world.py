"""Is the generated world honest? A model must gain from the order of a user's items, not from their bare set.

Generates the world, prepares and featurizes its target twice: as it is, and with each user's items in random order; then
ranks its test users by popularity and by a model trained from scratch. Each repeat is another seed of the model. The
figures are of quality, not of speed.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from antdist import ragged
from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain, open_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.stream.stream import Stream
from antdist.data.synthetic.grammar import shuffle_orders
from antdist.data.synthetic.world import WorldReport, generate_world
from antdist.distributed.world import World
from antdist.evaluation.baseline import rank_by_popularity
from antdist.evaluation.metrics import summary
from antdist.evaluation.ranking import Queries, embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.features.catalogue import Catalogue
from antdist.features.featurize import featurize_domains
from antdist.model.recommender import Recommender
from antdist.training.adaptation import adapt
from antdist.training.checkpoints.local import best_weights
from antdist.training.engines.plain import PlainEngine
from antdist.training.feed import Feed
from antdist.training.trainer import Trainer
from benchmarks.report import Line, Options, Report, ratio

MODEL = ModelConfig(dim=128, experts=4, inner=128, dropout=0.2)
LOSS = LossConfig(negatives="catalogue", alignment=0.0)


def shuffle_source(source: Path, out: Path, seed: int) -> None:
    """The same tabular domain, in which each user's items have changed places."""
    shutil.copytree(source, out)
    with gzip.open(source / "interactions.csv.gz", "rt", newline="") as file:
        header, *rows = csv.reader(file)
    by_user = defaultdict(list)
    for number, row in enumerate(rows):
        by_user[row[0]].append(number)
    order = np.concatenate(list(by_user.values()))
    offsets = ragged.offsets([len(numbers) for numbers in by_user.values()])
    items = np.array([row[1] for row in rows])
    items[order] = items[shuffle_orders(offsets, order, seed)]
    with gzip.open(out / "interactions.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([header, *zip((r[0] for r in rows), items, (r[2] for r in rows), strict=True)])


def fit(target: Domain, epochs: int, seed: int, folder: Path) -> Recommender:
    """Train from scratch; return the best epoch on the validation users."""
    catalogue, world = Catalogue([target], MODEL.modalities), World()
    config = TrainingConfig(
        epochs=epochs, engine="plain", learning_rate=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=20)
    )
    stream = Stream([target], StreamConfig(batch_size=128), max_length=MODEL.max_length, seed=seed)
    model = adapt("scratch", MODEL, catalogue.dims, parent=None, seed=seed)
    queries = validation_queries(target.sequences(), MODEL.max_length, limit=800)
    feed = Feed(stream, catalogue, LOSS, target.popularity(), accumulation=1, seed=seed, world=world)
    engine = PlainEngine(model, config, world)
    trainer = Trainer(
        engine,
        feed,
        config,
        world,
        folder,
        seed,
        evaluate=lambda: evaluate(model, catalogue, queries),
        log_metrics=lambda metrics, step: None,
    )
    progress = trainer.train()
    assert progress.best_epoch is not None
    model.load_state_dict(load_file(best_weights(folder, progress.best_epoch)))
    return model


def evaluate(model: Recommender, catalogue: Catalogue, queries: Queries) -> dict[str, float]:
    """Full ranking in the domain's catalogue."""
    return summary(rank_targets(model, embed_catalogue(model, catalogue, np.arange(catalogue.size)), queries))


def prepared(world: WorldReport, folder: Path, shuffled: bool) -> Domain:
    """The world's target, prepared and featurized below `folder`."""
    source = world.folder / world.target
    if shuffled:
        shuffle_source(source, folder / "source", seed=1)
        source = folder / "source"
    prepare_domain(source, format="tabular", domain=world.target, out=folder)
    target = open_domain(folder / world.target)
    featurize_domains([target], text="hashed", image="histogram", price="quantile", workers=0)
    return target


def run(options: Options) -> Report:
    values: dict[tuple[str, str, str], list[float]] = {}
    epochs = 1 if options.short else 30
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.short:
            world = generate_world(folder / "source", domains=1, target_users=60, target_items=40)
        else:
            world = generate_world(folder / "source")
        for order in ("as it is", "shuffled"):
            target = prepared(world, folder / order, order == "shuffled")
            queries = test_queries(target.sequences(), MODEL.max_length)
            popularity = summary(rank_by_popularity(target.popularity(), queries))
            for seed in range(options.repeats):
                model = fit(target, epochs, seed, folder / "runs" / order / str(seed))
                scratch = evaluate(model, Catalogue([target], MODEL.modalities), queries)
                for ranking, found in (("popularity", popularity), ("scratch", scratch)):
                    for metric in ("Recall@10", "NDCG@10"):
                        values.setdefault((order, ranking, metric), []).append(found[metric])
    lines = [Line(f"{order}, {ranking}: {metric}", found, "") for (order, ranking, metric), found in values.items()]
    for order in ("as it is", "shuffled"):
        ours, popular = values[order, "scratch", "Recall@10"], values[order, "popularity", "Recall@10"]
        lines.append(ratio(f"{order}, scratch over popularity: Recall@10", ours, popular))
    return Report(
        "honest_world",
        f"test users of a generated domain ranked by popularity and by a model trained from scratch ({epochs} epochs, best "
        "by validation), the domain as it is and with the items of each user in random order; a repeat is a seed",
        lines,
        [],
    )
