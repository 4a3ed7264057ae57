"""The core (model, loss, stream, loop) trains in one plain process; of the stack it needs torch, numpy and webdataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
AWAY = ["ray", "mlflow", "deepspeed", "transformers", "polars", "pyarrow", "pandas", "sklearn", "scipy"]

# the arguments: a folder, the packages to keep away
PLAIN_TRAINING = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # None: importing it raises ModuleNotFoundError
from tests.training.test_trainer import NAMES, run
from tests.worlds import make_domains

make_domains(folder / "data", NAMES)
done = run(folder / "data", folder / "run", noise=True, epochs=6)
print(json.dumps({"losses": [loss for _, loss in done["curve"]], "finished": done["progress"].finished}))
"""


def test_a_training_runs_without_the_packages_around_the_core(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRAINING, tmp_path, *AWAY],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["finished"] == "all epochs done"
    losses = told["losses"]
    assert len(losses) > 12 and sum(losses[-3:]) < sum(losses[:3])
