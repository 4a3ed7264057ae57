"""The feature tables of all domains of a run, looked up by global item id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from antdist import ragged
from antdist.batch import IntArray, ItemInputs
from antdist.data.places import RemotePath
from antdist.errors import UserError
from antdist.features.gather import group_by_range, round_to_float16
from antdist.features.limits import raise_limits
from antdist.features.parts import MappedParts, mapping_budget
from antdist.features.source import source_has_modality
from antdist.features.table import Dtype, FeatureTable, has_table, open_table

if TYPE_CHECKING:
    import torch

    from antdist.data.domain import Domain


class Catalogue:
    """The features of one or several domains by global id: a domain's offset + the item's index in it.

    A domain may lack the table of a modality only if none of its items has the modality in the source.

    Args:
        domains: in the order that defines the offsets.
        modalities: which features to look up.
        dtype: `float16` rounds the features (the reference's were); they are returned as float32 in any case.
        dims, identities: of an existing model that will read the features, by modality. Tables must match them, and a
            modality that no domain has is zeros of that dimension instead of an error.

    Raises:
        UserError: as `open_table`; or tables come from different encoders or have another dimension than `dims`, no
            domain has a modality, or there are more parts than the system lets a process map.
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        modalities: Sequence[str],
        dtype: Dtype = "float32",
        *,
        dims: Mapping[str, int] | None = None,
        identities: Mapping[str, str] | None = None,
    ) -> None:
        assert domains, "a catalogue of no domains"
        self.domains = list(domains)
        self.modalities = list(modalities)
        self.dtype: Dtype = dtype
        self.offsets = ragged.offsets([d.manifest.items for d in domains])
        self.dims: dict[str, int] = {}
        self.identities: dict[str, str] = {}
        self._tables: dict[str, list[FeatureTable | None]] = {}
        self._mapped = MappedParts()
        for modality in self.modalities:
            tables = [open_optional_table(domain, modality, self._mapped) for domain in domains]
            filled = [(d, t) for d, t in zip(domains, tables, strict=True) if t is not None and t.meta.present]
            wanted = (identities or {}).get(modality)
            _check_same_encoder(modality, filled, wanted)
            if filled:
                self.dims[modality] = _check_dim(filled[0], (dims or {}).get(modality))
                self.identities[modality] = filled[0][1].meta.identity
            elif dims is not None and modality in dims:
                self.dims[modality] = dims[modality]
                if wanted is not None:
                    self.identities[modality] = wanted
            else:
                raise UserError(
                    f"no item of {', '.join(d.name for d in domains)} has {modality} features",
                    where="model.modalities",
                    remedy=f"leave {modality} out of model.modalities, or use domains that have it",
                )
            self._tables[modality] = [table if table and table.meta.present else None for table in tables]
        self.reserve_cache()

    @property
    def size(self) -> int:
        return int(self.offsets[-1])

    def features(self, item_ids: IntArray) -> ItemInputs:
        """Look up N items by global id: float32 tensors on the CPU.

        One gather a modality and part; for sorted ids the only copy is the one from the memory map to the tensor.
        """
        import torch

        item_ids = np.asarray(item_ids, dtype=np.int64)
        assert item_ids.ndim == 1
        assert not len(item_ids) or (item_ids.min() >= 0 and item_ids.max() < self.size), "item id out of range"
        groups = list(group_by_range(item_ids, self.offsets))
        values: dict[str, torch.Tensor] = {}
        present: dict[str, torch.Tensor] = {}
        for modality in self.modalities:
            rows, mask = self._gather(modality, item_ids, groups)
            values[modality], present[modality] = torch.from_numpy(rows), torch.from_numpy(mask)
        return ItemInputs(values, present, torch.from_numpy(item_ids.copy()))

    def reserve_cache(self, reserved: int | None = None) -> None:
        """Limit the mapped remote parts, so that `reserved` bytes of the node's cache are left to other files.

        Args:
            reserved: None: a quarter of the cache.

        Raises:
            UserError: more parts would stay mapped than the system allows.
        """
        remote = self.remote_tables()
        if remote:
            cache = remote[0].folder.cache  # type: ignore[union-attr]
            self._mapped.limit = mapping_budget(cache, sum(table.bytes for table in remote), reserved)
        raise_limits(sum(len(table.meta.parts) for table in self._staying_tables()))

    def remote_tables(self) -> list[FeatureTable]:
        """Return the tables of remote domains."""
        return [table for table in self._all_tables() if isinstance(table.folder, RemotePath)]

    def _staying_tables(self) -> list[FeatureTable]:
        """Return the tables all of whose parts may stay mapped."""
        if sum(table.bytes for table in self.remote_tables()) <= self._mapped.limit:
            return self._all_tables()
        return [table for table in self._all_tables() if not isinstance(table.folder, RemotePath)]

    def verify(self) -> int:
        """Verify every table (`FeatureTable.verify`), and return their size in bytes."""
        for table in self._all_tables():
            table.verify()
        return sum(table.bytes for table in self._all_tables())

    def verify_share(self, share: int, shares: int) -> None:
        """Check the digests of every `shares`-th part, starting with part `share`.

        Parts of remote tables are fetched into the node's cache, if all of them may stay there.

        Raises:
            UserError: naming the part at fault.
        """
        parts = [(table, part) for table in self._staying_tables() for part in table.meta.parts]
        for table, part in parts[share % shares :: shares]:
            table.verify_part(part)

    def _all_tables(self) -> list[FeatureTable]:
        return [table for tables in self._tables.values() for table in tables if table is not None]

    def means(self, chunk: int = 65536) -> dict[str, torch.Tensor]:
        """Compute the mean feature (d_m,) of each modality over the items that have it."""
        import torch

        sums = {modality: np.zeros(self.dims[modality]) for modality in self.modalities}
        counts = dict.fromkeys(self.modalities, 0)
        for first in range(0, self.size, chunk):
            some = self.features(np.arange(first, min(first + chunk, self.size)))
            for modality in self.modalities:
                sums[modality] += some.values[modality].sum(0).double().numpy()
                counts[modality] += int(some.present[modality].sum())
        return {m: torch.from_numpy(total / max(counts[m], 1)).float() for m, total in sums.items()}

    def _gather(
        self, modality: str, item_ids: IntArray, groups: list[tuple[int, slice | IntArray]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        rows = np.empty((len(item_ids), self.dims[modality]), dtype=np.float32)
        mask = np.empty(len(item_ids), dtype=bool)
        for number, chosen in groups:
            table = self._tables[modality][number]
            if table is None:
                rows[chosen], mask[chosen] = 0, False
                continue
            local = item_ids[chosen] - self.offsets[number]
            mask[chosen] = table.present[local]
            if isinstance(chosen, slice):
                table.read(local, rows[chosen])
            else:
                rows[chosen] = table.rows(local)[0]
        if self.dtype == "float16":
            round_to_float16(rows)
        return rows, mask


def _check_dim(filled: tuple[Domain, FeatureTable], wanted: int | None) -> int:
    domain, table = filled
    if wanted is not None and table.meta.dim != wanted:
        raise UserError(
            f"the model reads {table.modality} features of dimension {wanted}, domain {domain.name} has {table.meta.dim}",
            where=domain.folder,
            remedy="featurize the domain with the encoder that the model was trained with",
        )
    return table.meta.dim


def open_optional_table(domain: Domain, modality: str, kept: MappedParts | None = None) -> FeatureTable | None:
    """Open the feature table of a domain; None if no item has the modality in the source.

    Raises:
        UserError: as `open_table`.
    """
    if has_table(domain, modality) or source_has_modality(domain, modality):
        return open_table(domain, modality, kept)
    return None


def _check_same_encoder(modality: str, tables: Sequence[tuple[Domain, FeatureTable]], wanted: str | None) -> None:
    metas = {domain.name: table.meta for domain, table in tables}
    identities = {meta.identity for meta in metas.values()} | ({wanted} if wanted is not None and metas else set())
    if len(identities) < 2:
        return
    by_domain = "; ".join(f"{name} has {meta.encoder_name} ({meta.identity})" for name, meta in metas.items())
    model = f"; the model was trained on ({wanted})" if wanted is not None else ""
    raise UserError(
        f"{modality} features of different encoders cannot be mixed: {by_domain}{model}",
        where="features",
        remedy=f"run `antdist featurize` on all of them with the same --{modality} encoder and options, in one call",
    )
