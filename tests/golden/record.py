"""`python -m tests.golden.record [--kept]`: write `expected.json` from the code that is here, and with --kept `kept/` too.

Only where behaviour is meant to change. On another kind of processor than the recorded one, record the commit before a change
there first, to compare bit for bit.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.kept import keep, resume, use_model
from tests.golden.records import processor, run_record, world_record
from tests.golden.world import ENGINES, EXPECTED, KEPT, PROJECTION, World, local_ray, make_world


def run_all(world: World) -> dict[str, Any]:
    """The pinned runs: on each engine a pre-training and an adaptation by all strategies; one trial of the defaults."""
    documents: dict[str, Any] = {"plain-pretrain": world.pretrain("plain-pretrain")}
    documents["deepspeed-pretrain"] = world.pretrain("deepspeed-pretrain", "deepspeed")
    for engine in ENGINES:
        documents[f"{engine}-relearn"] = world.relearn(f"{engine}-relearn", engine)
    documents["default"] = world.train_by_default("default")
    return {name: run_record(world, name, document) for name, document in documents.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as place, local_ray():
        folder = Path(place)
        if "--kept" in sys.argv:
            _fit_projection(folder / "fit")
        world = make_world(folder)
        runs = run_all(world)
        if "--kept" in sys.argv:
            keep(world)
            for name in ("kept-pretrain", "kept-relearn"):
                shutil.rmtree(world.storage / name)
        expected = {
            "processor": processor(),
            "world": world_record(world),
            "runs": runs,
            "kept": {"resumed": resume(world), "used": use_model(world)},
        }
    EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


def _fit_projection(folder: Path) -> None:
    folder.mkdir()
    fitted = make_world(folder, projection=None).folder / "projection.safetensors"
    KEPT.mkdir(exist_ok=True)
    PROJECTION.write_bytes(gzip.compress(fitted.read_bytes(), mtime=0))


if __name__ == "__main__":
    main()
