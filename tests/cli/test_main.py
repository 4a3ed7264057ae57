"""The command line: light to start, an example on each verb, mistakes told in one line."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from antdist.cli.main import cli, main

VERBS = sorted(cli.commands)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "antdist", *arguments], capture_output=True, text=True, timeout=120)


def test_the_contract_of_verbs() -> None:
    expected = "synth prepare verify featurize validate pretrain relearn evaluate recommend import-reference"
    expected += " score models promote submit fanout jobs logs stop resume"
    assert set(expected.split()) <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help_with_an_example(verb: str) -> None:
    told = CliRunner().invoke(cli, [verb, "--help"])
    assert told.exit_code == 0 and "Example" in told.output and f"antdist {verb}" in told.output


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'deepspeed', 'transformers', 'numpy', 'polars', 'pydantic'}"
    code = f"import sys, antdist.cli; found = {heavy} & set(sys.modules); sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "training.epoch=3"], "unknown key training.epoch. Did you mean training.epochs."),
        (["pretrain", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["relearn", "strategy=magic"], "strategy"),
        (["relearn"], "target: no target is named"),
        (["verify", "absent"], "absent"),
        (["verify", "absent", "--json", "/proc/no/figures.json"], "/proc/no/figures.json: cannot be written"),
        (["evaluate", "absent", "absent"], "absent"),
        (["score", "absent", "absent", "--out", "out"], "absent: not a prepared domain"),
        (["score", "models:/m/1", "data/food", "--out", "out", "--top", "0"], "'--top': 0 is not in the range x>=1"),
        (["models"], "mlflow.db: no registry here. Name the folder of the runs with --storage"),
        (["submit", "relearn", "stategy=auto"], "unknown key stategy. Did you mean strategy."),
        (
            ["submit", "evaluate", "models:/m/1", "--split", "all", "data/food"],
            "'all' is not one of 'validation', 'test'",
        ),
        (["submit", "pretrain", "--working-dir", "absent", "--installed"], "give either --working-dir or --installed"),
        (["featurize", "absent", "--max-images", "0"], "'--max-images': 0 is not in the range x>=1"),
        (["featurize", "absent", "--batch-size", "0"], "'--batch-size': 0 is not in the range x>=1"),
        (["featurize", "absent", "--workers", "-1"], "'--workers': -1 is not in the range x>=0"),
        (["jobs"], "--address: no cluster is named"),
        (
            ["prepare", "s", "--domain", "d", "--out", "o", "--append"],
            "o/d: no prepared domain to append to. Prepare it",
        ),
        (
            ["prepare", "s", "--domain", "d", "--out", "o", "--append", "--overwrite"],
            "--overwrite: does not go with --append",
        ),
        (["prepare", "s", "--domain", "d", "--out", "o", "--append", "--k-core", "3"], "--k-core: does not go with"),
        (["verify", "file:///no/d"], "file:///no/d: not a prepared domain: manifest.json is missing"),
        (["prepare", "world", "--domain", "d", "--out", "s3://b/data"], "is a URI. Write to a folder"),
        (["prepare", "--domain", "d", "--out", "o", "--column", "x"], "--column: 'x' is not of the form OURS=THEIRS"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "antdist", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_data_verbs_from_a_generated_world_to_checked_features(tmp_path: Path) -> None:
    """synth, prepare, featurize, verify as a user types them; a damaged shard is named."""
    world, data, figures = tmp_path / "world", tmp_path / "data", tmp_path / "figures.json"
    sizes = ["--users", "60", "--items", "40", "--target-users", "40", "--target-items", "30", "--domains", "2"]
    assert run("synth", str(world), *sizes).returncode == 0
    names = sorted(path.name for path in world.iterdir())
    for name in names:
        done = run("prepare", str(world / name), "--domain", name, "--out", str(data), "--json", str(figures))
        assert done.returncode == 0, done.stderr
        assert json.loads(figures.read_text())["users"] > 0
    folders = [str(data / name) for name in names]
    encoders = ["--text", "hashed", "--text-dim", "16", "--image", "histogram", "--price", "quantile"]
    done = run("featurize", *folders, *encoders, "--workers", "0")
    assert done.returncode == 0, done.stderr
    assert run("verify", folders[0]).returncode == 0
    far = run("featurize", f"file://{folders[0]}", "--price", "log")
    assert far.returncode == 2 and "a remote domain is read-only" in far.stderr
    again = run("prepare", str(world / names[0]), "--domain", names[0], "--out", str(data))
    assert again.returncode == 2 and "--overwrite" in again.stderr
    shard = data / names[0] / "sequences-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    damaged = run("verify", folders[0])
    assert damaged.returncode == 1 and "sequences-00000.tar" in damaged.stdout


def test_validate_checks_before_anything_runs(tmp_path: Path) -> None:
    from tests.worlds import make_domains

    make_domains(tmp_path / "data", ["aa", "bbb"])
    base = [f"data.root={tmp_path / 'data'}", f"ray.storage={tmp_path / 'runs'}"]
    good = run("validate", *base, "data.domains=[aa, bbb]")
    assert good.returncode == 0, good.stderr
    assert "ok    domain aa: 40 users" in good.stdout and "estimated memory a worker" in good.stdout
    for overrides, message in [
        (["data.domains=[aa, zz]"], "data.domains: no prepared domain 'zz'"),
        (["data.domains=[aa, aa]"], "domain 'aa' occurs twice"),
        (
            ["data.domains=[aa]", "ray.workers=99"],
            "stream.batch_size: a micro-batch has 40.0 windows on average, fewer than the 99 workers",
        ),
        (["data.domains=[aa]", "training.precision=fp16"], "training.precision: fp16 needs a GPU"),
        (["data.domains=[aa]", "loss.log_q=true", "loss.negatives=catalogue"], "loss.log_q"),
        (["data.domains=[aa]", "training.deepspeed={optimizer: {}}"], "training.deepspeed.optimizer"),
        ([f"data.root=file://{tmp_path}/data", "data.domains=[zz]"], "no prepared domain 'zz' in file:///"),
        (["target=aa", "strategy=relearn"], "from: strategy relearn starts from a pre-trained model"),
        (["data.domains=[aa]", "tracking.uri=http://127.0.0.1:9"], "the tracking server does not answer"),
    ]:
        done = run("validate", *base, *overrides)
        assert done.returncode == 2 and message in done.stderr, (overrides, done.stderr)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/shard.tar")

    monkeypatch.setattr("antdist.cli.main.cli", full)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and capsys.readouterr().err == "error: /data/shard.tar: No space left on device.\n"
