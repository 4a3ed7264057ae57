"""Checkpoints on other storage: whole or not there, brought back byte for byte, damage found and named (law 6)."""

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
from antdist.training.engines.plain import EngineState
from tests.ranks import on_ranks
from tests.stores import Bucket
from tests.training.checkpoints.test_local import state
from tests.training.test_trainer import NAMES, assert_same, run
from tests.worlds import make_domains

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(data, tmp_path_factory.mktemp("straight"), noise=True, checkpoint_every=1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITS", (0.01, 0.01))


def save(folder: Path, step: int, best: int | None = None) -> Path:
    """A checkpoint of a step, after the best weights of an epoch."""
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
def test_what_was_copied_is_brought_byte_for_byte_and_the_retention_holds_there_too(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    place = {"file": f"file://{tmp_path}/there", "memory": f"memory://{uuid.uuid4()}", "folder": f"{tmp_path}/there"}
    if kind == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        place["s3"] = f"{bucket.uri}/deep"
    copy, here = Remote(f"{place[kind]}/runs/one/"), tmp_path / "here"
    for step, best in ((2, None), (4, 1), (6, 1), (11, 2), (13, 2), (15, 3)):
        save(here, step, best)
        copy.upload(here, step, keep=2, keep_every=4)
    assert copy.steps() == [
        4,
        11,
        13,
        15,
    ]  # 4, 11 (the first from 8 on) and 13 (from 12) for good; 13, 15 are the newest
    assert sorted(copy._names("best")) == [f"epoch-0000{epoch}.safetensors" for epoch in (1, 2, 3)]
    copy.bring(tmp_path / "new")
    wanted = {name: content for name, content in contents(here).items() if "step-00000015" in name or "00003" in name}
    assert contents(tmp_path / "new") == wanted and len(wanted) == 5
    found = load_latest(tmp_path / "new" / "checkpoints")
    assert found is not None and found.state.updates == 15
    if kind != "memory":
        files = bucket.contents("deep") if kind == "s3" else contents(tmp_path / "there")
        files = {name.partition("runs/one/")[2]: content for name, content in files.items()}
        assert {name for name in files if not name.startswith(("best/", "checkpoints/step-"))} == set()
        assert not [name for name in files if name.endswith(".partial")]


def test_what_a_restart_has_undone_and_what_a_killed_copy_left_goes(tmp_path: Path) -> None:
    copy, here, there = Remote(str(tmp_path / "there")), tmp_path / "here", tmp_path / "there" / "checkpoints"
    for step in (2, 4, 9):
        save(here, step)
        copy.upload(here, step, 3, None)
    (there / "step-00000004" / "COMPLETE.json").unlink()
    save(here, 6)
    copy.upload(here, 6, 3, None)
    assert sorted(path.name for path in there.iterdir()) == ["step-00000002", "step-00000006"]


def test_nothing_is_brought_where_the_folder_is_as_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    copy.bring(here)
    assert not here.exists()
    save(here, 2)
    save(here, 4)
    copy.upload(here, 2, 2, None)
    copy.upload(here, 4, 2, None)
    before = contents(here)
    copy.bring(here)
    assert contents(here) == before and capsys.readouterr().err == ""


def test_a_damaged_one_here_is_replaced_by_its_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    for step in (2, 4):
        save(here, step)
        copy.upload(here, step, 2, None)
    before = contents(here)
    corrupt(here / "checkpoints" / "step-00000004" / "moments.safetensors", "flip")
    copy.bring(here)
    assert contents(here) == before
    assert "the checkpoint of step 4 was brought from" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
@pytest.mark.parametrize(
    "file", ["weights.safetensors", "moments.safetensors", "progress.json", "COMPLETE.json", "epoch-00002.safetensors"]
)
def test_a_damaged_copy_is_named_and_the_one_before_is_used(
    tmp_path: Path, file: str, how: Literal["cut", "flip", "gone"], capsys: pytest.CaptureFixture[str]
) -> None:
    copy, here, there = Remote(f"file://{tmp_path}/there"), tmp_path / "here", tmp_path / "there"
    for step, best in ((2, 1), (4, 2)):
        save(here, step, best)
        copy.upload(here, step, 2, None)
    newest = there / "checkpoints" / "step-00000004"
    corrupt(there / "best" / file if "epoch" in file else newest / file, how)
    copy.bring(tmp_path / "new")
    found = load_latest(tmp_path / "new" / "checkpoints")
    assert found is not None and found.state.updates == 2 and steps_in(tmp_path / "new" / "checkpoints") == [2]
    told = capsys.readouterr().err
    if (file, how) == ("COMPLETE.json", "gone"):
        assert "passed over" not in told  # it does not count
    else:
        assert f"the checkpoint of step 4 is passed over: {there.as_uri()}/" in told
        assert file in told or (file, how) == ("COMPLETE.json", "flip")  # then a file is not as it says
        assert copy.steps() == [2], "the damaged one stays, and would push out whole ones"


def test_where_all_copies_are_damaged_nothing_begins_anew_and_nothing_is_removed(tmp_path: Path) -> None:
    copy, here, there = Remote(str(tmp_path / "there")), tmp_path / "here", tmp_path / "there"
    for step in (2, 4):
        save(here, step)
        copy.upload(here, step, 2, None)
        corrupt(there / "checkpoints" / f"step-0000000{step}" / "weights.safetensors", "cut")
    before = contents(there)
    with pytest.raises(
        UserError, match=r"there/checkpoints: all checkpoints are damaged, the oldest too: .*02/weights"
    ):
        copy.bring(tmp_path / "new")
    assert contents(there) == before
    corrupt(here / "checkpoints" / "step-00000004" / "progress.json", "cut")
    copy.bring(here)  # goes on from its own
    assert load_latest(here / "checkpoints").state.updates == 2  # type: ignore[union-attr]


def test_a_checkpoint_that_is_damaged_here_is_not_copied(tmp_path: Path) -> None:
    copy, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    corrupt(save(here, 2) / "weights.safetensors", "flip")
    with pytest.raises(UserError, match=r"weights\.safetensors: missing, cut short or altered"):
        copy.upload(here, 2, 2, None)
    assert copy.steps() == []


# -- a training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "kind"), [(1, "file"), (2, "file"), (1, "s3"), pytest.param(2, "s3", marks=pytest.mark.slow)]
)
def test_a_run_whose_folder_is_gone_goes_on_from_its_copy_bit_for_bit(
    data: Path, tmp_path: Path, straight: dict[str, Any], ranks: int, kind: str, request: pytest.FixtureRequest
) -> None:
    """Law 3; the leader brings it, and all ranks go on from there."""
    options: dict[str, Any] = {"noise": True, "checkpoint_every": 1}
    uri = f"file://{tmp_path}/there" if kind == "file" else f"{request.getfixturevalue('s3').uri}/runs/lost"
    elsewhere = {**options, "remote": uri}
    if ranks == 1:
        run(data, tmp_path / "lost", **elsewhere, stop_after=5)
        shutil.rmtree(tmp_path / "lost")
        resumed = run(data, tmp_path / "lost", **elsewhere)
    else:
        straight = on_ranks(2, _run, data, tmp_path / "straight", options)[0]
        on_ranks(2, _run, data, tmp_path / "lost", {**elsewhere, "stop_after": 5})
        shutil.rmtree(tmp_path / "lost")
        resumed = on_ranks(2, _run, data, tmp_path / "lost", elsewhere)[0]
    assert len(resumed["curve"]) == len(straight["curve"]) - 5
    assert_same({**straight, "curve": straight["curve"][5:]}, resumed)
    assert resumed["history"] == straight["history"]
    # at the end the copy is what the folder is
    if kind == "s3":
        S3FileSystem(use_listings_cache=False).get(uri, f"{tmp_path}/there", recursive=True)
    steps = steps_in(tmp_path / "lost" / "checkpoints")[-1:]
    assert steps_in(tmp_path / "there" / "checkpoints")[-1:] == steps
    mine, theirs = contents(tmp_path / "lost"), contents(tmp_path / "there")
    names = [name for name in mine if name.startswith(("best/", f"checkpoints/step-{steps[0]:08d}"))]
    assert len(names) >= 5 and {name: mine[name] for name in names} == {name: theirs[name] for name in names}


def _run(data: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run(data, folder, **options)


def test_all_ranks_hear_that_the_copy_cannot_be_used(data: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    run(data, tmp_path / "a", remote=str(there), epochs=1)
    shutil.rmtree(tmp_path / "a")
    for file in there.rglob("weights.safetensors"):
        corrupt(file, "cut")
    for told in on_ranks(2, _refused, data, tmp_path / "a", {"remote": str(there)}):
        assert "all checkpoints are damaged" in told and "weights.safetensors" in told


def _refused(data: Path, folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        run(data, folder, **options)
    return str(caught.value)


# the arguments: data, folder, URI, and the write to the remote storage in whose middle to die
KILLED = """
import os, signal, sys, threading
from pathlib import Path
from fsspec.implementations.local import LocalFileSystem
from tests.training.test_trainer import run

fatal, writes = sys.argv[4], []

def deadly(place, content):
    writes.append(place)
    if "step-00000005" in place and fatal in place:
        assert threading.current_thread() is not threading.main_thread(), "not in the background"
        Path(place).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    Path(place).write_bytes(content)

LocalFileSystem.put_file = lambda self, here, place, **_: deadly(place, Path(here).read_bytes())
LocalFileSystem.pipe_file = lambda self, place, content, **_: deadly(place, content)
try:
    run(Path(sys.argv[1]), Path(sys.argv[2]), noise=True, checkpoint_every=1, stop_after=2, remote=sys.argv[3])
finally:
    print(*writes, sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize("file", ["weights.safetensors", "progress.json", "COMPLETE.json"])
def test_killed_in_the_middle_of_a_copy_no_marker_is_there_and_the_run_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, straight: dict[str, Any], file: str
) -> None:
    """The folder is lost besides: the run goes on from what was copied whole before."""
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
    whole = Remote(there.as_uri()).steps()
    assert whole[-1] in (3, 4) and whole == steps_in(there / "checkpoints")
    shutil.rmtree(tmp_path / "killed")
    resumed = run(data, tmp_path / "killed", noise=True, checkpoint_every=1, remote=there.as_uri())
    assert_same({**straight, "curve": straight["curve"][whole[-1] :]}, resumed)
    assert resumed["history"] == straight["history"]


# the arguments: the URI, the run's folder, one that is new; says by how many bytes sending and fetching let the memory grow
FREIGHT = r"""
import json, re, sys
from pathlib import Path
from antdist.training.checkpoints.remote import Remote

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

copy = Remote(sys.argv[1])
copy.check()
before = peak()
copy.upload(Path(sys.argv[2]), 2, 2, None)
sent = peak()
copy.bring(Path(sys.argv[3]))
print(json.dumps([sent - before, peak() - before]))
"""


@pytest.mark.slow
def test_a_checkpoint_of_hundreds_of_megabytes_goes_and_comes_in_little_memory(s3: Bucket, tmp_path: Path) -> None:
    size = 384 * 2**20
    heavy = EngineState(weights={"w": torch.randn(size // 4)}, moments={"exp_avg": {"w": torch.zeros(4)}}, updates=2)
    save_checkpoint(tmp_path / "here" / "checkpoints", 2, heavy, {"progress": {"step": 2}}, 9)
    done = subprocess.run(
        [sys.executable, "-c", FREIGHT, f"{s3.uri}/run", tmp_path / "here", tmp_path / "new"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout)) < size * 0.7, done.stdout
    assert load_latest(tmp_path / "new" / "checkpoints") is not None  # by its digests


# -- storage that cannot be used -----------------------------------------------------------------------------------------


def test_storage_that_cannot_be_used_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(known_storage, "s3", raising=False)
    (tmp_path / "file").touch()
    for uri, message in (
        (
            "s3://bucket/runs",
            r"ray.remote_storage s3://bucket/runs: the package for s3:// \(s3fs\) is missing\. `pip install s3fs`",
        ),
        ("nowhere://x", r"ray.remote_storage nowhere://x: it cannot be used \(Protocol not known: nowhere\)"),
        ("memory://runs", "it is seen by one process alone, and ends with it"),
        ("simplecache::file:///x", r"it names several storages\. Give one"),
        (f"file://{tmp_path}/file/below", r"/file/below: it cannot be written: .*Not a directory.*leave the key out"),
    ):
        with pytest.raises(UserError, match=message):
            Remote(uri).check()
    Remote(f"file://{tmp_path}/new/folder").check()
    assert list((tmp_path / "new" / "folder").iterdir()) == [], "the probe stays"


def test_a_bucket_that_is_not_there_or_not_ours_is_told(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ray.remote_storage s3://nobody-s/x: it cannot be written: .*does not exist"):
        Remote("s3://nobody-s/x").check()
    Remote(f"{s3.uri}/new").check()
    assert s3.contents() == {}, "the probe stays"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"it cannot be written: .*Unable to locate credentials"):
        Remote(s3.uri).check()


class Silent(fsspec.AbstractFileSystem):
    """Never answers."""

    protocol = "silent"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        threading.Event().wait()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass


def test_storage_that_never_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"silent://x: it cannot be written: no answer in 0\.05 seconds"):
        Remote("silent://x").check()


@pytest.mark.parametrize("file", ["moments.safetensors", "epoch-00002.safetensors"])
def test_a_connection_that_breaks_while_a_copy_is_brought_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    copy, here = Remote(str(tmp_path / "there")), tmp_path / "here"
    for step, best in ((2, 1), (4, 2)):
        save(here, step, best)
        copy.upload(here, step, 2, None)
    there, get = contents(tmp_path / "there"), copy._files.get_file

    def breaking(path: str, place: str, **options: Any) -> None:
        if file in path:
            Path(place).write_bytes(b"half")
            raise OSError("connection reset")
        get(path, place, **options)

    monkeypatch.setattr(copy._files, "get_file", breaking)
    with pytest.raises(UserError, match=r"does not answer, or refuses \(connection reset"):
        copy.bring(tmp_path / "new")
    assert contents(tmp_path / "there") == there and load_latest(tmp_path / "new" / "checkpoints") is None
    monkeypatch.setattr(copy._files, "get_file", get)
    copy.bring(tmp_path / "new")
    assert steps_in(tmp_path / "new" / "checkpoints") == [4]
    assert not [name for name in contents(tmp_path / "new") if ".bringing" in name or ".partial" in name]


def test_storage_that_is_away_at_a_resume_is_waited_for_and_then_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a whole checkpoint at hand the run goes on without; else it must not begin anew."""
    (tmp_path / "file").touch()
    copy, here = Remote(f"{tmp_path}/file/below"), tmp_path / "here"
    with pytest.raises(
        UserError, match=r"ray.remote_storage .*does not answer, or refuses .*there may be checkpoints.*[Mm]end"
    ):
        copy.bring(here)
    assert capsys.readouterr().err.count("Trying again") == 2
    save(here, 2)
    copy.bring(here)
    assert "The run goes on from its own folder" in capsys.readouterr().err
