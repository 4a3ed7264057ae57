"""What `antdist submit` sends: an entry point, the configuration, the code. Checked as far as this machine can see; what it
cannot (data, features, stores) the job itself checks before it asks for workers."""

from __future__ import annotations

import functools
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

import antdist
from antdist.config.load import dump_config, load_config
from antdist.config.schema import PretrainConfig, RayConfig, RelearnConfig, TrackingConfig
from antdist.errors import UserError, redact
from antdist.io.storage import is_uri
from antdist.tracking.store import tracking_uri

CONFIG_FILE = "antdist-job.yaml"  # beside the code, in the job's copy
INSTALLED = "installed"
REGISTRY = ("models:/", "runs:/")
Run = TypeVar("Run", PretrainConfig, RelearnConfig)


@dataclass(frozen=True)
class Submission:
    """A job of one verb: `entrypoint` is a line for a shell, quoted; `metadata` is what the cluster lists of it, and all that
    it takes to submit it again."""

    entrypoint: str
    metadata: dict[str, str]
    ray: RayConfig

    def new_id(self) -> str:
        """Readable, and of letters that stand in a URL and a file's name."""
        words = "-".join(filter(None, (self.metadata["verb"], self.metadata["run"])))
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', words)[:60]}-{secrets.token_hex(3)}"


def read_submission(command: click.Command, arguments: Sequence[str], *, here: bool, code: str) -> Submission:
    """Read a verb's own arguments as the verb would.

    Args:
        here: for a Ray on this machine: relative paths are made absolute, elsewhere they are refused.
        code: the folder that holds the package to send, or `INSTALLED`.

    Raises:
        UserError: whatever a configuration alone shows; a path that the cluster cannot know; credentials, which the cluster
            would list; `--json`.
        click.UsageError: arguments that the verb does not take.
    """
    assert command.name is not None
    if any(argument.partition("=")[0] == "--json" for argument in arguments):
        raise UserError(
            "a job has no file of yours to write to", where="--json", remedy="read the figures with `antdist logs`"
        )
    context = command.make_context(command.name, list(arguments))
    if command.name in ("pretrain", "relearn"):
        kind: Any = PretrainConfig if command.name == "pretrain" else RelearnConfig
        config = settled(load_config(kind, context.params["config_file"], context.params["overrides"]), here)
        only = context.params.get("only")
        return submission_of(command.name, config, [f"--only={only}"] if only else [], here=here, code=code)
    metadata = {"verb": command.name, "run": "", "storage": "", "mlflow": "", "config": "", "code": code}
    argv = _argv(command, context, here)
    domains = context.params.get("domains") or [context.params["domain"]]
    metadata["run"] = ",".join(Path(domain).name for domain in domains)
    entrypoint = _entrypoint([command.name, *argv], here)
    _refuse_credentials(entrypoint)
    return Submission(entrypoint, metadata, RayConfig())


def submission_of(
    verb: str, config: PretrainConfig | RelearnConfig, arguments: Sequence[str], *, here: bool, code: str
) -> Submission:
    """Of a verb with a settled configuration, which goes along as a file.

    Raises:
        UserError: credentials, which the cluster would list.
    """
    run = config.name
    if isinstance(config, RelearnConfig):
        run += f"/{config.target}"
        if "--only=trial" in arguments and isinstance(config.strategy, str):
            run += f"/{config.strategy}-seed{config.seeds[0]}"  # below ray.storage, the trial's folder
    metadata = {
        "verb": verb,
        "run": run,
        "storage": config.ray.storage,
        "mlflow": redact(_store(config.tracking, config.ray.storage, here)),
        "config": dump_config(config, defaults=False),
        "code": code,
    }
    entrypoint = _entrypoint([verb, "--config", CONFIG_FILE, *arguments], here)
    _refuse_credentials(entrypoint, metadata["config"])
    return Submission(entrypoint, metadata, config.ray)


