"""What `antdist submit` sends: an entry point, the configuration, the code.

It is checked as far as this machine can see; the job itself checks the rest (data, features, stores) before it starts workers.
"""

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
    """A job of one verb.

    Args:
        entrypoint: a command line, quoted for a shell.
        metadata: what the cluster lists of the job, sufficient to submit it again.
        ray: the settings of a local Ray.
    """

    entrypoint: str
    metadata: dict[str, str]
    ray: RayConfig

    def new_id(self) -> str:
        """Make a readable, unique id that is valid in a URL and a file name."""
        words = "-".join(filter(None, (self.metadata["verb"], self.metadata["run"])))
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', words)[:60]}-{secrets.token_hex(3)}"


def read_submission(command: click.Command, arguments: Sequence[str], *, here: bool, code: str) -> Submission:
    """Parse a verb's arguments as the verb does.

    Args:
        here: for a Ray on this machine: relative paths are made absolute, elsewhere they are refused.
        code: the folder that holds the package to send, or `INSTALLED`.

    Raises:
        UserError: the configuration is invalid; a path is unknown to the cluster; credentials, which the cluster would list;
            `--json`.
        click.UsageError: the verb does not accept the arguments.
    """
    assert command.name is not None
    if any(argument.partition("=")[0] == "--json" for argument in arguments):
        raise UserError(
            "a job cannot write to a file of this machine",
            where="--json",
            remedy="read the figures with `antdist logs`",
        )
    context = command.make_context(command.name, list(arguments))
    if command.name in ("pretrain", "relearn"):
        kind: Any = PretrainConfig if command.name == "pretrain" else RelearnConfig
        config = resolve_config(load_config(kind, context.params["config_file"], context.params["overrides"]), here)
        only = context.params.get("only")
        return make_submission(command.name, config, [f"--only={only}"] if only else [], here=here, code=code)
    metadata = {"verb": command.name, "run": "", "storage": "", "mlflow": "", "config": "", "code": code}
    argv = _rebuild_arguments(command, context, here)
    domains = context.params.get("domains") or [context.params["domain"]]
    metadata["run"] = ",".join(Path(domain).name for domain in domains)
    entrypoint = _entrypoint([command.name, *argv], here)
    _refuse_credentials(entrypoint)
    return Submission(entrypoint, metadata, RayConfig())


def make_submission(
    verb: str, config: PretrainConfig | RelearnConfig, arguments: Sequence[str], *, here: bool, code: str
) -> Submission:
    """Make the submission of a verb with a resolved configuration, which is sent as a file.

    Raises:
        UserError: it holds credentials, which the cluster would list.
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
    """Make a command line that replaces its shell.

    Otherwise a signal kills the shell before its child, and in a container whose first process does not reap orphans, Ray
    waits for that child until its time is up.
    """
    return f"exec {shlex.join([sys.executable if here else 'python', '-m', 'antdist', *words])}"


def restore_submission(entrypoint: str, metadata: dict[str, str]) -> Submission:
    """Rebuild a job's submission from what the cluster lists of it.

    Raises KeyError if antdist did not submit it.
    """
    return Submission(
        entrypoint, {key: metadata[key] for key in ("verb", "run", "storage", "mlflow", "config", "code")}, RayConfig()
    )


def stage_files(submission: Submission, folder: Path) -> bool:
    """Copy the code and configuration of a job into an empty folder; return whether there are any.

    Raises:
        UserError: the code's folder holds no package.
    """
    code, config = submission.metadata["code"], submission.metadata["config"]
    if code != INSTALLED:
        package = Path(code) / "antdist"
        if not (package / "__init__.py").is_file():
            raise UserError(
                "there is no folder antdist with the package",
                where=code,
                remedy="name the project's folder with --working-dir, or use the cluster's own installation with --installed",
            )
        shutil.copytree(package, folder / "antdist", ignore=shutil.ignore_patterns("__pycache__"))
    if config:
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
    return bool(config) or code != INSTALLED


def package_root() -> str:
    """Return the folder that holds this package."""
    return str(Path(__file__).resolve().parents[2])


def resolve_config(config: Run, here: bool) -> Run:
    """Check the configuration by itself, and make its folders absolute. Raises UserError."""
    from antdist.runs.checks import check_settings
    from antdist.runs.context import map_paths

    check_settings(config)
    if config.ray.address is not None:
        raise UserError(
            "a job runs on the cluster that it is submitted to",
            where="ray.address",
            remedy="remove it, and give --address",
        )
    return map_paths(config, functools.partial(_resolve_model, here=here))


def _resolve_path(key: str, path: str, here: bool) -> str:
    """Return an absolute path, or the URI. Raises UserError."""
    if is_uri(path) or Path(path).is_absolute():
        return path
    if here:
        return str(Path(path).resolve())
    raise UserError(
        f"{path!r} would be resolved in the job's temporary copy of the code",
        where=key,
        remedy="give an absolute path that the cluster's nodes know",
    )


def _resolve_model(key: str, model: str, here: bool) -> str:
    return model if model.startswith(REGISTRY) else _resolve_path(key, model, here)


def _store(config: TrackingConfig, storage: str, here: bool) -> str:
    """Return the tracking store if it is known; the cluster's environment may name another."""
    return tracking_uri(config, Path(storage)) if config.uri or here else ""


def _rebuild_arguments(command: click.Command, context: click.Context, here: bool) -> list[str]:
    """Rebuild the command line with absolute paths; for this machine also of defaults."""
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
                text = _resolve_path(parameter.human_readable_name, text, here)
            elif parameter.name == "model":
                text = _resolve_model("MODEL", text, here)
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
                "a URI contains a user name, password or token, which everyone who can list the cluster's jobs could read",
                where=next(line for line in text.splitlines() if redact(line) != line).strip(),
                remedy="set it in the cluster's environment (MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, ...)",
            )
