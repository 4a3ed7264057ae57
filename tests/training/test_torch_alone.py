"""The core (model, loss, stream, loop) needs torch, numpy and webdataset only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
ABSENT = ["ray", "mlflow", "deepspeed", "transformers", "polars", "pyarrow", "pandas", "sklearn", "scipy"]

# arguments: a folder, the packages to make unimportable
PLAIN_TRAINING = """
import json, sys
from pathlib import Path

folder = Path(sys.argv[1])
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # importing None raises ModuleNotFoundError
from tests.training.runs import NAMES, run
from tests.worlds import make_domains

make_domains(folder / "data", NAMES)
done = run(folder / "data", folder / "run", noise=True, epochs=6)
print(json.dumps({"losses": [loss for _, loss in done["curve"]], "finished": done["progress"].finished}))
"""


def test_training_needs_only_the_core_packages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_TRAINING, tmp_path, *ABSENT],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["finished"] == "all epochs done"
    losses = result["losses"]
    assert len(losses) > 12 and sum(losses[-3:]) < sum(losses[:3])
