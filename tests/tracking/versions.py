"""Registered versions for tests of the registry."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from antdist.tracking.overview import Version
from antdist.tracking.registry import Lineage, ModelVersionInfo, register
from antdist.tracking.run import start_run


def make_version(uri: str, folder: Path, name: str, lineage: Lineage, **options: object) -> ModelVersionInfo:
    """Register a version with unique content."""
    place = folder / f"{len(list(folder.iterdir()))}"
    place.mkdir()
    (place / "weights.safetensors").write_text(place.name)
    run = start_run(uri, "registry", "run", folder / "run")
    assert run.finish() is None
    return register(uri, run.run_id, place, name, lineage, **options)  # type: ignore[arg-type]


def version(name: str, number: int, parent: str | None = None, **others: object) -> Version:
    """Make a version that no store knows."""
    nothing = dict.fromkeys(("validation", "target", "strategy", "transfer", "training_state"))
    given = {"aliases": [], "fingerprints": {}, "registered": datetime.now(UTC), "run_id": "r", "parent": parent}
    stored = {"digest": f"{number:012}", "source": f"file:///r/artifacts/model/{number:012}"}
    return Version(name=name, version=number, **{**nothing, **given, **stored, **others})  # type: ignore[arg-type]
