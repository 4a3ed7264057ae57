"""`antdist score`: what `recommend` returns for each user, in complete files, written once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from antdist import faults
from antdist.config.schema import ModelConfig
from antdist.data.domain import Domain, open_domain
from antdist.data.ingest.append import append_to_domain
from antdist.data.ingest.prepare import prepare_domain
from antdist.errors import UserError
from antdist.features.catalogue import Catalogue
from antdist.model.io import FeatureSource, ModelCard, save_model
from antdist.model.recommender import build_recommender
from antdist.serving import scorer as scorer_module
from antdist.serving.apply import embed_domain, evaluate_model, find_model, open_model, recommend_items
from antdist.serving.score import ScoreReport, score
from antdist.serving.scorer import item_ranges
from antdist.serving.top_n import recommend
from tests.stores import Bucket
from tests.worlds import give_features, make_domain

PROJECT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(modalities=["text", "price"], dim=16, inner=16, experts=2, max_length=4)


def save(folder: Path, domain: Domain, config: ModelConfig = CONFIG, **card: Any) -> Path:
    catalogue = Catalogue([domain], config.modalities)
    size = catalogue.size if config.item_embeddings else None
    model = build_recommender(config, catalogue.dims, size, seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    features = {m: FeatureSource(identity=identity) for m, identity in catalogue.identities.items()}
    described = {"kind": "pretrained", "config": config, "dims": catalogue.dims, "features": features, **card}
    save_model(folder, model, ModelCard(catalogue_size=size, **described))
    return folder


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    """100 users in 13 blocks of 3 shards, 30 items in 5 shards."""
    parent = tmp_path_factory.mktemp("data")
    return make_domain(parent, "food", users=100, missing=0.0, blocks_per_shard=5, items_per_shard=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, domain: Domain) -> Path:
    return save(tmp_path_factory.mktemp("model"), domain)


def run(model: Path, domain: Domain, out: Path | str, **options: Any) -> ScoreReport:
    return score(find_model(str(model), Path("runs")), domain, str(out), **{"workers": 0, **options})


def rows(out: Path) -> dict[str, list[tuple[str, float]]]:
    """As whoever reads a folder of Parquet files reads it."""
    table = pq.read_table(out).to_pylist()
    return {row["user_id"]: list(zip(row["items"], row["scores"], strict=True)) for row in table}


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("part-*"))}


def one_at_a_time(
    model: Path, domain: Domain, n: int, *, include_seen: bool = False
) -> dict[str, list[tuple[str, float]]]:
    found = find_model(str(model), Path("runs"))
    embeddings, sequences = embed_domain(found.model, found.card, domain), domain.sequences()
    item_ids, best = domain.item_ids(), {}
    for user, user_id in enumerate(domain.user_ids()):
        history = sequences.items[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
        found_items = recommend(found.model, embeddings, history, n, exclude_history=not include_seen)
        best[user_id] = [(item_ids[index], score) for index, score in found_items]
    return best


def assert_same(found: dict[str, list[tuple[str, float]]], expected: dict[str, list[tuple[str, float]]]) -> None:
    assert list(found) == list(expected)
    for user, best in expected.items():
        assert [item for item, _ in found[user]] == [item for item, _ in best], user
        np.testing.assert_allclose([s for _, s in found[user]], [s for _, s in best], atol=1e-6)


def test_evaluate_and_recommend_read_a_domain_from_a_uri(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the cache is that verbs have
    uri = f"file://{domain.folder}"
    run(model, domain, tmp_path / "near")
    run(model, open_domain(uri), tmp_path / "far")
    assert rows(tmp_path / "far") == rows(tmp_path / "near")
    asked = [open_model(str(model), place, Path("runs")) for place in (str(domain.folder), uri)]
    assert evaluate_model(asked[0], "test") == evaluate_model(asked[1], "test")
    near, far = (recommend_items(opened, user="user-3", history=None, n=4) for opened in asked)
    assert near == far
    (cache,) = tmp_path.glob("antdist-cache-*")
    assert len(list(cache.iterdir())) > 10


@pytest.mark.parametrize(
    "options",
    [
        {"n": 5},
        {"n": 5, "include_seen": True},
        {"n": 5, "batch_size": 3},
        {"n": 100},  # more than there are: those that a user has not seen
    ],
)
def test_score_equals_recommend_for_every_user(
    model: Path, domain: Domain, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = run(model, domain, tmp_path / "out", **options)
    expected = one_at_a_time(model, domain, options["n"], include_seen=options.get("include_seen", False))
    assert_same(rows(tmp_path / "out"), expected)
    assert (report.users, report.rows) == (100, sum(map(len, expected.values())))
    assert (report.parts, report.fresh_parts, report.fresh_users) == (13, 13, 100)
    assert pq.read_schema(tmp_path / "out" / "part-00000.parquet").field("scores").type == pa.list_(pa.float32())


def test_ranges_and_pieces_do_not_change_scores(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, domain, tmp_path / "whole")
    monkeypatch.setattr("antdist.serving.top_n.PIECE", 4)
    monkeypatch.setattr("antdist.serving.scorer.RANGE_ITEMS", 10)
    assert item_ranges(domain) == [(0, 2), (2, 4), (4, 5)]
    run(model, domain, tmp_path / "pieces")
    assert_same(rows(tmp_path / "pieces"), rows(tmp_path / "whole"))


def test_summary_lists_inputs_and_files(model: Path, domain: Domain, tmp_path: Path) -> None:
    from hashlib import sha256

    run(model, domain, tmp_path, n=3)
    said = json.loads((tmp_path / "_score.json").read_text())
    assert (said["model"], said["domain"], said["users"], said["rows"]) == (str(model), "food", 100, 300)
    weights = sha256((model / "weights.safetensors").read_bytes()).hexdigest()
    assert said["inputs"].items() >= {"model.weights": weights, "domain": domain.fingerprint, "n": "3"}.items()
    assert {file["name"]: file["sha256"] for file in said["files"]} == {
        name: sha256(data).hexdigest() for name, data in parts(tmp_path).items()
    }
    assert [file["users"] for file in said["files"]] == [8] * 12 + [4]


def test_resume_scores_only_missing_and_damaged_parts(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, domain, tmp_path)
    before, summary = parts(tmp_path), (tmp_path / "_score.json").read_bytes()
    scored: list[int] = []
    real = scorer_module.Scorer.score
    monkeypatch.setattr(
        scorer_module.Scorer, "score", lambda self, part: scored.append(part.number) or real(self, part)
    )
    report = run(model, domain, tmp_path)
    assert scored == [] and report.fresh_parts == 0 and "13 of them finished before" in report.lines()[0]
    (tmp_path / "part-00003.parquet").unlink()
    faults.corrupt(tmp_path / "part-00005.parquet", "flip")
    (tmp_path / "_parts" / "00007.json").write_text("{")
    run(model, domain, tmp_path)
    assert scored == [3, 5, 7]
    assert parts(tmp_path) == before and (tmp_path / "_score.json").read_bytes() == summary

    (tmp_path / "part-00001.parquet").unlink()
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"fault": "raise", "at": "score"}]))
    with pytest.raises(RuntimeError):
        run(model, domain, tmp_path)
    assert not (tmp_path / "_score.json").exists()  # no longer true


def test_interrupted_run_leaves_no_summary_or_partial_file(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, domain, tmp_path / "straight")
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"fault": "raise", "at": "score", "step": 4}]))
    with pytest.raises(RuntimeError):
        run(model, domain, tmp_path / "out")
    assert sorted(parts(tmp_path / "out")) == [f"part-{n:05d}.parquet" for n in range(4)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name.startswith((".", "_"))) == ["_parts"]
    monkeypatch.delenv(faults.VARIABLE)
    (tmp_path / "out" / ".part-00004.parquet.node-7.tmp").write_bytes(b"half")  # as a killed one leaves it
    assert run(model, domain, tmp_path / "out").fresh_parts == 9
    assert parts(tmp_path / "out") == parts(tmp_path / "straight")
    assert not list((tmp_path / "out").glob(".*"))


def test_zero_shot_items_and_new_users_are_scored(model: Path, tmp_path: Path) -> None:
    """The domain has grown; the model has not: new items are recommended, new users are served."""
    grown = make_domain(tmp_path, "food", users=130, items=45, missing=0.0)
    run(model, grown, tmp_path / "out", n=45)
    found = rows(tmp_path / "out")
    assert_same(found, one_at_a_time(model, grown, 45))
    assert len(found) == 130 and "user-129" in found
    shown = {item for best in found.values() for item, _ in best[:10]}
    assert shown & {f"food-{item}" for item in range(30, 45)}


def test_appended_domain_and_pending_users(tmp_path: Path) -> None:
    """Users whom a later shard supersedes are scored once, with full history; pending users, too."""
    source = tmp_path / "source"
    source.mkdir()
    interactions, items = source / "interactions.csv", source / "items.csv"
    interactions.write_text(
        "user_id,item_id,timestamp\n"
        + "".join(f"{user},{item},{n}\n" for user in "uvw" for n, item in enumerate("abcd"))
        + "p,a,5\np,b,6\nq,c,7\n"
    )
    items.write_text("item_id\n" + "".join(f"{item}\n" for item in "abcdef"))
    prepare_domain(source, domain="food", out=tmp_path / "data", block_users=2)
    model = save(tmp_path / "model", featured(open_domain(tmp_path / "data" / "food")))
    interactions.write_text("user_id,item_id,timestamp\nv,e,20\np,g,22\nr,a,23\n")
    items.write_text("item_id\ng\nh\n")
    append_to_domain(source, domain="food", out=tmp_path / "data", block_users=2)
    grown = featured(open_domain(tmp_path / "data" / "food"))

    report = run(model, grown, tmp_path / "out", n=8)
    expected = one_at_a_time(model, grown, 8)
    assert sorted(expected) == ["p", "u", "v", "w"]
    found, item_ids = find_model(str(model), Path("runs")), grown.item_ids()
    embeddings = embed_domain(found.model, found.card, grown)
    for user, item in (("q", "c"), ("r", "a")):
        best = recommend(found.model, embeddings, [item_ids.index(item)], 8)
        expected[user] = [(item_ids[index], score) for index, score in best]
    assert_same(rows(tmp_path / "out"), expected)
    assert report.users == 6 and pq.read_table(tmp_path / "out").num_rows == 6
    assert [item for item, _ in expected["p"] if item in "abg"] == []
    assert {"h"} < {item for item, _ in expected["q"]}


def featured(domain: Domain) -> Domain:
    for modality, dim in (("text", 12), ("price", 6)):
        give_features(domain, modality, dim)
    return domain


@pytest.mark.parametrize("change", [{"n": 11}, {"include_seen": True}, {"model": 1}, {"features": 1}, {"users": 90}])
def test_changed_inputs_are_refused_by_name(
    model: Path, domain: Domain, tmp_path: Path, change: dict[str, Any]
) -> None:
    copy = tmp_path / "food"
    shutil.copytree(domain.folder, copy)
    run(model, open_domain(copy), tmp_path / "out")
    before, options = parts(tmp_path / "out"), dict(change)
    told = {
        "n": "n was 10, now it is 11",
        "include_seen": "include_seen was False, now it is True",
        "model": "model.weights was",
        "features": "features.text was",
        "users": f"domain was {domain.fingerprint[:12]}, now it is",
    }[next(iter(change))]
    if options.pop("model", 0):
        other = tmp_path / "model"
        shutil.copytree(model, other)
        weights = other / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-2] ^= 1
        weights.write_bytes(data)
        model = other
    if options.pop("features", 0):
        give_features(open_domain(copy), "text", 12, seed=9)
    if options.pop("users", 0):
        shutil.rmtree(copy)
        make_domain(tmp_path, "food", users=90, missing=0.0)
    with pytest.raises(UserError, match=rf"out: holds scores of other inputs: {told}.*Name another --out"):
        run(model, open_domain(copy), tmp_path / "out", **options)
    assert parts(tmp_path / "out") == before


def test_a_folder_with_foreign_files_is_refused(model: Path, domain: Domain, tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes(b"of somebody else")
    with pytest.raises(UserError, match=r"is not empty, and `antdist score` did not create it\. Name another --out"):
        run(model, domain, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_mismatched_features_are_refused_before_writing(model: Path, domain: Domain, tmp_path: Path) -> None:
    bare = make_domain(tmp_path, "bare", dims={})
    with pytest.raises(UserError, match="domain bare has no text features"):
        run(model, bare, tmp_path / "out")
    other = make_domain(tmp_path, "other", dims={})
    give_features(other, "text", 12, encoder="another")
    give_features(other, "price", 6)
    with pytest.raises(UserError, match="text features of different encoders cannot be mixed"):
        run(model, other, tmp_path / "out")
    own = save(tmp_path / "ant-t", domain, CONFIG.model_copy(update={"item_embeddings": True}),
               target="food", made={"fingerprint": "0" * 64})  # fmt: skip
    with pytest.raises(
        UserError,
        match=r"an embedding for each item of food at fingerprint 000000000000.*or a model without model.item_e",
    ):
        run(own, domain, tmp_path / "out")
    with pytest.raises(UserError, match="--device cuda: there is no GPU"):
        run(model, domain, tmp_path / "gpu", device="cuda")
    assert not (tmp_path / "out").exists()


def test_output_to_a_uri_equals_output_to_a_folder(model: Path, domain: Domain, tmp_path: Path) -> None:
    import fsspec

    run(model, domain, tmp_path / "here")
    report = run(model, domain, "memory://scores/food")
    files = fsspec.filesystem("memory")
    assert {name: files.cat_file(f"/scores/food/{name}") for name in parts(tmp_path / "here")} == parts(
        tmp_path / "here"
    )
    assert json.loads(files.cat_file("/scores/food/_score.json"))["users"] == report.users == 100
    files.rm_file("/scores/food/part-00002.parquet")
    assert run(model, domain, "memory://scores/food").fresh_parts == 1
    with pytest.raises(UserError, match="memory://scores/food: holds scores of other inputs: n was 10"):
        run(model, domain, "memory://scores/food", n=3)
    with pytest.raises(UserError, match=r"--out nowhere://x: it cannot be used \(Protocol not known: nowhere\)"):
        run(model, domain, "nowhere://x")


def test_domain_from_a_uri_scores_the_same(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the cache is
    run(model, domain, tmp_path / "here")
    run(model, open_domain(f"file://{domain.folder}"), tmp_path / "there")
    assert parts(tmp_path / "there") == parts(tmp_path / "here")


@pytest.mark.ray
@pytest.mark.slow
def test_output_to_s3_equals_output_to_a_folder(model: Path, domain: Domain, tmp_path: Path, s3: Bucket) -> None:
    """The S3 client caches its listings; files that workers wrote since must be found."""
    run(model, domain, tmp_path / "here")
    out = f"{s3.uri}/scores"
    assert run(model, domain, out, workers=2, threads=1).fresh_parts == 13
    there = s3.contents("scores")
    assert {name: there[f"scores/{name}"] for name in parts(tmp_path / "here")} == parts(tmp_path / "here")
    assert json.loads(there["scores/_score.json"])["users"] == 100
    s3.files().rm_file(f"{s3.name}/scores/part-00002.parquet")
    assert run(model, domain, out).fresh_parts == 1
    assert s3.contents("scores") == there
    with pytest.raises(
        UserError,
        match=r"^s3://nowhere-\S+: cannot be written to \(.* bucket does not exist\)\. Create the bucket first\.$",
    ):
        run(model, domain, f"s3://nowhere-{s3.name}/scores")


@pytest.mark.ray
def test_ray_workers_survive_a_kill_and_write_the_same_bytes(
    model: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr("antdist.serving.scorer.RANGE_ITEMS", 10)  # the catalogue in three objects
    run(model, domain, tmp_path / "here")
    once = tmp_path / "once"
    monkeypatch.setenv(faults.VARIABLE, json.dumps([{"fault": "kill", "at": "score", "step": 6, "once": str(once)}]))
    monkeypatch.chdir(tmp_path)
    report = run(model, open_domain(os.path.relpath(domain.folder)), "out", workers=2, threads=1)
    assert once.exists() and not ray.is_initialized()
    assert report.fresh_parts == 13
    assert parts(tmp_path / "out") == parts(tmp_path / "here")
    assert (tmp_path / "out" / "_score.json").read_bytes() == (tmp_path / "here" / "_score.json").read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


def files(out: Path, pattern: str) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob(pattern)}


@pytest.mark.ray
@pytest.mark.slow
def test_resume_after_kill_keeps_finished_parts(model: Path, domain: Domain, tmp_path: Path) -> None:
    run(model, domain, tmp_path / "straight", n=4)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "antdist", "score", str(model), str(domain.folder), "--out", str(out), "-n", "4"]
    stall = json.dumps([{"fault": "stall", "at": "score", "step": 7}])
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(
            command, env={**environment, faults.VARIABLE: stall}, cwd=PROJECT, stdout=said, stderr=said
        )
    deadline = time.monotonic() + 240
    while len(files(out, "_parts/0*.json")) < 9:
        assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(2)  # its workers end with it
    assert not (out / "_score.json").exists() and not (out / "part-00007.parquet").exists()
    notes, finished = files(out, "_parts/0*.json"), files(out, "part-*")
    done = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"{len(notes)} of them finished before" in done.stdout
    kept = {name for name in finished if f"{name[5:10]}.json" in notes}
    assert len(kept) >= 9 and {name: files(out, "part-*")[name] for name in kept} == {n: finished[n] for n in kept}
    assert files(out, "_parts/0*.json").items() >= notes.items()
    assert parts(out) == parts(tmp_path / "straight") and not list(out.glob(".*"))
