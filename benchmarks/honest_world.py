"""Is the generated world honest? A model must gain from the order of items, not only their set.

Generates the world, prepares and featurizes its target twice: unchanged, and with each user's items in random order; then
ranks its test users by popularity and by a model trained from scratch. Each repeat is another seed of the model. The
figures measure quality, not speed.
"""

from __future__ import annotations

import csv
import gzip
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from antdist import ragged
from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, StreamConfig, TrainingConfig
from antdist.data.domain import Domain, open_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.data.synthetic.grammar import shuffle_orders
from antdist.data.synthetic.world import WorldReport, generate_world
from antdist.evaluation.baseline import rank_by_popularity
from antdist.evaluation.metrics import summary
from antdist.evaluation.ranking import Queries, embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.features.catalogue import Catalogue
from antdist.features.featurize import featurize_domains
from antdist.model.recommender import Recommender
from antdist.training.adaptation import adapt
from benchmarks.report import Line, Options, Report, ratio
from benchmarks.trainers import train_to_best

MODEL = ModelConfig(dim=128, experts=4, inner=128, dropout=0.2)
LOSS = LossConfig(negatives="catalogue", alignment=0.0)


def shuffle_source(source: Path, out: Path, seed: int) -> None:
    """Copy a tabular domain with each user's items in random order."""
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


def train_scratch(target: Domain, epochs: int, seed: int, folder: Path) -> Recommender:
    """Train from scratch. Returns the best epoch on the validation users."""
    catalogue = Catalogue([target], MODEL.modalities)
    config = TrainingConfig(
        epochs=epochs, engine="plain", learning_rate=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=20)
    )
    model = adapt("scratch", MODEL, catalogue.dims, parent=None, seed=seed)
    queries = validation_queries(target.sequences(), MODEL.max_length, limit=800)
    train_to_best(
        model,
        target,
        catalogue,
        loss=LOSS,
        stream=StreamConfig(batch_size=128),
        training=config,
        seed=seed,
        folder=folder,
        evaluate=lambda: rank_catalogue(model, catalogue, queries),
    )
    return model


def rank_catalogue(model: Recommender, catalogue: Catalogue, queries: Queries) -> dict[str, float]:
    """Rank the full catalogue of the domain."""
    return summary(rank_targets(model, embed_catalogue(model, catalogue, np.arange(catalogue.size)), queries))


def prepare_target(world: WorldReport, folder: Path, shuffled: bool) -> Domain:
    """Prepare and featurize the world's target below `folder`."""
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
            target = prepare_target(world, folder / order, order == "shuffled")
            queries = test_queries(target.sequences(), MODEL.max_length)
            popularity = summary(rank_by_popularity(target.popularity(), queries))
            for seed in range(options.repeats):
                model = train_scratch(target, epochs, seed, folder / "runs" / order / str(seed))
                scratch = rank_catalogue(model, Catalogue([target], MODEL.modalities), queries)
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
