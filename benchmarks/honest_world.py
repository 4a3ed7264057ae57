"""Is the generated world honest? A model must gain from the order of a user's items, not from their bare set.

    python -m benchmarks.honest_world [--epochs 30] [--seeds 0,1,2] [--transfer]

Generates the world, prepares and featurizes it twice: as it is, and with each user's items in random order; then ranks
the target's test users by popularity and by a model trained from scratch. With --transfer it also pre-trains on the
auxiliary domains and adapts. Plain torch, one process. Prints Recall@10, NDCG@10 and the ratios to popularity.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from antdist.config.schema import LossConfig, ModelConfig, ScheduleConfig, Strategy, StreamConfig, TrainingConfig
from antdist.data.domain import Domain, open_domain
from antdist.data.grammar import shuffle_orders
from antdist.data.prepare import prepare
from antdist.data.stream import Stream
from antdist.data.synth import SynthReport, synth
from antdist.evaluation.baseline import rank_by_popularity
from antdist.evaluation.metrics import summary
from antdist.evaluation.ranking import Queries, embed_catalogue, rank_targets, test_queries, validation_queries
from antdist.features.featurize import featurize
from antdist.features.table import Catalogue
from antdist.model.recommender import Recommender
from antdist.training.adaptation import adapt
from antdist.training.engine import PlainEngine
from antdist.training.feed import Feed
from antdist.training.loop import Job, best_weights, train
from antdist.training.world import current_world

MODEL = ModelConfig(dim=128, experts=4, inner=128, dropout=0.2)
PRETRAINING = LossConfig(negatives="in_batch")
ADAPTATION = LossConfig(negatives="catalogue", alignment=0.0)


def shuffle_source(source: Path, out: Path, seed: int) -> None:
    """The same tabular domain, in which each user's items have changed places."""
    shutil.copytree(source, out)
    with gzip.open(source / "interactions.csv.gz", "rt", newline="") as file:
        header, *rows = csv.reader(file)
    by_user = defaultdict(list)
    for number, row in enumerate(rows):
        by_user[row[0]].append(number)
    order = np.concatenate(list(by_user.values()))
    offsets = np.concatenate([[0], np.cumsum([len(numbers) for numbers in by_user.values()])])
    items = np.array([row[1] for row in rows])
    items[order] = items[shuffle_orders(offsets, order, seed)]
    with gzip.open(out / "interactions.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([header, *zip((r[0] for r in rows), items, (r[2] for r in rows), strict=True)])


def fit(
    domains: list[Domain],
    strategy: Strategy,
    loss: LossConfig,
    epochs: int,
    batch_size: int,
    seed: int,
    folder: Path,
    parent: Recommender | None = None,
) -> Recommender:
    """Train; return the best epoch on the validation users of all domains."""
    catalogue, world = Catalogue(domains, MODEL.modalities), current_world()
    config = TrainingConfig(
        epochs=epochs, engine="plain", learning_rate=1e-3, schedule=ScheduleConfig(kind="cosine", warmup_steps=20)
    )
    stream = Stream(domains, StreamConfig(batch_size=batch_size), max_length=MODEL.max_length, seed=seed)
    popularity = np.concatenate([domain.popularity() for domain in domains])
    model = adapt(strategy, MODEL, catalogue.dims, parent=parent, seed=seed).to(world.device)

    def validate() -> dict[str, float]:
        parts = [
            evaluate(model, catalogue, number, validation_queries(d.sequences(), MODEL.max_length, limit=800))
            for number, d in enumerate(domains)
        ]
        return {name: float(np.mean([part[name] for part in parts])) for name in ("Recall@10", "NDCG@10")}

    feed = Feed(stream, catalogue, loss, popularity, accumulation=1, seed=seed, world=world)
    engine = PlainEngine(model, config, world)
    progress = train(Job(engine, feed, config, world, folder, seed, validate, report=lambda metrics, step: None))
    from safetensors.torch import load_file

    assert progress.best_epoch is not None
    model.load_state_dict(load_file(best_weights(folder, progress.best_epoch)))
    return model


def evaluate(model: Recommender, catalogue: Catalogue, number: int, queries: Queries) -> dict[str, float]:
    """Full ranking in the catalogue of one of the domains."""
    items = np.arange(catalogue.offsets[number], catalogue.offsets[number + 1])
    return summary(rank_targets(model, embed_catalogue(model, catalogue, items), queries))


def prepared(world: SynthReport, names: list[str], folder: Path, shuffled: bool) -> list[Domain]:
    for name in names:
        source = world.folder / name
        if shuffled:
            shuffle_source(source, folder / "source" / name, seed=1)
            source = folder / "source" / name
        prepare(source, format="tabular", domain=name, out=folder)
    domains = [open_domain(folder / name) for name in names]
    featurize(domains, text="hashed", image="histogram", price="quantile", workers=0)
    return domains


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    world = synth(folder / "source", seed=args.world_seed)
    print("\n".join(str(asdict(domain)) for domain in world.domains))
    seeds = [int(seed) for seed in args.seeds.split(",")]
    auxiliaries = [domain.name for domain in world.domains[:-1]] if args.transfer else []
    rows: list[dict[str, Any]] = []
    for order in ("as it is", "shuffled"):
        shuffled = order == "shuffled"
        domains = prepared(world, ([] if shuffled else auxiliaries) + [world.target], folder / order, shuffled)
        target = domains[-1]
        queries = test_queries(target.sequences(), MODEL.max_length)
        baseline = summary(rank_by_popularity(target.popularity(), queries))
        rows.append({"order": order, "ranking": "popularity", **baseline, "ratio": 1.0})
        strategies: list[Strategy] = ["scratch"]
        parent = None
        if len(domains) > 1:
            strategies += ["finetune", "finetune_all", "relearn"]
            parent = fit(domains[:-1], "scratch", PRETRAINING, args.pretrain_epochs, 512, 0, folder / "parent")
        for strategy in strategies:
            start, results = time.monotonic(), []
            for seed in seeds:
                place = folder / "runs" / order / f"{strategy}-{seed}"
                model = fit([target], strategy, ADAPTATION, args.epochs, args.batch_size, seed, place, parent)
                results.append(evaluate(model, Catalogue([target], MODEL.modalities), 0, queries))
            mean = {key: float(np.mean([result[key] for result in results])) for key in results[0]}
            seconds = (time.monotonic() - start) / len(seeds)
            ratio = mean["Recall@10"] / baseline["Recall@10"]
            rows.append({"order": order, "ranking": strategy, **mean, "ratio": ratio, "seconds": seconds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--world-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    print(f"{'order':<10} {'ranking':<13} {'Recall@10':>9} {'NDCG@10':>9} {'x popularity':>12} {'seconds':>8}")
    for row in rows:
        print(
            f"{row['order']:<10} {row['ranking']:<13} {row['Recall@10']:>9.4f} {row['NDCG@10']:>9.4f} "
            f"{row['ratio']:>12.2f} {row.get('seconds', 0):>8.0f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
