"""Derive from the `Meaning` of each key which keys may differ on a resume, in a comparison, on `continue=`, in adaptation."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pydantic import BaseModel

from antdist.config.schema import Meaning, ModelConfig, RelearnConfig, Resume


def section_of(kind: type[BaseModel], key: str) -> type[BaseModel] | None:
    """Return the class of a key that is a section; None for a key that holds a value, or is unknown."""
    head, _, rest = key.partition(".")
    for name, field in kind.model_fields.items():
        if head == (field.alias or name) and isinstance(field.annotation, type):
            section = field.annotation if issubclass(field.annotation, BaseModel) else None
            return section if section is None or not rest else section_of(section, rest)
    return None


def meanings(kind: type[BaseModel], prefix: str = "") -> dict[str, Meaning]:
    """Return the meaning of each key that holds a value, by dotted key. Raises TypeError for a key without one."""
    found: dict[str, Meaning] = {}
    for name, field in kind.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= meanings(field.annotation, f"{key}.")
            continue
        stated = [item for item in field.metadata if isinstance(item, Meaning)]
        if len(stated) != 1:
            raise TypeError(f"{kind.__name__}.{name} must state one Meaning, not {len(stated)}")
        found[key] = stated[0]
    return found


def differences(kind: type[BaseModel], there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each key in which two configurations (nested, by alias) differ, by dotted key in order.

    Keys that the schema lacks, as in a file of another version, are compared too.
    """
    return dict(_differences(kind, there, here, ""))


def _differences(
    kind: type[BaseModel], there: dict[str, Any], here: dict[str, Any], prefix: str
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name in sorted(there.keys() | here.keys()):
        old, new, key = there.get(name), here.get(name), prefix + name
        if section_of(kind, key) is not None and isinstance(old or {}, dict) and isinstance(new or {}, dict):
            yield from _differences(kind, old or {}, new or {}, f"{key}.")
        elif old != new:
            yield key, (old, new)


def resume_of(kind: type[BaseModel], key: str) -> Resume:
    """Return when a run may go on with another value of `key`; an unknown key has the meaning of its section, else fixed."""
    known = meanings(kind)
    if key in known:
        return known[key].resume
    section = key.rpartition(".")[0]
    inside = {meaning.resume for name, meaning in known.items() if section and name.startswith(f"{section}.")}
    return inside.pop() if len(inside) == 1 else "fixed"


def resume_changes(kind: type[BaseModel], there: dict[str, Any], here: dict[str, Any]) -> dict[str, tuple[Resume, str]]:
    """Return how `here` differs from `there` in keys that are not free: when a run may go on so, and the change in words."""
    return {
        key: (resume, f"{key} was {old!r}, is {new!r}")
        for key, (old, new) in differences(kind, there, here).items()
        if (resume := resume_of(kind, key)) != "free"
    }


def comparable(config: RelearnConfig) -> dict[str, Any]:
    """Return the values, nested, in which the trials of two strategies must agree."""
    return _selected(config.model_dump(by_alias=True), {k for k, m in meanings(RelearnConfig).items() if m.compare}, "")


def _selected(tree: dict[str, Any], keys: Collection[str], prefix: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for name, value in tree.items():
        key = prefix + name
        if key in keys:
            chosen[name] = value
        elif isinstance(value, dict) and (inside := _selected(value, keys, f"{key}.")):
            chosen[name] = inside
    return chosen


def architecture() -> list[str]:
    """Return the keys of `model` that `continue=MODEL` may not change."""
    return [key for key, meaning in meanings(ModelConfig).items() if meaning.continued == "fixed"]


def defining(group: str) -> list[str]:
    """Return the keys of `model` that must equal the parent's where the parameter group is inherited."""
    return [key for key, meaning in meanings(ModelConfig).items() if group in meaning.defines]
