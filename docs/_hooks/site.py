"""MkDocs hooks: reference pages generated from the code, and links that hold both in the repository and on the site.

Generated at build and never committed: the CLI reference (click), the configuration reference (pydantic), a page of the Python
API for each room (docstrings, by mkdocstrings). Documents that live elsewhere in the repository become pages, too.
"""

from __future__ import annotations

import inspect
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from antdist.cli import main as cli_package
from antdist.config.schema import Meaning, PretrainConfig, RelearnConfig
from antdist.config.semantics import meanings

REPOSITORY = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
FENCE = re.compile(r"^\s*(```|~~~)")
# documents that stay beside what they describe: path in the repository, page of the site
INCLUDED = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    "examples/README.md": "examples.md",
    "cluster/README.md": "clusters/start.md",
    "cluster/docker/README.md": "clusters/docker.md",
    "cluster/kuberay/README.md": "clusters/kuberay.md",
    "cluster/mlflow/README.md": "clusters/mlflow.md",
    "cluster/ray-up/README.md": "clusters/ray-up.md",
    "cluster/slurm/README.md": "clusters/slurm.md",
}
PICTURES = "benchmarks/pictures"
LEGEND = (
    "What a change of a key means for a run stands with the key:",
    "",
    "- `resume`: when a run of a name may continue with another value: `free` always; `longer_ok` a pre-training may;",
    "  `gentler_ok` a pre-training may after its loss diverged; `fixed` never.",
    "- `compared`: trials of two strategies must agree in it, so that their difference is due to the strategy.",
    "- `continue: fixed`: a run that begins with `continue=MODEL` must have MODEL's value.",
)

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated, and what lies outside `docs/`."""
    for source, page in INCLUDED.items():
        content = (REPOSITORY / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content + (examples() if page == "examples.md" else "")))
    for picture in sorted((REPOSITORY / PICTURES).glob("*.svg")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/configuration.md", content=configuration_page()))
    for room, content in python_pages().items():
        files.append(File.generated(config, f"reference/python/{room}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files of the repository: to the page that a file has become, else to its bare text.

    A link to a file that does not exist is a warning, so an error in strict mode.
    """
    here = page.file.src_uri
    source = next((path for path, uri in INCLUDED.items() if uri == here), f"docs/{here}")

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, hash_mark, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return match.group()
        repository_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        uri = _site_uri(repository_path)
        if files.get_file_from_path(uri) is not None:
            return f"{text}({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{hash_mark}{anchor})"
        if (REPOSITORY / repository_path).exists():
            return text.removeprefix("!")[1:-1]
        log.warning("%s: link to %s, which is neither a page nor a file of the repository", source, target)
        return match.group()

    lines, fenced = [], False
    for line in markdown.split("\n"):
        if FENCE.match(line):
            fenced = not fenced
        lines.append(line if fenced else LINK.sub(rewrite, line))
    return "\n".join(lines)


def _site_uri(repository_path: str) -> str:
    """The page of a file of the repository."""
    if repository_path.startswith(f"{PICTURES}/"):
        return f"pictures/{posixpath.basename(repository_path)}"
    return INCLUDED.get(repository_path, repository_path.removeprefix("docs/"))


def examples() -> str:
    """The sources of the examples, to be read on their page."""
    languages = {".sh": "bash", ".py": "python"}
    sources = [path for path in sorted((REPOSITORY / "examples").iterdir()) if path.suffix in languages]
    return "".join(f"\n## {path.name}\n\n```{languages[path.suffix]}\n{path.read_text()}```\n" for path in sources)


# -- the command line ------------------------------------------------------------------------------------------------


def cli_page() -> str:
    """Every verb with its usage, arguments and options, as `--help` prints them."""
    group = cli_package.cli
    lines = ["# Command line", "", "Generated from `antdist --help` and the help of each verb.", ""]
    with click.Context(group, info_name="antdist") as context:
        lines += _help_text(group.help or "")
        lines += _verbs(group, context)
    return "\n".join(lines)


def _verbs(group: click.Group, context: click.Context) -> list[str]:
    """The verbs of a group in the order of the flow, those of its groups after it."""
    lines: list[str] = []
    for name, command in group.commands.items():
        if not command.hidden:
            inner = click.Context(command, info_name=name, parent=context)
            lines += _verb(command, inner)
            lines += _verbs(command, inner) if isinstance(command, click.Group) else []
    return lines


def _verb(command: click.Command, context: click.Context) -> list[str]:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## {context.command_path}", "", *_help_text(command.help or ""), "```text", usage, "```", ""]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "help" not in parameter.opts[0]:
            names, description = record
            lines.append(f"- `{names}`" + (f": {_plain(description)}" if description else ""))
    return [*lines, ""]


