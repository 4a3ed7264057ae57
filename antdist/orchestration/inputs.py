"""The data of a run, opened and checked: domains, features, stream, popularity, validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from antdist.batch import IntArray
from antdist.config.schema import DataConfig, StreamConfig
from antdist.errors import UserError

if TYPE_CHECKING:
    from antdist.data.domain import Domain
    from antdist.data.stream import Stream
    from antdist.evaluation.ranking import Queries, Ranks
    from antdist.features.table import Catalogue
    from antdist.model.recommender import Recommender
    from antdist.training.world import World


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    domains: list[Domain]
    catalogue: Catalogue
    stream: Stream
    popularity: IntArray  # (items of all domains,) counts in the training parts


def open_domains(data: DataConfig, names: Sequence[str], key: str) -> list[Domain]:
    """The prepared domains of these names. Raises UserError: no name, a missing domain (with those there are)."""
    from antdist.data.domain import open_domain

    if not names:
        raise UserError("no domain is named", where=key, remedy=f"name prepared domains below {data.root}")
    root = Path(data.root)
    domains = []
    for name in names:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"{name!r} is not the name of a folder below {data.root}", where=key)
        if not (root / name / "manifest.json").is_file():
            there = ", ".join(sorted(path.parent.name for path in root.glob("*/manifest.json"))) or "none"
            raise UserError(
                f"no prepared domain {name!r} in {root} (there: {there})",
                where=key,
                remedy=f"run `antdist prepare SRC --domain {name} --out {data.root}`, or correct the name",
            )
        domains.append(open_domain(root / name))
    return domains


def open_inputs(
    domains: list[Domain],
    catalogue: Catalogue,
    stream: StreamConfig,
    *,
    max_length: int,
    seed: int,
    workers: int,
    accumulation: int,
) -> Inputs:
    """Stream and popularity of opened domains. Raises UserError where the data are too small for the workers."""
    from antdist.data.stream import Stream

    opened = Stream(domains, stream, max_length=max_length, seed=seed)
    opened.check_ranks(workers, accumulation)
    popularity = np.concatenate([domain.popularity() for domain in domains]).astype(np.int64)
    return Inputs(domains, catalogue, opened, popularity)


def rank_together(model: Recommender, catalogue: Catalogue, domain: int, mine: Queries, world: World) -> Ranks:
    """Rank a domain's queries, each rank its own share of them; all users' ranks on every rank. Collective."""
    from antdist.evaluation.ranking import merge, rank_in_ranges
    from antdist.training.world import gather_objects

    first, end = catalogue.offsets[domain : domain + 2].tolist()
    return merge(gather_objects(world, rank_in_ranges(model, catalogue, first, end - first, mine)))
