"""Load a YAML file and dotted overrides into a checked configuration; errors name the key and the nearest known one."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from antdist.errors import UserError

Config = TypeVar("Config", bound=BaseModel)
FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Read 1e-3 as a number, which YAML 1.1 reads as text, and refuse a duplicate key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quote text that `_Loader` would read as a number."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def load_config(kind: type[Config], file: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `file` (None: all defaults), apply `key.sub=value` overrides, check.

    Raises UserError: missing file, no YAML, unknown key, wrong type, contradicting values.
    """
    tree = read_tree(file) if file is not None else {}
    return resolve_config(kind, tree, overrides, str(file) if file is not None else "configuration")


def resolve_config(
    kind: type[Config], tree: dict[str, Any], overrides: Sequence[str] = (), where: str = "configuration"
) -> Config:
    """Apply `key.sub=value` overrides to nested dictionaries, and check. Raises UserError as `load_config`."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _set(tree, override)
    return check_config(kind, tree, where)


def check_config(kind: type[Config], tree: dict[str, Any], where: str = "configuration") -> Config:
    """Build `kind` from nested dictionaries. Raises UserError that names the first wrong key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise _to_user_error(kind, error, where) from None


def dump_config(config: BaseModel, *, defaults: bool = True) -> str:
    """Return the resolved configuration as YAML; without `defaults`, only the keys that were set."""
    return to_yaml(config.model_dump(by_alias=True, exclude_unset=not defaults))


def to_yaml(value: Any, flow: bool = False) -> str:
    """Return a value as YAML that `load_config` reads back; with `flow` on one line."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=math.inf if flow else 80)
    return text.removesuffix("...\n").rstrip("\n") if flow else text


def read_tree(file: Path, remedy: str = "give --config the path of a YAML file") -> dict[str, Any]:
    """Read a configuration file as nested dictionaries. Raises UserError: no such file, not YAML, not a mapping."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError("no such file", where=file, remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read ({error})", where=file) from None
    return parse_tree(text, file)


def _parse(text: str) -> Any:
    """Parse YAML to plain values. Raises yaml.YAMLError, also where PyYAML's constructors fail (`!!int x`)."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise yaml.MarkedYAMLError(problem=f"a value cannot be read ({type(error).__name__})") from None


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError("not of the form key=value", where=override, remedy="write for example training.epochs=10")
    try:
        value = _parse(text) if text else None
    except yaml.YAMLError as error:
        raise UserError(
            f"the value is not valid YAML: {getattr(error, 'problem', None) or 'malformed'}",
            where=override,
            remedy="quote a text that holds YAML's signs",
        ) from None
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{parent} holds a value, not keys", where=override)
        node = child
    node[last] = value


def _to_user_error(kind: type[BaseModel], error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"] if "[" not in str(part)]  # the keys, without the member of a union
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = known_keys(kind)
        siblings = [k for k in known if k.rpartition(".")[0] == ".".join(path[:-1])]
        elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.8) or elsewhere
        remedy = f"did you mean {near[0]}" if near else f"known keys here: {', '.join(sorted(siblings))}"
        return UserError(f"unknown key {key}", where=where, remedy=remedy)
    given = first.get("input")
    if first["type"] == "model_type":
        section = [k for k in known_keys(kind) if k.rpartition(".")[0] == key]
        return UserError(
            f"{key} is a section of keys, not {given!r}", where=where, remedy=f"give its keys: {', '.join(section)}"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = (
        f", not {given!r}"
        if isinstance(given, str | int | float | bool | None) and first["type"] != "value_error"
        else ""
    )
    return UserError(f"{key + ': ' if key else ''}{message[0].lower()}{message[1:]}{shown}", where=where)


def known_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return all dotted keys of a configuration class."""
    keys: list[str] = []
    for name, entry in kind.model_fields.items():
        key = prefix + (entry.alias or name)
        keys.append(key)
        if isinstance(entry.annotation, type) and issubclass(entry.annotation, BaseModel):
            keys.extend(known_keys(entry.annotation, f"{key}."))
    return keys


def names_target(file: Path | None, overrides: Sequence[str]) -> bool:
    """Return whether a configuration names a target or a strategy. Raises UserError as `load_config`."""
    tree = read_tree(file) if file is not None else {}
    for override in overrides:
        _set(tree, override)
    return is_relearn(tree)


def is_relearn(tree: dict[str, Any]) -> bool:
    """Return whether the keys of a configuration are those of re-learning."""
    return not tree.keys().isdisjoint({"target", "strategy", "from", "seeds"})


def parse_tree(text: str, where: object) -> dict[str, Any]:
    """Read the text of a configuration file. Raises UserError: not YAML, not a mapping."""
    try:
        tree = _parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "malformed"
        raise UserError(f"not valid YAML: {problem}", where=f"{where}{line}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError("a configuration is a mapping of keys to values", where=where)
    return tree
