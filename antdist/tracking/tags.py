"""The description of a run in MLflow: clean keys, flat parameters, tags of versions and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antdist.version import __version__

LIBRARIES = ("torch", "deepspeed", "ray", "transformers", "webdataset", "mlflow", "numpy")
MAX_KEY = 250  # characters that MLflow accepts


def clean_key(name: str) -> str:
    """Replace what MLflow refuses in a key, and cut it.

    "@" becomes "_at_"; all but letters, digits and "_-. :/" becomes "_".
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))[:MAX_KEY]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings: keys joined by dots, values as YAML would write them on one line."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def environment_tags(folder: Path | None = None) -> dict[str, str]:
    """Return tags for the versions of antdist, Python and libraries, and for the git commit.

    Args:
        folder: the git checkout; by default the working directory.
    """
    tags = {"antdist.version": __version__, "version.python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{library}"] = importlib.metadata.version(library)
    commit = _run_git("rev-parse", "HEAD", folder=folder)
    if commit:
        tags["mlflow.source.git.commit"] = commit
        changes = _run_git("status", "--porcelain", "--untracked-files=no", folder=folder)
        if changes is not None:
            tags["git.changed"] = str(bool(changes)).lower()
    return tags


def _run_git(*arguments: str, folder: Path | None) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or a slow disk: no tag
        return None
    return done.stdout.strip()
