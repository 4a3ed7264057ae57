"""What a run left behind, as JSON: weights, curves, MLflow records, registered models, verdicts; and how two such differ.

A string that begins with `bits:` is a digest of floating-point results. It holds on one kind of processor only, as do the
last bits of numbers: elsewhere digests are passed over and numbers compared to a tolerance.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.golden.world import DOMAINS, World

BITS = "bits:"
TIMES = ("train/predictions_per_s", "train/data_wait")
ENVIRONMENT = ("mlflow.", "version.", "git.", "antdist.version")  # tags
STATE = (
    "training_state",
    "training_state_digest",
)  # tags: weights and moments in it are pinned, its documents' form is not
RELATIVE = 1e-4
# a score's last bits may swap two items of a ranking
RANKED, RANKED_ABSOLUTE = re.compile("@|_at_|difference|relative|p_value"), 0.1


def processor() -> dict[str, str]:
    """What floating-point bits depend on."""
    import torch

    info = Path("/proc/cpuinfo")
    found = re.findall(r"^(?:vendor_id|cpu family|model)\t+: (.*)$", info.read_text() if info.is_file() else "", re.M)
    return {
        "model": " ".join(found[:3]) or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def tensors(path: Path) -> dict[str, Any]:
    """Digest of a safetensors file's tensors, and the norm of each."""
    arrays = load_file(path)
    return {"bits": _digest(arrays), "norms": {name: float(np.linalg.norm(arrays[name])) for name in sorted(arrays)}}


def world_record(world: World) -> dict[str, Any]:
    """The domains, of whose generation and preparation nothing depends on the processor, and their features, of which bits do."""
    return {
        name: {
            "manifest": hashlib.sha256((world.data / name / "manifest.json").read_bytes()).hexdigest(),
            "features": {
                path.name: _digest({"": np.load(path)}) for path in sorted((world.data / name).glob("features/*.npy"))
            },
        }
        for name in DOMAINS
    }


def run_record(world: World, name: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """All that the run `name` left behind. `document` is what its command wrote to `--json`."""
    folder = world.storage / name
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    record = {
        "document": _document(document),
        "weights": {name: tensors(path) for name, path in files.items() if name.endswith("model/weights.safetensors")},
        "checkpoints": {
            name: _digest(load_file(path))
            for name, path in files.items()
            if "checkpoints/" in name and path.suffix == ".safetensors" and not name.startswith("training_state/")
        },
        "ranks": {name: ranks(path) for name, path in files.items() if path.suffix == ".npz"},
        "mlflow": dict(_tracked(world, name)),
        "registered": dict(_registered(world, name)),
    }
    return dict(json.loads(json.dumps(record).replace(str(world.folder), "FOLDER")))


def ranks(path: Path) -> dict[str, Any]:
    """Per-user results: what they may be compared with (the budget's digest is in it), and the ranks."""
    with np.load(path) as file:
        return {"key": json.loads(str(file["key"])), "users": len(file["users"]), "ranks": _digest(dict(file))}


def model_record(folder: Path) -> dict[str, Any]:
    """The files of a registered model's folder."""
    described = yaml.safe_load((folder / "MLmodel").read_text())
    described["flavors"]["python_function"].pop("python_version")
    described["metadata"]["sha256"] = sorted(described["metadata"]["sha256"])
    return {
        "files": sorted(path.name for path in folder.iterdir() if path.name != "registered_model_meta"),
        "MLmodel": described,
        "card": json.loads((folder / "model.json").read_text()),
        **{path.name: tensors(path) for path in sorted(folder.glob("*.safetensors"))},
        **{path.name: json.loads(path.read_text()) for path in sorted(folder.glob("catalogue.json"))},
    }


def differences(expected: Any, actual: Any, exact: bool, path: str = "") -> list[str]:
    """Where two records differ, in words."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = sorted(expected.keys() | actual.keys())
        absent = [
            f"{path}/{key}: {'gone' if key in expected else 'new'}"
            for key in keys
            if key not in expected or key not in actual
        ]
        both = [key for key in keys if key in expected and key in actual]
        return absent + [
            told for key in both for told in differences(expected[key], actual[key], exact, f"{path}/{key}")
        ]
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        return [
            told
            for i, pair in enumerate(zip(expected, actual, strict=True))
            for told in differences(*pair, exact, f"{path}/{i}")
        ]
    if not exact and isinstance(expected, str) and expected.startswith(BITS):
        return []
    if not exact and isinstance(expected, float) and isinstance(actual, float | int):
        absolute = RANKED_ABSOLUTE if RANKED.search(path) else 1e-6
        same = math.isclose(expected, actual, rel_tol=RELATIVE, abs_tol=absolute)
    else:
        same = expected == actual
    return [] if same else [f"{path}: was {expected!r}, is {actual!r}"]


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        whole.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return BITS + whole.hexdigest()


def _document(document: Mapping[str, Any]) -> dict[str, Any]:
    """Without ids, places and sentences."""
    return {k: v for k, v in document.items() if k not in ("run_id", "tracking_uri", "folder", "notes", "champion")}


def _tracked(world: World, name: str) -> Iterator[tuple[str, Any]]:
    """The MLflow runs of a run: one, or one a trial."""
    from mlflow import MlflowClient

    client = MlflowClient(world.store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for run in client.search_runs(experiments, f"params.name = '{name}'", order_by=["attributes.run_name ASC"]):
        keys = sorted(run.data.metrics.keys() - set(TIMES))
        points = {key: client.get_metric_history(run.info.run_id, key) for key in keys}
        yield (
            run.info.run_name,
            {
                "status": run.info.status,
                "params": run.data.params,
                "tags": {k: v for k, v in run.data.tags.items() if not k.startswith(ENVIRONMENT)},
                "metrics": {key: sorted([point.step, point.value] for point in found) for key, found in points.items()},
                "artifacts": sorted(artifact.path for artifact in client.list_artifacts(run.info.run_id)),
            },
        )


def _registered(world: World, name: str) -> Iterator[tuple[str, Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(world.store)
    for model in client.search_registered_models(f"name LIKE '{name}%'"):
        yield (
            model.name,
            {
                "aliases": model.aliases,
                "versions": {
                    str(version.version): {
                        "tags": {key: _tag(key, value) for key, value in version.tags.items()},
                        "model": model_record(Path(version.source.removeprefix("file://"))),
                    }
                    for version in client.search_model_versions(f"name = '{model.name}'")
                },
            },
        )


def _tag(key: str, value: str) -> str | float:
    if key == "validation_recall_at_10":
        return float(value)
    if key in STATE:
        return "present"
    return BITS + value if key == "digest" else value
