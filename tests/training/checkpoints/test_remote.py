"""Checkpoints on remote storage: atomic, fetched byte for byte, damage detected (law 6)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
import torch
from fsspec.registry import _registry as known_storage
from s3fs import S3FileSystem

from antdist.errors import UserError
from antdist.faults import corrupt
from antdist.training.checkpoints import remote as module
from antdist.training.checkpoints.local import (
    best_weights,
    describe,
    load_latest,
    save_checkpoint,
    steps_in,
    write_tensors,
)
from antdist.training.checkpoints.remote import Remote
from antdist.training.engines.base import EngineState
from tests.ranks import on_ranks
from tests.stores import Bucket
from tests.training.checkpoints.test_local import state
from tests.training.runs import assert_same, refused, run, run_with

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(data, tmp_path_factory.mktemp("straight"), noise=True, checkpoint_every=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))


def save(folder: Path, step: int, best: int | None = None) -> Path:
    """Save a checkpoint of a step with the best weights of an epoch."""
    document: dict[str, Any] = {"progress": {"step": step, "best_epoch": best}}
    if best is not None:
        path = best_weights(folder, best)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_tensors(path, state(float(best)).weights)
        document["best"] = {"epoch": best, "file": describe(path)}
    return save_checkpoint(folder / "checkpoints", step, state(float(step)), document, 9)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["file", "memory", "folder", "s3"])
def test_upload_and_fetch_are_exact_with_retention(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    place = {"file": f"file://{tmp_path}/there", "memory": f"memory://{uuid.uuid4()}", "folder": f"{tmp_path}/there"}
    if kind == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        place["s3"] = f"{bucket.uri}/deep"
    remote, here = Remote(f"{place[kind]}/runs/one/"), tmp_path / "here"
    for step, best in ((2, None), (4, 1), (6, 1), (11, 2), (13, 2), (15, 3)):
        save(here, step, best)
        remote.upload(here, step, keep=2, keep_every=4)
    # permanent: 4, 11 (the first from 8 on), 13 (the first from 12 on); newest: 13, 15
    assert remote.steps() == [4, 11, 13, 15]
    assert sorted(remote._list("best")) == [f"epoch-0000{epoch}.safetensors" for epoch in (1, 2, 3)]
    remote.fetch_newest(tmp_path / "new")
    wanted = {name: content for name, content in contents(here).items() if "step-00000015" in name or "00003" in name}
    assert contents(tmp_path / "new") == wanted and len(wanted) == 5
    found = load_latest(tmp_path / "new" / "checkpoints")
    assert found is not None and found.state.updates == 15
    if kind != "memory":
        files = bucket.contents("deep") if kind == "s3" else contents(tmp_path / "there")
        files = {name.partition("runs/one/")[2]: content for name, content in files.items()}
        assert {name for name in files if not name.startswith(("best/", "checkpoints/step-"))} == set()
        assert not [name for name in files if name.endswith(".partial")]


def test_upload_removes_undone_and_incomplete_checkpoints(tmp_path: Path) -> None:
    remote, here, there = Remote(str(tmp_path / "there")), tmp_path / "here", tmp_path / "there" / "checkpoints"
    for step in (2, 4, 9):
        save(here, step)
        remote.upload(here, step, 3, None)
    (there / "step-00000004" / "COMPLETE.json").unlink()
    save(here, 6)
    remote.upload(here, 6, 3, None)
    assert sorted(path.name for path in there.iterdir()) == ["step-00000002", "step-00000006"]


def test_fetch_does_nothing_if_the_folder_is_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    remote.fetch_newest(here)
    assert not here.exists()
    save(here, 2)
    save(here, 4)
    remote.upload(here, 2, 2, None)
    remote.upload(here, 4, 2, None)
    before = contents(here)
    remote.fetch_newest(here)
    assert contents(here) == before and capsys.readouterr().err == ""


def test_fetch_replaces_a_damaged_local_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    for step in (2, 4):
        save(here, step)
        remote.upload(here, step, 2, None)
    before = contents(here)
    corrupt(here / "checkpoints" / "step-00000004" / "moments.safetensors", "flip")
    remote.fetch_newest(here)
    assert contents(here) == before
    assert "fetched the checkpoint of step 4 from" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize(
    "file", ["weights.safetensors", "moments.safetensors", "progress.json", "COMPLETE.json", "epoch-00002.safetensors"]
)
def test_fetch_falls_back_from_a_damaged_remote_checkpoint(
    tmp_path: Path, file: str, how: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    remote, here, there = Remote(f"file://{tmp_path}/there"), tmp_path / "here", tmp_path / "there"
    for step, best in ((2, 1), (4, 2)):
        save(here, step, best)
        remote.upload(here, step, 2, None)
    newest = there / "checkpoints" / "step-00000004"
    corrupt(there / "best" / file if "epoch" in file else newest / file, how)
    remote.fetch_newest(tmp_path / "new")
    found = load_latest(tmp_path / "new" / "checkpoints")
    assert found is not None and found.state.updates == 2 and steps_in(tmp_path / "new" / "checkpoints") == [2]
    log = capsys.readouterr().err
    if (file, how) == ("COMPLETE.json", "gone"):
        assert "damaged" not in log  # without a marker it is no checkpoint
    else:
        assert f"skipped the damaged checkpoint of step 4: {there.as_uri()}/" in log
        assert file in log or (file, how) == ("COMPLETE.json", "flip")  # then another file differs from its digest
        assert remote.steps() == [2], "the damaged one would displace complete ones"


def test_fetch_refuses_if_all_remote_checkpoints_are_damaged(tmp_path: Path) -> None:
    remote, here, there = Remote(str(tmp_path / "there")), tmp_path / "here", tmp_path / "there"
    for step in (2, 4):
        save(here, step)
        remote.upload(here, step, 2, None)
        corrupt(there / "checkpoints" / f"step-0000000{step}" / "weights.safetensors", "cut")
    before = contents(there)
    with pytest.raises(
        UserError, match=r"there/checkpoints: all checkpoints are damaged, the oldest too: .*02/weights"
    ):
        remote.fetch_newest(tmp_path / "new")
    assert contents(there) == before
    corrupt(here / "checkpoints" / "step-00000004" / "progress.json", "cut")
    remote.fetch_newest(here)  # resumes from its own
    assert load_latest(here / "checkpoints").state.updates == 2  # type: ignore[union-attr]


def test_upload_refuses_a_damaged_local_checkpoint(tmp_path: Path) -> None:
    remote, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    corrupt(save(here, 2) / "weights.safetensors", "flip")
    with pytest.raises(UserError, match=r"weights\.safetensors: missing, truncated or modified"):
        remote.upload(here, 2, 2, None)
    assert remote.steps() == []


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "file"), (2, "file"), (1, "s3"), pytest.param(2, "s3", marks=pytest.mark.slow)]
)
def test_resume_from_remote_after_losing_the_folder(
    data: Path, tmp_path: Path, straight: dict[str, Any], ranks: int, kind: str, request: pytest.FixtureRequest
) -> None:
    """Law 3: the leader fetches the checkpoint, and all ranks resume from it."""
    options: dict[str, Any] = {"noise": True, "checkpoint_every": 1}
    uri = f"file://{tmp_path}/there" if kind == "file" else f"{request.getfixturevalue('s3').uri}/runs/lost"
    elsewhere = {**options, "remote": uri}
    if ranks == 1:
        run(data, tmp_path / "lost", **elsewhere, stop_after=5)
        shutil.rmtree(tmp_path / "lost")
        resumed = run(data, tmp_path / "lost", **elsewhere)
    else:
        straight = on_ranks(2, run_with, data, tmp_path / "straight", options)[0]
        on_ranks(2, run_with, data, tmp_path / "lost", {**elsewhere, "stop_after": 5})
        shutil.rmtree(tmp_path / "lost")
        resumed = on_ranks(2, run_with, data, tmp_path / "lost", elsewhere)[0]
    assert len(resumed["curve"]) == len(straight["curve"]) - 5
    assert_same({**straight, "curve": straight["curve"][5:]}, resumed)
    assert resumed["history"] == straight["history"]
    # at the end the remote remote equals the folder
    if kind == "s3":
        S3FileSystem(use_listings_cache=False).get(uri, f"{tmp_path}/there", recursive=True)
    steps = steps_in(tmp_path / "lost" / "checkpoints")[-1:]
    assert steps_in(tmp_path / "there" / "checkpoints")[-1:] == steps
    mine, theirs = contents(tmp_path / "lost"), contents(tmp_path / "there")
    names = [name for name in mine if name.startswith(("best/", f"checkpoints/step-{steps[0]:08d}"))]
    assert len(names) >= 5 and {name: mine[name] for name in names} == {name: theirs[name] for name in names}


def test_damaged_remote_raises_on_all_ranks(data: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    run(data, tmp_path / "a", remote=str(there), epochs=1)
    shutil.rmtree(tmp_path / "a")
    for file in there.rglob("weights.safetensors"):
        corrupt(file, "cut")
    for message in on_ranks(2, refused, data, tmp_path / "a", {"remote": str(there)}):
        assert "all checkpoints are damaged" in message and "weights.safetensors" in message


# arguments: data, folder, URI, and the file in the middle of whose upload to die
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from tests.training.runs import run

fatal, writes = sys.argv[4], []

def write_or_die(place, content):
    writes.append(place)
    if "step-00000005" in place and fatal in place:
        assert threading.current_thread() is not threading.main_thread(), "not in the background"
        Path(place).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    Path(place).write_bytes(content)

LocalFileSystem.put_file = lambda self, here, place, **_: write_or_die(place, Path(here).read_bytes())
LocalFileSystem.pipe_file = lambda self, place, content, **_: write_or_die(place, content)
try:
    run(Path(sys.argv[1]), Path(sys.argv[2]), noise=True, checkpoint_every=1, stop_after=2, remote=sys.argv[3])
finally:
    print(*writes, sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize("file", ["weights.safetensors", "progress.json", "COMPLETE.json"])
def test_resume_after_kill_during_upload_is_bit_for_bit(
    data: Path, tmp_path: Path, straight: dict[str, Any], file: str
) -> None:
    """There is no marker; with the folder lost too, the run resumes from the last complete upload."""
    there = tmp_path / "there"
    run(data, tmp_path / "killed", noise=True, checkpoint_every=1, stop_after=3, remote=str(there))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, data, tmp_path / "killed", there.as_uri(), file],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -9, done.stderr
    half = there / "checkpoints" / "step-00000005"
    assert half.is_dir() and not (half / "COMPLETE.json").exists()
    complete = Remote(there.as_uri()).steps()
    assert complete[-1] in (3, 4) and complete == steps_in(there / "checkpoints")
    shutil.rmtree(tmp_path / "killed")
    resumed = run(data, tmp_path / "killed", noise=True, checkpoint_every=1, remote=there.as_uri())
    assert_same({**straight, "curve": straight["curve"][complete[-1] :]}, resumed)
    assert resumed["history"] == straight["history"]


# arguments: URI, the run's folder, a new folder; prints how many bytes memory grows in upload and fetch
TRANSFER = r"""
import json, re, sys
from pathlib import Path
from antdist.training.checkpoints.remote import Remote

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

