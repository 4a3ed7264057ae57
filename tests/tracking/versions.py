"""Registered versions for tests of the registry."""

from __future__ import annotations

from pathlib import Path

from antdist.tracking.registry import Lineage, ModelVersionInfo, register
from antdist.tracking.run import start_run


def make_version(uri: str, folder: Path, name: str, lineage: Lineage, **options: object) -> ModelVersionInfo:
    """A version with content of its own."""
    place = folder / f"{len(list(folder.iterdir()))}"
    place.mkdir()
    (place / "weights.safetensors").write_text(place.name)
    run = start_run(uri, "registry", "run", folder / "run")
    assert run.finish() is None
    return register(uri, run.run_id, place, name, lineage, **options)  # type: ignore[arg-type]