def _entrypoint(words: Sequence[str], here: bool) -> str:
    """For a shell, whose place it takes: the shell would die of a signal before its child, and where the container's first
    process reaps no orphans, Ray would wait for that child until the last."""
    return f"exec {shlex.join([sys.executable if here else 'python', '-m', 'antdist', *words])}"


def again(entrypoint: str, metadata: dict[str, str]) -> Submission:
    """The submission that a job came from, by what the cluster tells of it."""
    return Submission(
        entrypoint, {key: metadata[key] for key in ("verb", "run", "storage", "mlflow", "config", "code")}, RayConfig()
    )


def stage(submission: Submission, folder: Path) -> bool:
    """Put what the job takes along into an empty folder; whether that is anything.

    Raises:
        UserError: no package where the code is to come from.
    """
    code, config = submission.metadata["code"], submission.metadata["config"]
    if code != INSTALLED:
        package = Path(code) / "antdist"
        if not (package / "__init__.py").is_file():
            raise UserError(
                "no folder antdist with the package here",
                where=code,
                remedy="name the project's folder with --working-dir, or take the cluster's own installation: --installed",
            )
        shutil.copytree(package, folder / "antdist", ignore=shutil.ignore_patterns("__pycache__"))
    if config:
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    return bool(config) or code != INSTALLED


def own_code() -> str:
    """The folder that holds the package that runs here."""
    return str(Path(antdist.__file__).resolve().parents[1])


def settled(config: Run, here: bool) -> Run:
    """With absolute folders, and checked for all that the configuration alone tells. Raises UserError."""
    from antdist.runs.checks import check_settings
    from antdist.runs.context import map_paths

    check_settings(config)
    if config.ray.address is not None:
        raise UserError(
            "a job works on the cluster that it is submitted to",
            where="ray.address",
            remedy="remove it, and give --address",
        )
    return map_paths(config, functools.partial(_model, here=here))


def _place(key: str, path: str, here: bool) -> str:
    """An absolute path, or a URI. Raises UserError."""
    if is_uri(path) or Path(path).is_absolute():
        return path
    if here:
        return str(Path(path).resolve())
    raise UserError(
        f"{path!r} would be looked for in the job's passing copy of the code",
        where=key,
        remedy="give an absolute path that the cluster's nodes know",
    )


def _model(key: str, model: str, here: bool) -> str:
    return model if model.startswith(REGISTRY) else _place(key, model, here)


def _store(config: TrackingConfig, storage: str, here: bool) -> str:
    """The tracking store as far as it is known: the cluster's environment may name one."""
    return tracking_uri(config, Path(storage)) if config.uri or here else ""


def _argv(command: click.Command, context: click.Context, here: bool) -> list[str]:
    """The arguments that were given, as a command line again, its paths absolute; here also those that are defaults."""
    options: list[str] = []
    positional: list[str] = []
    for parameter in command.params:
        assert parameter.name is not None
        value = context.params[parameter.name]
        given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if not given and not (here and isinstance(parameter.type, click.Path) and value is not None):
            continue
        for each in value if isinstance(value, tuple) else (value,):
            text = str(each)
            if isinstance(parameter.type, click.Path):
                text = _place(parameter.human_readable_name, text, here)
            elif parameter.name == "model":
                text = _model("MODEL", text, here)
            if isinstance(parameter, click.Argument):
                positional.append(text)
            elif isinstance(parameter, click.Option) and parameter.is_flag:
                options.append(parameter.opts[0])
            else:
                options.append(f"{max(parameter.opts, key=len)}={text}")
    return [*options, "--", *positional]


def _refuse_credentials(*texts: str) -> None:
    for text in texts:
        if redact(text) != text:
            raise UserError(
                "a user name, password or token stands in a URI, and whoever may list the cluster's jobs would read it",
                where=next(line for line in text.splitlines() if redact(line) != line).strip(),
                remedy="set it in the cluster's environment (MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, ...)",
            )
