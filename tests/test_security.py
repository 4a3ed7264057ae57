"""What the sources never do with untrusted input, checked on the source; and redacted secrets."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig
from antdist.errors import UserError
from antdist.io.logs import get_logger, log_to_file
from antdist.io.storage import Unreachable
from antdist.runs.comparison import record_config
from antdist.runs.folder import run_folder
from antdist.runs.locks import lock_run
from antdist.training.checkpoints.remote import Remote

PROJECT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for room in ("antdist", "launch") for path in (PROJECT / room).rglob("*.py"))

NEVER_IMPORTED = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
NEVER_CALLED = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all",
    "runpy.run_path", "runpy.run_module",
}  # fmt: skip
# allowed in one place, and there in one way only
IN_ONE_PLACE = {
    "torch.load": ("antdist/model/import_reference.py", {"weights_only": True}),
    "yaml.load": ("antdist/config/load.py", {}),
    "importlib.import_module": ("antdist/__init__.py", {}),  # lazy: the modules of a fixed table
}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, Any]:
    return {k.arg or "**": k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}


def test_no_pickle_eval_or_shell_in_sources() -> None:
    found, seen = [], set()
    for path in SOURCES:
        name = path.relative_to(PROJECT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [f"{name} imports {m}" for m in modules if m.partition(".")[0] in NEVER_IMPORTED]
        for called, call in calls(path):
            given = keywords(call)
            if called in NEVER_CALLED or given.get("shell") or given.get("allow_pickle"):
                found.append(f"{name}:{call.lineno} {called}")
            if given.get("trust_remote_code") or given.get("weights_only") is False:
                found.append(f"{name}:{call.lineno} {called}")
            if called in IN_ONE_PLACE:
                seen.add(called)
                where, wanted = IN_ONE_PLACE[called]
                if name != where or not wanted.items() <= given.items():
                    found.append(f"{name}:{call.lineno} {called}")
    assert found == []
    assert seen == IN_ONE_PLACE.keys() and len(SOURCES) > 60


def test_the_source_scan_finds_violations(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "import subprocess\nsubprocess.run('ls', shell=True)\neval('1')\ntorch.load(f, weights_only=False)\n"
    )
    found = list(calls(path))
    assert [name for name, _ in found] == ["subprocess.run", "eval", "torch.load"]
    assert keywords(found[0][1]) == {"shell": True} and keywords(found[2][1]) == {"weights_only": False}


def test_no_source_listens_on_all_addresses() -> None:
    texts = {path: path.read_text() for path in [*SOURCES, *(PROJECT / "tests").rglob("*.py")]}
    assert [path for path, text in texts.items() if path != Path(__file__) and "0.0.0.0" in text] == []


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {made}']",
        "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', '{made}']]",
        "!!python/module:subprocess",
    ],
)
def test_yaml_cannot_name_code(tmp_path: Path, text: str) -> None:
    made = tmp_path / "made"
    value = text.replace("{made}", str(made))
    (tmp_path / "run.yaml").write_text(f"name: {value}\n")
    for file, overrides in ((tmp_path / "run.yaml", []), (None, [f"name={value}"])):
        with pytest.raises(UserError, match="could not determine a constructor"):
            load_config(PretrainConfig, file, overrides)
    assert not made.exists()


def test_deepspeed_section_cannot_import_modules() -> None:
    """DeepSpeed imports the modules that this list names."""
    from antdist.training.engines.deepspeed import check_reserved_keys

    with pytest.raises(UserError, match=r"training\.deepspeed\.torch_autocast: this key is set by training.precision"):
        check_reserved_keys({"torch_autocast": {"lower_precision_safe_modules": ["antigravity.x"]}})


SECRET = "http://someone:hush-hush@host:5000/x?token=hush-hush"


def test_secrets_are_redacted_in_errors_and_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError(f"no answer from {SECRET}", where=SECRET, remedy=f"correct {SECRET}")
    assert "hush" not in f"{error} {error.what} {error.where} {error.remedy} {error.__reduce__()}"
    assert "http://***@host:5000/x?token=***" in str(error)


def test_no_secret_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By no handler, of another program neither: the filter is on the logger."""
    logger = get_logger("antdist.somewhere")
    with log_to_file(tmp_path / "log.txt"):
        logger.warning(f"connecting to {SECRET}")
        logger.info("connecting to %s", SECRET)
    line = "connecting to http://***@host:5000/x?token=***\n"
    assert capsys.readouterr().err == 2 * line and (tmp_path / "log.txt").read_text() == 2 * line
    assert [record.getMessage() for record in caplog.records] == 2 * [line.rstrip()]


def test_every_module_has_a_logger_that_redacts() -> None:
    text = {path.relative_to(PROJECT): path.read_text() for path in (PROJECT / "antdist").rglob("*.py")}
    assert [str(path) for path, code in text.items() if "logging.getLogger(__name__)" in code] == []
    assert sum("logger = get_logger(__name__)" in code for code in text.values()) > 20


def test_secrets_are_redacted_in_config_errors(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"tracking: {{uri: '{SECRET}', experiment: ['{SECRET}']}}\n")
    for file, overrides in (
        (tmp_path / "run.yaml", []),
        (None, [f"tracking={SECRET}"]),
        (None, [f"{SECRET}"]),
        (None, [f"seed={SECRET}"]),
    ):
        with pytest.raises(UserError) as caught:
            load_config(PretrainConfig, file, overrides)
        assert "hush" not in str(caught.value)


def test_secrets_are_not_written_to_the_run_folder(tmp_path: Path) -> None:
    remote = f"memory://{SECRET.partition('://')[2]}"
    asked = ["name=run", f"tracking.uri={SECRET}", f"ray.storage={tmp_path}", f"ray.remote_storage={remote}"]
    config = load_config(PretrainConfig, None, asked)
    for _ in range(2):  # the second start compares with what the first wrote
        with lock_run(run_folder(config)):
            record_config(run_folder(config), config)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert (tmp_path / "run" / "config.yaml").read_text().count("***@host") == 2
    assert not any(b"hush" in path.read_bytes() for path in files)


def test_secrets_are_redacted_in_storage_errors(tmp_path: Path) -> None:
    for uri in (f"nowhere://{SECRET.partition('://')[2]}", f"simplecache::{SECRET}"):
        with pytest.raises(UserError, match=r"ray\.remote_storage") as caught:
            Remote(uri)
        assert "hush" not in str(caught.value)
    told = Unreachable(SECRET, OSError(f"no answer from {SECRET}"))
    assert "hush" not in f"{told} {told.what} {told.where}"


LISTENING = """
import sys, time
import psutil
from antdist.config.schema import RayConfig
from antdist.distributed.ray_session import ray_session
with ray_session(RayConfig()):
    time.sleep(1)
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            for c in process.net_connections("inet"):
                if c.status == psutil.CONN_LISTEN:
                    print(c.laddr.ip)
        except psutil.Error:
            pass
"""


@pytest.mark.ray
def test_local_ray_listens_on_loopback_only() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", LISTENING]
    done = subprocess.run(
        command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=180, check=True
    )
    addresses = done.stdout.split()
    assert len(addresses) > 3, done.stdout + done.stderr
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