remote = Remote(sys.argv[1])
remote.check()
before = peak()
remote.upload(Path(sys.argv[2]), 2, 2, None)
sent = peak()
remote.fetch_newest(Path(sys.argv[3]))
print(json.dumps([sent - before, peak() - before]))
"""


@pytest.mark.slow
def test_s3_transfer_of_a_large_checkpoint_needs_little_memory(s3: Bucket, tmp_path: Path) -> None:
    size = 384 * 2**20
    heavy = EngineState(weights={"w": torch.randn(size // 4)}, moments={"exp_avg": {"w": torch.zeros(4)}}, updates=2)
    save_checkpoint(tmp_path / "here" / "checkpoints", 2, heavy, {"progress": {"step": 2}}, 9)
    done = subprocess.run(
        [sys.executable, "-c", TRANSFER, f"{s3.uri}/run", tmp_path / "here", tmp_path / "new"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < size * 0.7, done.stdout
    assert load_latest(tmp_path / "new" / "checkpoints") is not None  # its digests are right


def test_check_reports_unusable_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(known_storage, "s3", raising=False)
    (tmp_path / "file").touch()
    for uri, message in (
        (
            "s3://bucket/runs",
            r"ray.remote_storage s3://bucket/runs: the package for s3:// \(s3fs\) is missing\. `pip install s3fs`",
        ),
        ("nowhere://x", r"ray.remote_storage nowhere://x: it cannot be used \(Protocol not known: nowhere\)"),
        ("memory://runs", "this storage is private to one process and ends with it"),
        ("simplecache::file:///x", r"it names several storages\. Give one"),
        (
            f"file://{tmp_path}/file/below",
            r"/file/below: the storage cannot be written: .*Not a directory.*remove the key",
        ),
    ):
        with pytest.raises(UserError, match=message):
            Remote(uri).check()
    Remote(f"file://{tmp_path}/new/folder").check()
    assert list((tmp_path / "new" / "folder").iterdir()) == [], "the probe stays"


def test_check_reports_missing_or_forbidden_s3_bucket(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"ray.remote_storage s3://nobody-s/x: the storage cannot be written: .*does not exist"
    ):
        Remote("s3://nobody-s/x").check()
    Remote(f"{s3.uri}/new").check()
    assert s3.contents() == {}, "the probe stays"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"the storage cannot be written: .*Unable to locate credentials"):
        Remote(s3.uri).check()


class Silent(fsspec.AbstractFileSystem):
    """Never answers."""

    protocol = "silent"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        threading.Event().wait()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


def test_check_reports_storage_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"silent://x: the storage cannot be written: no answer in 0\.05 seconds"):
        Remote("silent://x").check()


@pytest.mark.parametrize("file", ["moments.safetensors", "epoch-00002.safetensors"])
def test_broken_connection_during_fetch_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    remote, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    for step, best in ((2, 1), (4, 2)):
        save(here, step, best)
        remote.upload(here, step, 2, None)
    there, get = contents(tmp_path / "there"), remote._files.get_file

    def breaking(path: str, place: str, **options: Any) -> None:
        if file in path:
            Path(place).write_bytes(b"half")
            raise OSError("connection reset")
        get(path, place, **options)

    monkeypatch.setattr(remote._files, "get_file", breaking)
    with pytest.raises(UserError, match=r"does not answer, or refuses \(connection reset"):
        remote.fetch_newest(tmp_path / "new")
    assert contents(tmp_path / "there") == there and load_latest(tmp_path / "new" / "checkpoints") is None
    monkeypatch.setattr(remote._files, "get_file", get)
    remote.fetch_newest(tmp_path / "new")
    assert steps_in(tmp_path / "new" / "checkpoints") == [4]
    assert not [name for name in contents(tmp_path / "new") if ".fetching" in name or ".partial" in name]


def test_resume_retries_unreachable_storage_then_raises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a complete local checkpoint the run resumes from it; without one it must not start over."""
    (tmp_path / "file").touch()
    remote, here = Remote(f"{tmp_path}/file/below"), tmp_path / "here"
    with pytest.raises(
        UserError,
        match=r"ray.remote_storage .*does not answer, or refuses .*it may have checkpoints.*[Rr]estore the connection",
    ):
        remote.fetch_newest(here)
    assert capsys.readouterr().err.count("Trying again") == 2
    save(here, 2)
    remote.fetch_newest(here)
    assert "The run resumes from its own folder" in capsys.readouterr().err