def _help_text(text: str) -> list[str]:
    """A docstring of click as Markdown: paragraphs that it must not wrap (`\\b`) become code."""
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("\b"):
            head, *rest = paragraph.removeprefix("\b").strip("\n").split("\n")
            lines += [head, "", "```text", *inspect.cleandoc("\n".join(rest)).split("\n"), "```", ""]
        else:
            lines += [_plain(paragraph), ""]
    return lines


def _plain(text: str) -> str:
    """One line, with what Markdown would read as HTML or as a link escaped."""
    return re.sub(r"([\[\]*_])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


# -- configuration ---------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every key of both configurations: type, default, meaning, and what else its field declares."""
    kinds: dict[str, type[BaseModel]] = {"pretrain": PretrainConfig, "relearn": RelearnConfig}
    keys: dict[str, dict[str, dict[str, Any]]] = {}  # section, key, verb: the key's schema
    about: dict[str, str] = {}
    for verb, kind in kinds.items():
        schema = kind.model_json_schema(by_alias=True)
        _collect(
            schema, schema.get("$defs", {}), "", kind.model_construct().model_dump(by_alias=True), verb, keys, about
        )
    lines = [
        "# Configuration",
        "",
        "Generated from the schema in [antdist/config/schema.py](../../antdist/config/schema.py).",
    ]
    lines += [
        "How a configuration is written and overridden: [Configuration files](../configuration.md).",
        "",
        *LEGEND,
        "",
    ]
    stated = {verb: meanings(kind) for verb, kind in kinds.items()}
    for section, entries in keys.items():
        lines += [f"## {section or 'Top level'}", "", *([_plain(about[section]), ""] if section in about else [])]
        lines += [_key_line(key, verbs, stated[next(iter(verbs))][key]) for key, verbs in entries.items()]
        lines.append("")
    return "\n".join(lines)


def _collect(
    schema: dict[str, Any],
    definitions: dict[str, Any],
    section: str,
    defaults: dict[str, Any],
    verb: str,
    keys: dict[str, dict[str, Any]],
    about: dict[str, str],
) -> None:
    if section:  # of the adaptation's subclasses the second verb's text says the difference alone
        about.setdefault(section, schema.get("description", ""))
    for name, entry in schema["properties"].items():
        reference = entry.get("$ref") or next((part["$ref"] for part in entry.get("allOf", ()) if "$ref" in part), None)
        if reference is not None:
            part = definitions[reference.rpartition("/")[2]]
            inner = f"{section}.{name}" if section else name
            _collect(part, definitions, inner, defaults[name], verb, keys, about)
        else:
            verbs = keys.setdefault(section, {}).setdefault(f"{section}.{name}" if section else name, {})
            verbs[verb] = entry | {"default": defaults[name]}


def _key_line(key: str, verbs: dict[str, dict[str, Any]], meaning: Meaning) -> str:
    first, *others = verbs.values()
    default = f"default `{_value(first['default'])}`"
    if others and others[0]["default"] != first["default"]:
        default += f", of `relearn` `{_value(others[0]['default'])}`"
    facts = [_type_name(first), default, *([f"`{next(iter(verbs))}` only"] if not others else [])]
    facts += [f"resume: {meaning.resume}", *(["compared"] if meaning.compare else [])]
    facts += ["continue: fixed"] if meaning.continued == "fixed" else []
    description = _plain(first.get("description", "")).rstrip(".")
    return f"- **`{key}`** ({'; '.join(facts)})" + (f": {description}." if description else ".")


def _value(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, list | dict):
        return str(value).replace("'", "")
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_type_name(part) for part in schema["anyOf"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type_name(schema['items'])}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = ", ".join(f"{words} {schema[name]:g}" for name, words in bounds.items() if name in schema)
    name = {"null": "null", "string": "text", "object": "mapping", "number": "number", "integer": "integer"}.get(
        kind, kind
    )
    return f"{name} {limits}".strip()


# -- Python ----------------------------------------------------------------------------------------------------------


def python_pages() -> dict[str, str]:
    """A page for each room of the package, with its modules' public members."""
    package = REPOSITORY / "antdist"
    modules = sorted(path.relative_to(REPOSITORY).with_suffix("") for path in package.rglob("*.py"))
    rooms: dict[str, list[str]] = {}
    for path in modules:
        if path.name.startswith("__"):
            continue
        room = path.parts[1] if len(path.parts) > 2 else ("api" if path.name == "api" else "antdist")
        rooms.setdefault(room, []).append(".".join(path.parts))
    pages = {
        room: f"# {_room_title(room)}\n\n" + "\n".join(f"::: {name}\n" for name in names)
        for room, names in rooms.items()
    }
    index = "\n".join(f"- [{_room_title(room)}]({room}.md)" for room in sorted(pages))
    return {"index": f"# Python\n\nGenerated from the docstrings, a page for each room.\n\n{index}\n", **pages}


def _room_title(room: str) -> str:
    return {"antdist": "antdist (modules shared by all rooms)", "api": "antdist.api"}.get(room, f"antdist.{room}")
