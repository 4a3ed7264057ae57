"""The data of a run, opened and checked: domains, features, stream, popularity, validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from antdist.batch import IntArray
from antdist.config.schema import DataConfig, PretrainConfig, RelearnConfig, Strategy, StreamConfig
from antdist.errors import UserError
from antdist.io.storage import is_uri
from antdist.runs.parent import Parent

if TYPE_CHECKING:
    from antdist.data.cache import Cache
    from antdist.data.domain import Domain
    from antdist.data.stream.stream import Stream
    from antdist.distributed.world import World
    from antdist.evaluation.ranking import Queries, Ranks
    from antdist.features.table import Catalogue
    from antdist.model.recommender import Recommender


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    domains: list[Domain]
    catalogue: Catalogue
    stream: Stream
    popularity: IntArray  # (items of all domains,) counts in the training parts


def prepared(data: DataConfig) -> list[str]:
    """The names of the prepared domains below `data.root`. Raises UserError: storage that is away."""
    from antdist.data.places import RemotePath, resolve_place

    root = resolve_place(data.root, _cache(data))
    if isinstance(root, RemotePath):
        return [name for name in root.folder_names() if (root / name / "manifest.json").is_file()]
    return sorted(path.parent.name for path in root.glob("*/manifest.json"))


def _cache(data: DataConfig) -> Cache | None:
    from antdist.data.cache import open_cache

    return open_cache(data.cache, data.cache_gb) if is_uri(data.root) else None


def open_domains(
    data: DataConfig, names: Sequence[str], key: str, begun_with: Mapping[str, str] | None = None
) -> list[Domain]:
    """The prepared domains of these names; those that a run has `begun_with`, by name and fingerprint, as they were before
    appends since. Raises UserError: no name, a missing domain (with those there are), storage that is away."""
    from antdist.data.domain import open_domain, rewind_domain
    from antdist.data.places import resolve_place

    if not names:
        raise UserError("no domain is named", where=key, remedy=f"name prepared domains below {data.root}")
    cache = _cache(data)
    root = resolve_place(data.root, cache)
    domains = []
    for name in names:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"{name!r} is not the name of a folder below {data.root}", where=key)
        if not (root / name / "manifest.json").is_file():
            remedy = f"run `antdist prepare SRC --domain {name} --out {data.root}`, or correct the name"
            if is_uri(data.root):
                remedy = "correct the name, or copy a prepared domain there"
            there = ", ".join(prepared(data)) or "none"
            raise UserError(
                f"no prepared domain {name!r} in {root} (there: {there})",
                where=key,
                remedy=remedy,
            )
        domain = open_domain(f"{data.root.rstrip('/')}/{name}", cache)
        domains.append(rewind_domain(domain, (begun_with or {}).get(name, "")))
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
    from antdist.data.stream.stream import Stream

    opened = Stream(domains, stream, max_length=max_length, seed=seed)
    opened.check_ranks(workers, accumulation)
    catalogue.reserve_cache(opened.working_set_bytes())
    popularity = np.concatenate([domain.popularity() for domain in domains]).astype(np.int64)
    return Inputs(domains, catalogue, opened, popularity)


def rank_together(model: Recommender, catalogue: Catalogue, domain: int, mine: Queries, world: World) -> Ranks:
    """Rank a domain's queries, each rank its own share of them; all users' ranks on every rank. Collective."""
    from antdist.distributed.world import gather_objects
    from antdist.evaluation.ranking import merge, rank_in_ranges

    first, end = catalogue.offsets[domain : domain + 2].tolist()
    return merge(gather_objects(world, rank_in_ranges(model, catalogue, first, end - first, mine)))


def relearn_inputs(config: RelearnConfig, strategy: Strategy, parent: Parent | None) -> Inputs:
    """The target's data as a strategy reads them: of `model.modalities` those that the parent has, of its encoders, where
    the item tower is inherited; else those that the target has."""
    from antdist.features.table import Catalogue
    from antdist.training.adaptation import treatments

    domains = open_domains(config.data, [config.target or ""], "target")
    if parent is not None and treatments(strategy)["theta"].inherited:
        identities = {m: source.identity for m, source in parent.card.features.items()}
        shared = [m for m in parent.card.dims if m in config.model.modalities]
        if not shared:
            raise UserError(
                f"the parent reads {', '.join(parent.card.dims)} and nothing else",
                where="model.modalities",
                remedy="name one of these, or choose strategy=relearn",
            )
        dims: dict[str, int] = {modality: parent.card.dims[modality] for modality in shared}
        catalogue = Catalogue(domains, shared, config.data.feature_dtype, dims=dims, identities=identities)
    else:
        catalogue = Catalogue(domains, available(config, domains[0]), config.data.feature_dtype)
    return open_inputs(
        domains,
        catalogue,
        config.stream,
        max_length=config.model.max_length,
        seed=config.seeds[0],
        workers=config.ray.workers,
        accumulation=config.training.accumulation,
    )


def available(config: RelearnConfig, domain: Domain) -> list[str]:
    """Those of `model.modalities` that the target has. Raises UserError if it has none."""
    from antdist.features.table import open_optional_table

    tables = {modality: open_optional_table(domain, modality) for modality in config.model.modalities}
    kept: list[str] = [modality for modality, table in tables.items() if table is not None and table.meta.present]
    if not kept:
        raise UserError(
            f"{domain.name} has none of {', '.join(config.model.modalities)}",
            where="model.modalities",
            remedy=f"run `antdist featurize {domain.folder}`, or name a modality that it has",
        )
    return kept


def pretrain_inputs(config: PretrainConfig, begun_with: dict[str, str] | None = None) -> Inputs:
    """Domains, features and stream of a pre-training run, with the data that it has `begun_with` (`open_domains`). Raises
    UserError where any does not fit."""
    from antdist.features.table import Catalogue

    domains = open_domains(config.data, config.data.domains, "data.domains", begun_with)
    catalogue = Catalogue(domains, config.model.modalities, config.data.feature_dtype)
    return open_inputs(
        domains,
        catalogue,
        config.stream,
        max_length=config.model.max_length,
        seed=config.seed,
        workers=config.ray.workers,
        accumulation=config.training.accumulation,
    )
