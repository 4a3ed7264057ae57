"""A tiny generated world and the runs on it, driven by `python -m antdist` alone, so that refactoring leaves this file alone."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import runpy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

KEPT = Path(__file__).with_name("kept")
EXPECTED = Path(__file__).with_name("expected.json")
PROJECTION = KEPT / "projection.safetensors.gz"  # a fit may differ in its last bits between processors
ENGINES = ("plain", "deepspeed")
DOMAINS = ("aa", "bb", "shop")
STRATEGIES = ("scratch", "finetune", "finetune_all", "relearn")
STOPPED_AFTER = 11  # steps of 24
EPOCHS = "training.epochs=3"


@dataclass(frozen=True)
class World:
    """`data/` and `runs/` below one folder."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def storage(self) -> Path:
        return self.folder / "runs"

    @property
    def store(self) -> str:
        return f"sqlite:///{self.storage}/mlflow.db"

    def pretrain(self, name: str, engine: str = "plain", *more: str) -> dict[str, Any]:
        """Pre-train on the two auxiliary domains; return the document of `--json`."""
        return self._train("pretrain", name, "data.domains=[aa,bb]", f"training.engine={engine}", *small(), *more)

    def relearn(self, name: str, engine: str = "plain", *more: str, strategies: tuple[str, ...] = STRATEGIES) -> Any:
        """Adapt the model `plain-pretrain` to the target; return the document of `--json`."""
        return self._train(
            "relearn", name, "target=shop", f"strategy=[{','.join(strategies)}]", "from=models:/plain-pretrain/1",
            f"training.engine={engine}", *small(), *more,
        )  # fmt: skip

    def train_by_default(self, name: str) -> dict[str, Any]:
        """Train one trial with all keys that a result depends on at their defaults."""
        return self._train("relearn", name, "target=shop", "strategy=scratch", "--only", "trial")

    def _train(self, verb: str, name: str, *arguments: str) -> dict[str, Any]:
        places = (f"name={name}", f"data.root={self.data}", f"ray.storage={self.storage}", "ray.max_failures=0")
        return antdist(self.folder, verb, *places, *arguments)


def small() -> tuple[str, ...]:
    return (
        "model.dim=8", "model.inner=8", "model.experts=2", "model.max_length=8", "model.initial_shift=mean",
        "stream.batch_size=64", EPOCHS, "training.log_every=1",
    )  # fmt: skip


def antdist(folder: Path, *arguments: str, document: bool = True) -> dict[str, Any]:
    """Run `python -m antdist ARGUMENTS` in this process, which may have a Ray; return the document of `--json`."""
    file = folder / "document.json"
    file.unlink(missing_ok=True)
    asked = ["--json", str(file)] if document else []
    with patch.object(sys, "argv", ["antdist", *arguments, *asked]):
        try:
            runpy.run_module("antdist", run_name="__main__")
        except SystemExit as end:
            assert end.code in (0, None), f"antdist {' '.join(arguments)} exited with {end.code}"
    return dict(json.loads(file.read_text())) if document else {}


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """One local Ray for all commands, one thread, and no tracking store or cluster but the commands' own."""
    import ray
    import torch

    hidden = {"MLFLOW_TRACKING_URI", "RAY_ADDRESS", "ANTDIST_FAULTS"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.dict(os.environ, environment | {"OMP_NUM_THREADS": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}, clear=True):
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        try:
            yield
        finally:
            ray.shutdown()
            torch.set_num_threads(threads)


def make_world(folder: Path, projection: Path | None = PROJECTION) -> World:
    """Generate, prepare and featurize the domains; without `projection`, text's is fitted."""
    world, source, fitted = World(folder), folder / "source", folder / "projection.safetensors"
    if projection is not None:
        fitted.write_bytes(gzip.decompress(projection.read_bytes()))
    sizes = {"users": 60, "items": 24, "target-users": 48, "target-items": 20, "mean-length": 7, "seed": 7}
    antdist(folder, "synth", str(source), "--domains", ",".join(DOMAINS), *_options(sizes))
    for name in DOMAINS:
        options = {"domain": name, "out": world.data, "block-users": 16}
        antdist(folder, "prepare", str(source / name), *_options(options))
    encoders = {"text": "hashed", "text-dim": 4, "image": "histogram", "price": "quantile", "projection": fitted}
    domains = [str(world.data / name) for name in DOMAINS]
    antdist(folder, "featurize", *domains, *_options(encoders), "--workers", "0")
    return world


def _options(options: Mapping[str, Any]) -> list[str]:
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]
