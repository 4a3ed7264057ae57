"""The data of a run, opened once a process and checked: domains, features, stream, popularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from antdist.batch import IntArray
from antdist.config.schema import DataConfig, PretrainConfig, RelearnConfig, Strategy
from antdist.data.cache import Cache, open_cache
from antdist.data.domain import Domain, open_domain, rewind_domain
from antdist.data.places import RemotePath, resolve_place
from antdist.data.stream.stream import Stream
from antdist.distributed.world import World, gather_objects
from antdist.errors import UserError
from antdist.evaluation.ranking import Queries, Ranks, merge, rank_in_ranges
from antdist.features.catalogue import Catalogue, open_optional_table
from antdist.io.storage import is_uri
from antdist.model.io import ModelCard
from antdist.model.recommender import Recommender
from antdist.runs.parent import Parent
from antdist.training.adaptation import treatments

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Inputs:
    """What a run reads."""

    domains: list[Domain]
    catalogue: Catalogue
    stream: Stream
    popularity: IntArray  # (items of all domains,) counts in the training parts


def list_domains(data: DataConfig) -> list[str]:
    """The names of the prepared domains below `data.root`. Raises UserError if that is unreachable."""
    root = resolve_place(data.root, _cache(data))
    if isinstance(root, RemotePath):
        return [name for name in root.folder_names() if (root / name / MANIFEST).is_file()]
    return sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))


def _cache(data: DataConfig) -> Cache | None:
    return open_cache(data.cache, data.cache_gb) if is_uri(data.root) else None


def open_domains(data: DataConfig, names: Sequence[str], key: str) -> list[Domain]:
    """Open the prepared domains of these names.

    Raises:
        UserError: no name; a domain that is missing (listing those there are); storage that is unreachable.
    """
    if not names:
        raise UserError("no domain is named", where=key, remedy=f"name prepared domains below {data.root}")
    cache = _cache(data)
    root = resolve_place(data.root, cache)
    found = []
    for name in names:
        if name in (".", "..") or Path(name).name != name:
            raise UserError(f"{name!r} is not the name of a folder below {data.root}", where=key)
        if not (root / name / MANIFEST).is_file():
            remedy = f"run `antdist prepare SRC --domain {name} --out {data.root}`, or correct the name"
            if is_uri(data.root):
                remedy = "correct the name, or copy a prepared domain there"
            there = ", ".join(list_domains(data)) or "none"
            raise UserError(f"no prepared domain {name!r} in {root} (there: {there})", where=key, remedy=remedy)
        found.append(open_domain(f"{data.root.rstrip('/')}/{name}", cache))
    return found


def open_target(config: RelearnConfig) -> Domain:
    """Open the target of an adaptation. Raises UserError as `open_domains`."""
    return open_domains(config.data, [config.target or ""], "target")[0]


def rank_together(model: Recommender, catalogue: Catalogue, domain: int, mine: Queries, world: World) -> Ranks:
    """Rank a domain's queries, each rank its own share; return all users' ranks on every rank. Collective."""
    first, end = catalogue.offsets[domain : domain + 2].tolist()
    return merge(gather_objects(world, rank_in_ranges(model, catalogue, first, end - first, mine)))


class Target:
    """An opened target with the item features that strategies read."""

    def __init__(self, config: RelearnConfig, domain: Domain, parent: Parent | None) -> None:
        self.config, self.domain, self.parent = config, domain, parent

    @cached_property
    def modalities(self) -> list[str]:
        """Those of `model.modalities` that the target has. Raises UserError if it has none."""
        return available_modalities(self.config, self.domain)

    def inputs(self, strategy: Strategy, seed: int) -> Inputs:
        """Open the inputs of a trial. Raises UserError if features do not fit or data are too few for the workers.

        The catalogue is each trial's own: a kept one would keep its feature tables mapped and in the node's cache.
        """
        if self.parent is not None and treatments(strategy)["theta"].inherited:
            catalogue = self._inherited_catalogue(self.parent.card)
        else:
            catalogue = Catalogue([self.domain], self.modalities, self.config.data.feature_dtype)
        return _make_inputs([self.domain], catalogue, self.config, seed)

    def _inherited_catalogue(self, card: ModelCard) -> Catalogue:
        """The features that the parent's item tower reads, of its encoders."""
        modalities = [m for m in card.dims if m in self.config.model.modalities]
        if not modalities:
            raise UserError(
                f"the parent reads {', '.join(card.dims)} only",
                where="model.modalities",
                remedy="name one of these, or choose strategy=relearn",
            )
        dims: dict[str, int] = {modality: card.dims[modality] for modality in modalities}
        identities = {m: source.identity for m, source in card.features.items()}
        return Catalogue([self.domain], modalities, self.config.data.feature_dtype, dims=dims, identities=identities)


def available_modalities(config: RelearnConfig, domain: Domain) -> list[str]:
    """Those of `model.modalities` that the target has. Raises UserError if it has none."""
    tables = {modality: open_optional_table(domain, modality) for modality in config.model.modalities}
    available: list[str] = [modality for modality, table in tables.items() if table is not None and table.meta.present]
    if not available:
        raise UserError(
            f"{domain.name} has none of {', '.join(config.model.modalities)}",
            where="model.modalities",
            remedy=f"run `antdist featurize {domain.folder}`, or name a modality that it has",
        )
    return available


def open_pretrain_inputs(config: PretrainConfig, data: Mapping[str, str]) -> tuple[Inputs, list[str]]:
    """The inputs of a pre-training, and the names of domains that were appended to since it began.

    Args:
        data: the fingerprints of the domains that the run began with; it goes on with those. Empty at the first start.

    Raises:
        UserError: domains or features that are missing or do not fit, or are too few for the workers.
    """
    newest = open_domains(config.data, config.data.domains, "data.domains")
    opened = [rewind_domain(domain, data.get(domain.name, "")) for domain in newest]
    catalogue = Catalogue(opened, config.model.modalities, config.data.feature_dtype)
    appended = [old.name for old, new in zip(opened, newest, strict=True) if old.fingerprint != new.fingerprint]
    return _make_inputs(opened, catalogue, config, config.seed), appended


def _make_inputs(
    opened: list[Domain], catalogue: Catalogue, config: PretrainConfig | RelearnConfig, seed: int
) -> Inputs:
    stream = Stream(opened, config.stream, max_length=config.model.max_length, seed=seed)
    stream.check_ranks(config.ray.workers, config.training.accumulation)
    catalogue.reserve_cache(stream.working_set_bytes())
    popularity = np.concatenate([domain.popularity() for domain in opened]).astype(np.int64)
    return Inputs(opened, catalogue, stream, popularity)
