"""What is kept of the day of recording: an unfinished pre-training, a finished adaptation, a registered model; written by the
code of that day, in `kept/`, and taken up by today's.

Of a run's folder the locks, the logs, all but the newest checkpoint and two strategies are left out, to keep it small; MLflow's
database is too. So a run that is restored belongs to an MLflow run of the store at hand, as after a move.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tests.golden.records import tensors
from tests.golden.world import KEPT, STOPPED_AFTER, World, antdist

PRETRAIN, RELEARN = "kept-pretrain", "kept-relearn"
STRATEGIES = ("scratch", "relearn")
PLACE = "/kept/world"  # in place of the folder of the world
PATHS = ("config.yaml", "run.json", "verdict.json")  # that name it, or an MLflow run
LEFT_OUT = shutil.ignore_patterns("*lock", "log.txt", "live.json", "outbox-*", "training_state")
HISTORIES = (["shop-000001"], ["shop-000002", "shop-000003", "shop-000004"])


def keep(world: World) -> None:
    """Write `kept/` anew, from runs that are made here and from `plain-pretrain`'s registered model."""
    document = world.pretrain(PRETRAIN, "plain", f"training.stop_after={STOPPED_AFTER}")
    assert document["finished"] is None
    document = world.relearn(RELEARN, strategies=STRATEGIES)
    for name in (PRETRAIN, RELEARN):
        shutil.rmtree(KEPT / name, ignore_errors=True)
        shutil.copytree(world.storage / name, KEPT / name, ignore=LEFT_OUT)
        for parent in (KEPT / name).rglob("checkpoints"):
            for old in sorted(parent.iterdir())[:-1]:
                shutil.rmtree(old)
        for file in _with_paths(KEPT / name):
            file.write_text(file.read_text().replace(str(world.folder), PLACE))
    chosen = KEPT / RELEARN / "shop" / f"{document['chosen']}-seed0" / "model"
    shutil.rmtree(KEPT / "model", ignore_errors=True)
    shutil.copytree(chosen, KEPT / "model")


def restore(world: World, name: str) -> Path:
    """Copy a kept run to the world's storage, its paths set right and its MLflow runs made anew."""
    from mlflow import MlflowClient

    client = MlflowClient(world.store)
    experiment = client.get_experiment_by_name("antdist")
    folder = world.storage / name
    shutil.copytree(KEPT / name, folder)
    for file in _with_paths(folder):
        text = file.read_text().replace(PLACE, str(world.folder))
        if file.name == "run.json":
            run_id = client.create_run(experiment.experiment_id, run_name=name).info.run_id
            text = re.sub(r'("run_id": ")\w+', rf"\g<1>{run_id}", text)
        file.write_text(text)
    return folder


def resume(world: World) -> dict[str, Any]:
    """Resume the unfinished pre-training by the same command, to its end; the history and the weights of that."""
    folder = restore(world, PRETRAIN)
    document = world.pretrain(PRETRAIN)
    (last,) = folder.glob("checkpoints/step-00000024")
    files = {"model": folder / "model", "checkpoint": last}
    return {
        "history": document["history"],
        **{name: tensors(where / "weights.safetensors") for name, where in files.items()},
    }


def use_model(world: World) -> dict[str, Any]:
    """What the registered model says, loaded by MLflow and named by its folder on the command line."""
    import mlflow
    import pandas as pd

    folder, domain = world.folder / "model", str(world.data / "shop")
    shutil.copytree(KEPT / "model", folder)
    predicted = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"history": HISTORIES, "n": [3, 5]}))
    history, out = ",".join(HISTORIES[1]), world.folder / "scores"
    recommended = antdist(world.folder, "recommend", str(folder), domain, "--history", history, "-n", "5")
    figures = antdist(world.folder, "evaluate", str(folder), domain)
    antdist(world.folder, "score", str(folder), domain, "--out", str(out), "--workers", "0")
    inputs = json.loads((out / "_score.json").read_text())["inputs"]
    return {
        "predicted": predicted.to_dict("list"),
        "recommended": recommended["items"],
        "figures": {name: value for name, value in figures.items() if name not in ("model", "domain")},
        "scored": {name: inputs[name] for name in ("domain", "model.config", "model.weights", "n")},
    }


def _with_paths(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.name in PATHS]
