"""One feature table: a domain's features in one modality, memory-mapped, read by item index.

`DATA/NAME/features/<modality>.json` (the meta file) describes the encoder and lists the parts. Part k holds the items of
item shard k: `<modality>-00000.npy` (n, dim) and `<modality>-00000.present.npy` (n,) bool. The meta file is written last:
a table exists when it does. If no item has the modality, the table has no parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from antdist.batch import IntArray
from antdist.data.entries import File
from antdist.data.manifest import read_manifest
from antdist.data.places import PARALLEL_FETCHES, Place, RemotePath
from antdist.errors import UserError
from antdist.features.gather import group_by_range, take_rows
from antdist.features.parts import MappedParts, check_array, map_file
from antdist.io.files import file_sha256, write_atomically, write_json, writer_suffix

if TYPE_CHECKING:
    from antdist.data.domain import Domain

SCHEMA_VERSION = 1
VERIFIED_ROWS = 65536  # checked together

Dtype = Literal["float32", "float16"]
PartName = Annotated[str, StringConstraints(pattern=r"^(text|image|price)-[0-9]{5,9}$")]


class TablePart(BaseModel):
    """The rows of one item shard, in `name.npy` and `name.present.npy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: PartName
    first: int
    items: int
    present: int  # items that have the modality
    bytes: int
    sha256: str
    present_bytes: int
    present_sha256: str


def _part_files(part: TablePart) -> tuple[File, File]:
    """Return the manifest entries of a part's rows and of its presence."""
    rows = File(name=f"{part.name}.npy", bytes=part.bytes, sha256=part.sha256)
    return rows, File(name=f"{part.name}.present.npy", bytes=part.present_bytes, sha256=part.present_sha256)


class FeatureMeta(BaseModel):
    """The meta file of a feature table: its encoder and its parts.

    `encoder` holds `name` (for display) and everything that shapes the features: digest, pooling, max_length, scale ...
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
    broken: int = 0  # images that could not be decoded
    parts: list[TablePart]

    @property
    def identity(self) -> str:
        """Identify the encoder; tables of equal identity may be mixed, whatever their name and stored type."""
        return encoder_identity(self.modality, self.encoder, self.dim)

    @property
    def encoder_name(self) -> str:
        return str(self.encoder.get("name", "?"))


def encoder_identity(modality: str, encoder: Mapping[str, str | int | float | None], dim: int) -> str:
    """Identify an encoder in one line without its name, e.g. `text dim=384 digest=0f3c... pooling=mean`."""
    shown = {key: value for key, value in encoder.items() if key != "name"} | {"dim": dim}
    if isinstance(shown.get("digest"), str):
        shown["digest"] = str(shown["digest"])[:16]
    return " ".join([modality, *(f"{key}={shown[key]}" for key in sorted(shown))])


# ------------------------------------------------------------------------------------------------------ writing


def features_folder(domain: Domain) -> Place:
    return domain.folder / "features"


def write_part(
    folder: Path, modality: str, number: int, *, first: int, values: NDArray[Any], present: NDArray[np.bool_]
) -> TablePart:
    """Write one part atomically, file by file, and return its entry for the meta file.

    Args:
        number: of the part, which is that of its item shard.
        first: index of its first item in the domain.
        values: (n, dim) features.
        present: (n,) whether each item has the modality.
    """
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
    with write_atomically(path, suffix=writer_suffix()) as temporary:
        with temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        return temporary.stat().st_size, file_sha256(temporary)


def write_meta(folder: Path, meta: FeatureMeta) -> None:
    write_json(folder / f"{meta.modality}.json", meta.model_dump())


def is_part_intact(folder: Path, part: TablePart) -> bool:
    """Return whether both files of a part have their recorded size and digest."""
    expected = {
        f"{part.name}.npy": (part.bytes, part.sha256),
        f"{part.name}.present.npy": (part.present_bytes, part.present_sha256),
    }
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size and file_sha256(folder / name) == digest
        for name, (size, digest) in expected.items()
    )


# ------------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True)
class FeatureTable:
    """One modality of one domain, memory-mapped, so that all processes of a node share its pages.

    `mapped` holds the parts of a remote table that this process has mapped.
    """

    folder: Place
    meta: FeatureMeta
    mapped: MappedParts = field(default_factory=MappedParts, compare=False)

    @property
    def modality(self) -> str:
        return self.meta.modality

    @cached_property
    def _bounds(self) -> IntArray:
        return np.array([part.first for part in self.meta.parts] + [self.meta.items], dtype=np.int64)

    @cached_property
    def files(self) -> list[tuple[File, File]]:
        """The files of each part: rows and presence. Raises UserError if a name or digest is malformed."""
        try:
            return [_part_files(part) for part in self.meta.parts]
        except ValidationError as error:
            what = f"is not the meta file of a feature table ({str(error).splitlines()[0]})"
            raise UserError(what, where=self.folder / f"{self.modality}.json", remedy=self._again) from None

    @property
    def bytes(self) -> int:
        return sum(part.bytes + part.present_bytes for part in self.meta.parts)

    @cached_property
    def _parts(self) -> list[NDArray[Any]]:
        assert not isinstance(self.folder, RemotePath)
        return [map_file(self.folder / f"{part.name}.npy", self._again) for part in self.meta.parts]

    def _arrays(self, numbers: Sequence[int]) -> Iterator[NDArray[Any]]:
        """Give the rows of parts by their numbers; remote parts are fetched several at a time."""
        if not isinstance(self.folder, RemotePath):
            yield from (self._parts[number] for number in numbers)
            return
        for first in range(0, len(numbers), PARALLEL_FETCHES):
            files = [self.files[number][0] for number in numbers[first : first + PARALLEL_FETCHES]]
            self.folder.fetch([file for file in files if file not in self.mapped])
            for number, file in zip(numbers[first : first + PARALLEL_FETCHES], files, strict=True):
                shape = (self.meta.parts[number].items, self.meta.dim)
                yield self.mapped.array(self.folder, file, shape, self.meta.dtype, self._again)

    @property
    def _again(self) -> str:
        return _advice(self.folder.parent, self.modality)

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Whether each item has the modality, (items,) bool, in memory."""
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
        """Return features (n, dim), in the stored type, and presence (n,) of items by index in the domain."""
        values: NDArray[Any] = np.empty((len(indices), self.meta.dim), dtype=self.meta.dtype)
        self.read(indices, values)
        return values, self.present[indices]

    def read(self, indices: IntArray, into: NDArray[Any]) -> None:
        """Copy features of items by domain index into `into` (n, dim), of the stored type or float32."""
        if not self.meta.parts:
            into[...] = 0
            return
        groups = list(group_by_range(indices, self._bounds))
        for (number, chosen), part in zip(groups, self._arrays([n for n, _ in groups]), strict=True):
            local = indices[chosen] - self._bounds[number]
            if isinstance(chosen, slice):
                take_rows(part, local, into[chosen])
            else:
                into[chosen] = part[local]

    def verify(self) -> None:
        """Check sizes and digests of all parts, and that no feature is NaN or Inf.

        Of a remote table the sizes alone are checked: digests are checked when parts are fetched.

        Raises:
            UserError: naming the part at fault.
        """
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
                    what = f"the features of item {part.first + first + bad[0]} are NaN or Inf"
                    raise UserError(what, where=file, remedy=self._again)

    def verify_part(self, part: TablePart) -> None:
        """Check a part's size and digest; a remote part is fetched into the cache. Raises UserError."""
        if isinstance(self.folder, RemotePath):
            self.folder.fetch(_part_files(part))
        elif not is_part_intact(self.folder, part):
            what = "this part of the feature table is damaged: its size or digest differs from the recorded one"
            raise UserError(what, where=self.folder / f"{part.name}.npy", remedy=self._again)


def has_table(domain: Domain, modality: str) -> bool:
    return (features_folder(domain) / f"{modality}.json").is_file()


def open_table(domain: Domain, modality: str, mapped: MappedParts | None = None) -> FeatureTable:
    """Open the feature table of a domain, checking sizes and shapes but no digests.

    Of a remote table everything is checked when its parts are fetched.

    Raises:
        UserError: there is no table, its meta file is malformed, it was made for another manifest (that of an ancestor
            with the same items is accepted), or a part is missing, truncated or of another shape.
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
            f"the {modality} features of domain {domain.name} lack {domain.manifest.items - meta.items} appended items",
            where=path,
            remedy=f"{again} with the same options: only those are encoded",
        )
    ends = [part.first + part.items for part in meta.parts]
    if meta.items != domain.manifest.items or (
        meta.parts and [part.first for part in meta.parts] + [meta.items] != [0, *ends]
    ):
        raise UserError(
            f"the parts do not add up to the domain's {domain.manifest.items} items", where=path, remedy=again
        )
    table = FeatureTable(folder, meta, mapped or MappedParts())
    if isinstance(folder, RemotePath):
        assert len(table.files) == len(meta.parts)
    else:
        for part in meta.parts:
            _check_part(folder, meta, part, again)
    return table


def _before_appends(meta: FeatureMeta, domain: Domain) -> FeatureMeta | None:
    """Restrict a table made after appends to the items of the domain before them; None if it is another."""
    later = read_manifest(domain.folder)
    is_later = domain.fingerprint in later.ancestors and meta.fingerprint in (later.fingerprint, *later.ancestors)
    if not is_later or meta.items < domain.manifest.items:
        return None
    parts = [part for part in meta.parts if part.first < domain.manifest.items]
    changes = {"fingerprint": domain.fingerprint, "items": domain.manifest.items, "parts": parts}
    return meta.model_copy(update={**changes, "present": sum(part.present for part in parts)})


def _read_meta(path: Place, again: str) -> FeatureMeta:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        meta = FeatureMeta.model_validate(content)
    except (ValidationError, ValueError, RecursionError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"is not the meta file of a feature table ({first})", where=path, remedy=again) from None
    if meta.schema_version != SCHEMA_VERSION:
        raise UserError(
            f"schema_version is {meta.schema_version}, this version of antdist reads {SCHEMA_VERSION}",
            where=path,
            remedy=again,
        )
    return meta


def _check_part(folder: Path, meta: FeatureMeta, part: TablePart, again: str) -> None:
    for name, size, shape, dtype in (
        (f"{part.name}.npy", part.bytes, (part.items, meta.dim), meta.dtype),
        (f"{part.name}.present.npy", part.present_bytes, (part.items,), "bool"),
    ):
        file = folder / name
        if not file.is_file():
            raise UserError("this part of the feature table is missing", where=file, remedy=again)
        if file.stat().st_size != size:
            what = f"this part of the feature table has {file.stat().st_size} bytes, expected {size}"
            raise UserError(what, where=file, remedy=again)
        check_array(map_file(file, again), shape, dtype, file, again)


def _advice(folder: Place, modality: str) -> str:
    return f"run `antdist featurize {folder} --{modality} ENCODER`"
