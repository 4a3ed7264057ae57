"""Feature tables: what the frozen encoders said about each item, on disk, memory-mapped, and looked up by item id.

`DATA/NAME/features/<modality>.json` says what made the table and lists its parts; part k holds the items of item shard
k: `<modality>-00000.npy` (n, dim) and `<modality>-00000.present.npy` (n,) bool. The meta file is written last: a
table exists when it does. A table of which no item has the modality has no parts at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from antdist import ragged
from antdist.batch import IntArray, ItemInputs
from antdist.data.entries import File
from antdist.data.manifest import read_manifest
from antdist.data.places import PARALLEL_FETCHES, Place, RemotePath
from antdist.errors import UserError
from antdist.features.limits import raise_limits
from antdist.features.parts import MappedParts, check_array, map_file, mapping_budget
from antdist.features.source import source_has_modality
from antdist.io.files import file_sha256, write_json

if TYPE_CHECKING:
    import torch

    from antdist.data.domain import Domain

SCHEMA_VERSION = 1
VERIFIED_ROWS = 65536  # looked at together
TORCH_SERIAL = 32768  # numbers that torch copies in the calling thread (its GRAIN_SIZE)

Dtype = Literal["float32", "float16"]
PartName = Annotated[str, StringConstraints(pattern=r"^(text|image|price)-[0-9]{5,9}$")]


class TablePart(BaseModel):
    """The rows of one item shard: items `first` to `first + items - 1`; files `name.npy` and `name.present.npy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: PartName
    first: int
    items: int
    present: int  # items that have the modality
    bytes: int
    sha256: str
    present_bytes: int
    present_sha256: str


def _files(part: TablePart) -> tuple[File, File]:
    rows = File(name=f"{part.name}.npy", bytes=part.bytes, sha256=part.sha256)
    return rows, File(name=f"{part.name}.present.npy", bytes=part.present_bytes, sha256=part.present_sha256)


class FeatureMeta(BaseModel):
    """What made a feature table, and its parts.

    `encoder` holds `name` (for people) and everything that shapes the features: digest, pooling, max_length, scale ...
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    modality: Literal["text", "image", "price"]
    encoder: dict[str, str | int | float | None]
    dim: Annotated[int, Field(gt=0, le=1 << 20)]
    dtype: Dtype
    items: int
    fingerprint: str  # of the manifest whose items were encoded
    present: int
    broken: int = 0  # images that could not be read
    parts: list[TablePart]

    @property
    def identity(self) -> str:
        """Tables of equal identity may be mixed: same encoder, pooling and dimension, whatever it was called, whatever
        the domain and the stored type."""
        return encoder_identity(self.modality, self.encoder, self.dim)

    @property
    def encoder_name(self) -> str:
        return str(self.encoder.get("name", "?"))


def encoder_identity(modality: str, encoder: Mapping[str, str | int | float | None], dim: int) -> str:
    """A line that two tables share exactly if the same encoder made them, e.g. `text dim=384 digest=0f3c... pooling=mean`."""
    said = {key: value for key, value in encoder.items() if key != "name"} | {"dim": dim}
    if isinstance(said.get("digest"), str):
        said["digest"] = str(said["digest"])[:16]
    return " ".join([modality, *(f"{key}={said[key]}" for key in sorted(said))])


# ------------------------------------------------------------------------------------------------------ writing


def features_folder(domain: Domain) -> Place:
    return domain.folder / "features"


def write_part(
    folder: Path, modality: str, number: int, *, first: int, values: NDArray[Any], present: NDArray[np.bool_]
) -> TablePart:
    """Write one part, each file under a temporary name that is then renamed, and describe it."""
    name = f"{modality}-{number:05d}"
    size, digest = _write_array(folder / f"{name}.npy", values)
    present_size, present_digest = _write_array(folder / f"{name}.present.npy", present)
    return TablePart(
        name=name,
        first=first,
        items=len(values),
        present=int(present.sum()),
        bytes=size,
        sha256=digest,
        present_bytes=present_size,
        present_sha256=present_digest,
    )


def _write_array(path: Path, array: NDArray[Any]) -> tuple[int, str]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    size, digest = temporary.stat().st_size, file_sha256(temporary)
    temporary.replace(path)
    return size, digest


def write_meta(folder: Path, meta: FeatureMeta) -> None:
    write_json(folder / f"{meta.modality}.json", meta.model_dump())


def is_part_intact(folder: Path, part: TablePart) -> bool:
    """Whether both files of a part have the size and digest that were recorded."""
    wanted = {f"{part.name}.npy": (part.bytes, part.sha256)}
    wanted[f"{part.name}.present.npy"] = (part.present_bytes, part.present_sha256)
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size and file_sha256(folder / name) == digest
        for name, (size, digest) in wanted.items()
    )


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class FeatureTable:
    """One modality of one domain, memory-mapped, so that all processes of a node share its pages. `kept`: where the table is
    remote, what has its parts."""

    folder: Place
    meta: FeatureMeta
    kept: MappedParts = field(default_factory=MappedParts, compare=False)

    @property
    def modality(self) -> str:
        return self.meta.modality

    @cached_property
    def _bounds(self) -> IntArray:
        return np.array([part.first for part in self.meta.parts] + [self.meta.items], dtype=np.int64)

    @cached_property
    def files(self) -> list[tuple[File, File]]:
        """Of each part, its rows and its presence. Raises UserError: one has no digest, or no plain name."""
        try:
            return [_files(part) for part in self.meta.parts]
        except ValidationError as error:
            what = f"not a description of a feature table ({str(error).splitlines()[0]})"
            raise UserError(what, where=self.folder / f"{self.modality}.json", remedy=self._again) from None

    @property
    def bytes(self) -> int:
        return sum(part.bytes + part.present_bytes for part in self.meta.parts)

    @cached_property
    def _parts(self) -> list[NDArray[Any]]:
        assert not isinstance(self.folder, RemotePath)
        return [map_file(self.folder / f"{part.name}.npy", self._again) for part in self.meta.parts]

    def _arrays(self, numbers: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Parts by their numbers; remote ones are fetched some at a time."""
        if not isinstance(self.folder, RemotePath):
            yield from (self._parts[number] for number in numbers)
            return
        for first in range(0, len(numbers), PARALLEL_FETCHES):
            files = [self.files[number][0] for number in numbers[first : first + PARALLEL_FETCHES]]
            self.folder.fetch([file for file in files if file not in self.kept])
            for number, file in zip(numbers[first : first + PARALLEL_FETCHES], files, strict=True):
                shape = (self.meta.parts[number].items, self.meta.dim)
                yield self.kept.array(self.folder, file, shape, self.meta.dtype, self._again)

    @property
    def _again(self) -> str:
        return _advice(self.folder.parent, self.modality)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """(items,) bool, in memory: a byte an item."""
        if not self.meta.parts:
            return np.zeros(self.meta.items, dtype=bool)
        if not isinstance(self.folder, RemotePath):
            return np.concatenate(
                [map_file(self.folder / f"{p.name}.present.npy", self._again) for p in self.meta.parts]
            )
        self.folder.fetch(present for _, present in self.files)
        passing = MappedParts()  # they are small, and copied
        return np.concatenate(
            [
                passing.array(self.folder, present, (part.items,), "bool", self._again)
                for part, (_, present) in zip(self.meta.parts, self.files, strict=True)
            ]
        )

    def rows(self, indices: IntArray) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The features (n, dim), in the stored type, and presence (n,) of items by index in the domain."""
        values: NDArray[Any] = np.empty((len(indices), self.meta.dim), dtype=self.meta.dtype)
        self.read(indices, values)
        return values, self.present[indices]

    def read(self, indices: IntArray, into: NDArray[Any]) -> None:
        """Copy features of items by index in the domain into the rows of `into` (n, dim), of the stored type or float32."""
        if not self.meta.parts:
            into[...] = 0
            return
        groups = list(_groups(indices, self._bounds))
        for (number, chosen), part in zip(groups, self._arrays([n for n, _ in groups]), strict=True):
            local = indices[chosen] - self._bounds[number]
            if isinstance(chosen, slice):
                _take(part, local, into[chosen])
            else:
                into[chosen] = part[local]

    def verify(self) -> None:
        """Read every byte: sizes, digests, and that features are numbers; of a remote table the sizes alone, as parts are
        checked when they are fetched. Raises UserError naming the part at fault."""
        if isinstance(self.folder, RemotePath):
            self.folder.check_sizes([file for both in self.files for file in both])
            return
        for part in self.meta.parts:
            self.verify_part(part)
            file = self.folder / f"{part.name}.npy"
            values = map_file(file, self._again)
            for first in range(0, part.items, VERIFIED_ROWS):
                bad = np.flatnonzero(~np.isfinite(values[first : first + VERIFIED_ROWS]).all(axis=1))
                if len(bad):
                    what = f"the features of item {part.first + first + bad[0]} are not finite (NaN or infinity)"
                    raise UserError(what, where=file, remedy=self._again)

    def verify_part(self, part: TablePart) -> None:
        """Read a part: size and digest; a remote one comes to the cache by that. Raises UserError."""
        if isinstance(self.folder, RemotePath):
            self.folder.fetch(_files(part))
        elif not is_part_intact(self.folder, part):
            what = "this part of the feature table is damaged: its size or digest is not what was recorded"
            raise UserError(what, where=self.folder / f"{part.name}.npy", remedy=self._again)


def _take(table: NDArray[Any], indices: IntArray, into: NDArray[Any]) -> None:
    """`into[...] = table[indices]` in one pass over the memory, in this thread alone."""
    assert not len(indices) or (indices.min() >= 0 and indices.max() < len(table)), "item index out of range"
    if table.dtype == into.dtype:
        np.take(table, indices, axis=0, out=into, mode="clip")  # the default mode takes a copy, to raise before writing
        return
    # numpy widens a number at a time, torch many
    for some in _pieces(into):
        _torch_view(into[some]).copy_(_torch_view(table[indices[some]]))


def _round_to_float16(values: NDArray[np.float32]) -> None:
    for some in _pieces(values):
        piece = _torch_view(values[some])
        piece.copy_(piece.half())


def _pieces(rows: NDArray[Any]) -> Iterator[slice]:
    """Runs of rows that fit the cache, and that torch works through alone: the threads that it would start beside those
    of the training step would take the step's cores."""
    step = max(1, TORCH_SERIAL // max(1, rows.shape[1]))
    return (slice(first, first + step) for first in range(0, len(rows), step))


def _torch_view(array: NDArray[Any]) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _groups(ids: IntArray, bounds: IntArray) -> Iterator[tuple[int, slice | IntArray]]:
    """Which of `ids` fall in each range [bounds[k], bounds[k + 1]): pairs (k, selector), only ranges that are met."""
    if len(ids) == 0:
        return
    if len(bounds) == 2:
        yield 0, slice(0, len(ids))
        return
    if np.all(ids[1:] >= ids[:-1]):
        cuts = np.searchsorted(ids, bounds)
        for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
            yield int(k), slice(int(cuts[k]), int(cuts[k + 1]))
        return
    owner = np.searchsorted(bounds, ids, side="right") - 1
    order = np.argsort(owner, kind="stable")
    cuts = np.searchsorted(owner[order], np.arange(len(bounds)))
    for k in np.flatnonzero(cuts[1:] > cuts[:-1]):
        yield int(k), order[cuts[k] : cuts[k + 1]]


def has_table(domain: Domain, modality: str) -> bool:
    return (features_folder(domain) / f"{modality}.json").is_file()


def open_table(domain: Domain, modality: str, kept: MappedParts | None = None) -> FeatureTable:
    """Open the feature table of a domain; cheap: sizes and shapes are checked, digests are not. Of a remote one all that is
    checked as its parts are fetched.

    Raises:
        UserError: no table, a meta file that cannot be read, a table of another manifest (one that the domain has grown from
            without new items is as good), a part
            missing, cut short or of another shape than the meta file says.
    """
    folder = features_folder(domain)
    path = folder / f"{modality}.json"
    again = _advice(domain.folder, modality)
    if not path.is_file():
        raise UserError(f"domain {domain.name} has no {modality} features", where=path, remedy=again)
    meta = _read_meta(path, again)
    if meta.modality != modality:
        raise UserError(f"this file describes {meta.modality} features, not {modality}", where=path, remedy=again)
    if meta.fingerprint not in (domain.fingerprint, *domain.manifest.ancestors):
        meta = _before_appends(meta, domain) or meta
    if meta.fingerprint not in (domain.fingerprint, *domain.manifest.ancestors):
        raise UserError(
            f"the {modality} features of domain {domain.name} were made for another manifest "
            f"(fingerprint {meta.fingerprint[:12]}, the domain has {domain.fingerprint[:12]})",
            where=path,
            remedy=again,
        )
    if meta.fingerprint != domain.fingerprint and meta.items < domain.manifest.items:
        raise UserError(
            f"the {modality} features of domain {domain.name} lack {domain.manifest.items - meta.items} items that were appended "
            "since",
            where=path,
            remedy=f"{again} as before: only those are encoded",
        )
    ends = [part.first + part.items for part in meta.parts]
    if meta.items != domain.manifest.items or (
        meta.parts and [part.first for part in meta.parts] + [meta.items] != [0, *ends]
    ):
        raise UserError(
            f"the parts do not make up the domain's {domain.manifest.items} items", where=path, remedy=again
        )
    table = FeatureTable(folder, meta, kept or MappedParts())
    if isinstance(folder, RemotePath):
        assert len(table.files) == len(meta.parts)
    else:
        for part in meta.parts:
            _check_part(folder, meta, part, again)
    return table


def _before_appends(meta: FeatureMeta, domain: Domain) -> FeatureMeta | None:
    """The part of a later table that a domain has, which is opened as it was before appends; None of any other."""
    later = read_manifest(domain.folder)
    grown = domain.fingerprint in later.ancestors and meta.fingerprint in (later.fingerprint, *later.ancestors)
    if not grown or meta.items < domain.manifest.items:
        return None
    parts = [part for part in meta.parts if part.first < domain.manifest.items]
    known = {"fingerprint": domain.fingerprint, "items": domain.manifest.items}
    return meta.model_copy(update={**known, "parts": parts, "present": sum(part.present for part in parts)})


def _read_meta(path: Place, again: str) -> FeatureMeta:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        meta = FeatureMeta.model_validate(content)
    except (ValidationError, ValueError, RecursionError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"not a description of a feature table ({first})", where=path, remedy=again) from None
    if meta.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"feature table of schema version {meta.schema_version}; this antdist reads {SCHEMA_VERSION}",
            where=path,
            remedy=again,
        )
    return meta


def _check_part(folder: Path, meta: FeatureMeta, part: TablePart, again: str) -> None:
    for name, size in ((f"{part.name}.npy", part.bytes), (f"{part.name}.present.npy", part.present_bytes)):
        file = folder / name
        if not file.is_file():
            raise UserError("this part of the feature table is missing", where=file, remedy=again)
        if file.stat().st_size != size:
            raise UserError(
                f"this part of the feature table has {file.stat().st_size} bytes where {size} were written",
                where=file,
                remedy=again,
            )
    for name, shape, dtype in (
        (f"{part.name}.npy", (part.items, meta.dim), meta.dtype),
        (f"{part.name}.present.npy", (part.items,), "bool"),
    ):
        check_array(map_file(folder / name, again), shape, dtype, folder / name, again)


def _advice(folder: Place, modality: str) -> str:
    return f"run `antdist featurize {folder} --{modality} ENCODER`"


# ---------------------------------------------------------------------------------------------------- catalogue


class Catalogue:
    """The items of one or several domains under global ids: a domain's offset + the item's index in it.

    Args:
        domains: in the order that gives the offsets.
        modalities: which features to look up.
        dtype: `float16` rounds what is looked up (the reference's features were); values are handed out as float32.
        dims, identities: of the model that will read the features, by modality, where there is one already. Tables
            must then match them, and a modality that no domain has is zeros of that dimension, instead of refused.

    A domain without a table for a modality counts as missing there only if none of its items has it in the source.

    Raises:
        UserError: what `open_table` raises; tables of different encoders (law: features must be comparable), saying
            which domain has which, or of another dimension than `dims`; a modality that no domain has; more parts than
            the system lets a process map.
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
        self._kept = MappedParts()
        for modality in self.modalities:
            tables = [open_optional_table(domain, modality, self._kept) for domain in domains]
            filled = [(d, t) for d, t in zip(domains, tables, strict=True) if t is not None and t.meta.present]
            wanted = (identities or {}).get(modality)
            _refuse_mixture(modality, filled, wanted)
            if filled:
                self.dims[modality] = _refuse_dim(filled[0], (dims or {}).get(modality))
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
        """Look up N items by global id: float32 tensors on the CPU. One gather a modality a part; of sorted ids, with no
        copy but that from the memory map to the tensor."""
        import torch

        item_ids = np.asarray(item_ids, dtype=np.int64)
        assert item_ids.ndim == 1
        assert not len(item_ids) or (item_ids.min() >= 0 and item_ids.max() < self.size), "item id out of range"
        groups = list(_groups(item_ids, self.offsets))
        values: dict[str, torch.Tensor] = {}
        present: dict[str, torch.Tensor] = {}
        for modality in self.modalities:
            rows, mask = self._gather(modality, item_ids, groups)
            values[modality], present[modality] = torch.from_numpy(rows), torch.from_numpy(mask)
        return ItemInputs(values, present, torch.from_numpy(item_ids.copy()))

    def reserve_cache(self, reserved: int | None = None) -> None:
        """Keep no more of remote tables in the node's cache than leaves `reserved` bytes of it (None: a quarter) to others.
        Raises UserError: more parts would stay mapped than the system allows."""
        remote = self.remote_tables()
        if remote:
            cache = remote[0].folder.cache  # type: ignore[union-attr]
            self._kept.limit = mapping_budget(cache, sum(table.bytes for table in remote), reserved)
        raise_limits(sum(len(table.meta.parts) for table in self._staying_tables()))

    def remote_tables(self) -> list[FeatureTable]:
        """Those that are not on this machine."""
        return [table for table in self._all_tables() if isinstance(table.folder, RemotePath)]

    def _staying_tables(self) -> list[FeatureTable]:
        """Those of which every part may stay mapped."""
        if sum(table.bytes for table in self.remote_tables()) <= self._kept.limit:
            return self._all_tables()
        return [table for table in self._all_tables() if not isinstance(table.folder, RemotePath)]

    def verify(self) -> int:
        """Read every table in full (`FeatureTable.verify`); returns how many bytes that were."""
        for table in self._all_tables():
            table.verify()
        return sum(table.bytes for table in self._all_tables())

    def verify_share(self, share: int, shares: int) -> None:
        """Read every `shares`-th part, from number `share` on, for its digest; those of remote tables come to the node's
        cache by that, if all may stay there. Raises UserError naming the part at fault."""
        parts = [(table, part) for table in self._staying_tables() for part in table.meta.parts]
        for table, part in parts[share % shares :: shares]:
            table.verify_part(part)

    def _all_tables(self) -> list[FeatureTable]:
        return [table for tables in self._tables.values() for table in tables if table is not None]

    def means(self, chunk: int = 65536) -> dict[str, torch.Tensor]:
        """The mean feature (d_m,) of each modality over the items that have it."""
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
            _round_to_float16(rows)
        return rows, mask


def _refuse_dim(filled: tuple[Domain, FeatureTable], wanted: int | None) -> int:
    domain, table = filled
    if wanted is not None and table.meta.dim != wanted:
        raise UserError(
            f"the model reads {table.modality} features of dimension {wanted}, {domain.name} has {table.meta.dim}",
            where=domain.folder,
            remedy="featurize the domain with the encoder that the model was trained with",
        )
    return table.meta.dim


def open_optional_table(domain: Domain, modality: str, kept: MappedParts | None = None) -> FeatureTable | None:
    """The feature table of a domain; None if it has none and needs none, as no item has the modality in the source.

    Raises:
        UserError: what `open_table` raises.
    """
    if has_table(domain, modality) or source_has_modality(domain, modality):
        return open_table(domain, modality, kept)
    return None


def _refuse_mixture(modality: str, tables: Sequence[tuple[Domain, FeatureTable]], wanted: str | None) -> None:
    made = {domain.name: table.meta for domain, table in tables}
    different = {meta.identity for meta in made.values()} | ({wanted} if wanted is not None and made else set())
    if len(different) < 2:
        return
    by_domain = "; ".join(f"{name} has {meta.encoder_name} ({meta.identity})" for name, meta in made.items())
    model = f"; the model was trained on ({wanted})" if wanted is not None else ""
    raise UserError(
        f"{modality} features of different encoders cannot be mixed: {by_domain}{model}",
        where="features",
        remedy=f"run `antdist featurize` on all of them with the same --{modality} encoder and options, in one call",
    )
