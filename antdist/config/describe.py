"""What `antdist config` prints: the resolved configuration, its differences from another, a JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from antdist.config.load import check_config, is_relearn, read_tree, to_yaml
from antdist.config.schema import PretrainConfig, RelearnConfig, Resume
from antdist.config.semantics import differences, meanings, resume_of
from antdist.errors import UserError

Run = PretrainConfig | RelearnConfig
Tree = dict[str, Any]
ON_RESUME: dict[Resume, str] = {
    "free": "allowed",
    "longer_ok": "allowed",
    "gentler_ok": "after divergence",
    "fixed": "refused",
}


def tree_of(config: BaseModel) -> Tree:
    """Return a configuration as nested dictionaries with the keys of YAML."""
    return config.model_dump(by_alias=True)


def annotated_yaml(config: Run) -> list[str]:
    """Return the resolved configuration as lines of YAML; a comment marks each value that is not the default."""
    changed = differences(type(config), tree_of(type(config)()), tree_of(config))
    return list(_annotated(tree_of(config), changed, ""))


def _annotated(tree: Tree, changed: dict[str, tuple[Any, Any]], prefix: str, indent: str = "") -> list[str]:
    lines = []
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, dict) and value and key not in changed:
            lines += [f"{indent}{name}:", *_annotated(value, changed, f"{key}.", f"{indent}  ")]
            continue
        mark = f"  # default: {to_yaml(changed[key][0], flow=True)}" if key in changed else ""
        lines.append(f"{indent}{name}: {to_yaml(value, flow=True)}{mark}")
    return lines


def read_other(place: Path, kind: type[Run]) -> Tree:
    """Read the configuration of a run folder (its config.yaml) or of a YAML file, with defaults where it is valid today.

    Raises:
        UserError: nothing readable here; a configuration of the other kind.
    """
    file = place / "config.yaml" if place.is_dir() else place
    return complete(read_tree(file, "name a run's folder or a YAML file"), kind, file)


def complete(tree: Tree, kind: type[Run], where: object) -> Tree:
    """Return a tree with the defaults of `kind`; as it is if an earlier version wrote keys that are now unknown.

    Raises:
        UserError: a configuration of the other kind.
    """
    other = RelearnConfig if is_relearn(tree) else PretrainConfig
    if other is not kind:
        names = {PretrainConfig: "pre-training", RelearnConfig: "re-learning"}
        raise UserError(
            f"is the configuration of a {names[other]}, to be compared with one of a {names[kind]}",
            where=where,
            remedy="compare runs of one kind; a configuration with a target or strategy is one of a re-learning",
        )
    try:
        return tree_of(check_config(kind, tree))
    except UserError:
        return tree


def difference_rows(kind: type[Run], there: Tree, here: Tree, source: str) -> list[tuple[str, ...]]:
    """Return a header and a row per key that differs: both values, and what the change means on resume and in comparison."""
    compares = kind is RelearnConfig
    known = meanings(kind)
    rows = [("key", source, "here", "on resume", *(["compared trials"] if compares else []))]
    for key, values in differences(kind, there, here).items():
        resume = resume_of(kind, key)
        allowed = "refused" if compares and resume != "free" else ON_RESUME[resume]
        compared = "must agree" if key in known and known[key].compare else "may differ"
        shown = (to_yaml(value, flow=True) for value in values)
        rows.append((key, *shown, allowed, *([compared] if compares else [])))
    return rows


def json_schema(kind: type[BaseModel]) -> Tree:
    """Return the JSON Schema of a configuration file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema(by_alias=True)}
