"""The plan's arithmetic against what is built, written and simulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from antdist.cli.main import cli
from antdist.config.load import check_config
from antdist.config.schema import ModelConfig, PretrainConfig, TrainingConfig
from antdist.errors import UserError
from antdist.planning.calibration import Calibration, _host_memory, calibrate, fit_line, read_calibration
from antdist.planning.costs import (
    BUCKET,
    MACHINES,
    checkpoint_bytes,
    count_parameters,
    count_popularity,
    count_windows,
    estimate_lengths,
    expected_distinct,
    expected_step,
    make_plan,
    state_memory,
    zipf,
)
from antdist.planning.report import PAPER, plan_run, workload_of_size
from benchmarks.processes import run_in_fresh_process
from tests.worlds import make_domains

DIMS = {"text": 12, "image": 10, "price": 6}
WIDE = {"text": 768, "image": 1024, "price": 64}
H100 = MACHINES["h100"]
DATA = workload_of_size("paper", *PAPER, WIDE, 4.0 * sum(WIDE.values()))


def config(**sections: Any) -> PretrainConfig:
    return check_config(PretrainConfig, sections)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixture": False, "layers": 3, "inner": 24},
        {"item_embeddings": True},
        {"modalities": ["text"], "max_length": 7},
    ],
)
def test_parameters_are_those_of_the_model(changes: dict[str, Any]) -> None:
    from antdist.model.recommender import build_recommender

    model = ModelConfig(**{"dim": 16, "inner": 8, "experts": 3, "heads": 2, **changes})
    built = build_recommender(model, DIMS, 33 if model.item_embeddings else None)
    dims = {m: DIMS[m] for m in model.modalities}
    assert count_parameters(model, dims, 33) == sum(p.numel() for p in built.parameters())


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    from antdist.distributed.world import World
    from antdist.model.recommender import build_recommender
    from antdist.training.checkpoints.local import save_checkpoint
    from antdist.training.engines.plain import PlainEngine

    model = ModelConfig(dim=64, inner=64)
    engine = PlainEngine(build_recommender(model, WIDE), TrainingConfig(engine="plain"), World())
    folder = save_checkpoint(tmp_path, 1, engine.state(), {"best": None}, keep=2)
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert checkpoint_bytes(count_parameters(model, WIDE, 0)) == pytest.approx(written, rel=0.02)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2])
def test_distinct_items_are_those_of_a_simulation(exponent: float) -> None:
    random = np.random.default_rng(0)
    chance = (np.arange(5000) + 11.0) ** -exponent
    drawn = random.choice(5000, size=(50, 3000), p=chance / chance.sum())
    found = np.mean([len(np.unique(batch)) for batch in drawn])
    assert expected_distinct(3000, zipf(5000, 1e7, exponent)) == pytest.approx(found, rel=0.01)


def test_expected_distinct_items_equal_a_shuffled_epoch() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(0, 6, 1000)
    epoch = np.repeat(np.arange(1000), counts)
    assert expected_distinct(len(epoch), count_popularity(counts)) == pytest.approx((counts > 0).sum(), rel=1e-3)
    found = np.mean([len(np.unique(random.permutation(epoch)[:900])) for _ in range(50)])
    assert expected_distinct(900, count_popularity(counts)) == pytest.approx(found, rel=0.01)
    drawn = np.mean(
        [len(np.unique(np.r_[random.permutation(epoch)[:300], random.integers(0, 1000, 400)])) for _ in range(50)]
    )
    assert expected_distinct(300, count_popularity(counts), uniform=400) == pytest.approx(drawn, rel=0.01)


@pytest.mark.parametrize("mode", ["sequence", "prefix"])
def test_counted_windows_equal_the_streams(mode: str) -> None:
    from antdist import ragged
    from antdist.data.stream.windows import PackedWindows, prefix_windows, user_windows

    lengths = np.random.default_rng(0).integers(3, 60, 300)
    train, begin = lengths - 2, ragged.offsets(lengths - 2)
    items = np.zeros(begin[-1], dtype=np.int64)
    cut: PackedWindows
    if mode == "sequence":
        cut = user_windows(items, begin[:-1], train, np.arange(300), 9)
    else:
        places = [(user, place) for user, n in enumerate(train.tolist()) for place in range(1, n)]
        users, position = np.array(places).T
        cut = prefix_windows(items, begin[users], position, users, 9)
    sizes = np.diff(cut.offsets)
    told = count_windows(lengths.astype(float), 9, mode)
    assert told.windows * 300 == pytest.approx(len(sizes))
    assert told.tokens * 300 == pytest.approx(sizes.sum())
    assert told.pairs * 300 == pytest.approx((sizes * (sizes + 1) / 2).sum())
    assert told.predictions * 300 == pytest.approx(len(cut.targets))


def test_estimated_lengths_have_their_mean() -> None:
    assert estimate_lengths(9.3).mean() == pytest.approx(9.3, rel=0.02) and estimate_lengths(9.3).min() >= 5


def test_zero_divides_what_its_stage_divides() -> None:
    def parts(stage: int, **training: Any) -> dict[str, float]:
        return state_memory(config(training={"zero_stage": stage, **training}), 1000, 4)

    plain = {"weights": 4000, "gradients": 4000, "moments": 8000}
    assert parts(0) == plain and parts(3, engine="plain") == plain
    assert parts(1) == {**plain, "moments": 2000, "second weights": 1000, "DeepSpeed's buffer": 4 * BUCKET}
    assert parts(2)["gradients"] == 1000 and parts(2)["weights"] == 4000
    assert parts(3) == {"weights": 1000, "gradients": 1000, "moments": 2000}
    smaller = parts(1, deepspeed={"zero_optimization": {"reduce_bucket_size": 500, "overlap_comm": True}})
    assert smaller["DeepSpeed's buffer"] == 4000


def test_the_bottleneck_is_what_is_made_scarce() -> None:
    run = config(training={"precision": "bf16"}, stream={"batch_size": 32768})
    # far more items than a GPU holds features of, and no page cache for the half of them
    data = workload_of_size("large", 10_000_000, 4_000_000, 100_000_000, WIDE, 4.0 * sum(WIDE.values()))
    assert make_plan(run, data, 16, H100).bottleneck == "compute"
    scarce = {
        "interconnect": replace(H100, network=1e7),
        "feature look-up": replace(H100, lookup=1e6),
        "storage": replace(H100, node_memory=1.5e10, storage=1e6),
        "memory": replace(H100, memory=1e9),
    }
    settings = set()
    for resource, machine in scarce.items():
        plan = make_plan(run, data, 16, machine)
        assert plan.bottleneck == resource
        assert plan.step_seconds >= make_plan(run, data, 16, H100).step_seconds
        settings.add(plan.setting)
    assert len(settings) == 4 and "reduce_bucket_size" in make_plan(run, data, 16, scarce["memory"]).setting


def test_ranks_share_a_step_and_its_batch_stays() -> None:
    run = config(stream={"batch_size": 8192})
    one, four = (expected_step(run, DATA, ranks) for ranks in (1, 4))
    assert four.items == one.items and four.rank.items == one.items / 4 and four.rank.candidates == one.rank.candidates
    halved = expected_step(config(stream={"batch_size": 8192}, training={"accumulation": 2}), DATA, 1)
    assert halved.rank.predictions == 4096 and 0.5 * one.items < halved.items < one.items
    everything = expected_step(config(loss={"negatives": "catalogue"}), DATA, 1)
    assert everything.items == everything.rank.candidates == DATA.items


def test_an_expected_step_is_an_average_batch(tmp_path: Path) -> None:
    """Of prepared domains, through the stream and the deal."""
    from antdist.data.stream.shard_batch import shard_batch
    from antdist.data.stream.stream import Stream
    from antdist.planning.calibration import count_step

    domains = make_domains(tmp_path, ["aa", "bbb"], users=600, items=400, block_users=64)
    run = config(
        data={"root": str(tmp_path), "domains": ["aa", "bbb"]},
        stream={"batch_size": 256},
        model={"max_length": 8, "dim": 8},
    )
    plan = plan_run(run, gpus=0, workers=1).plans[0]
    stream = Stream(domains, run.stream, max_length=8, seed=0)
    assert plan.steps_an_epoch == stream.steps_per_epoch
    steps = [
        count_step(
            shard_batch(batch, rank=0, world_size=1, candidates="in_batch", catalogue_size=800),
            run.loss,
            run.model,
            DIMS,
        ).rank
        for batch in stream.batches(0)
    ]
    for name in ("items", "tokens", "pairs", "predictions", "candidates"):
        found = np.mean([getattr(step, name) for step in steps])
        assert getattr(plan.step.rank, name) == pytest.approx(found, rel=0.03), name
    assert dict(plan.data.dims) == DIMS and plan.data.items == 800


def test_a_line_through_noise_is_never_negative() -> None:
    assert fit_line((1.0, 3.0), (2.0, 5.0)) == (2.0, 1.0)
    assert fit_line((1.0, 3.0), (2.0, 2.0)) == (1.0, 0.0)
    assert fit_line((1.0, 1.0), (2.0, 5.0)) == (2.5, 0.0)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    # a fresh process, as the command has: memory that other tests' training left would hide what a step takes
    return run_in_fresh_process(calibrate, (32, 128), 300, ((64, 64, 64),), ModelConfig(dim=32, inner=32))


def test_a_calibration_predicts_its_own_steps(calibration: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(calibration.to_json()))
    assert read_calibration(file) == calibration and 0 < calibration.efficiency <= 1
    applied = calibration.apply_to(MACHINES["cpu"])
    assert (applied.bandwidth, applied.fixed, applied.overhead) == (
        calibration.bandwidth,
        calibration.fixed,
        calibration.overhead,
    )
    large = calibration.steps[1]
    products = large.operations / (applied.peak["fp32"] * applied.efficiency)
    assert products + applied.fixed <= large.seconds * 1.001


def test_the_verb_plans_three_workloads_and_writes_them(tmp_path: Path) -> None:
    make_domains(tmp_path / "data", ["aa", "bbb"])
    figures = tmp_path / "plan.json"
    data = [f"data.root={tmp_path / 'data'}", "data.domains=[aa, bbb]", "stream.batch_size=64"]
    done = CliRunner().invoke(cli, ["plan", *data, "--gpus", "2", "--json", str(figures)])
    assert done.exit_code == 0, done.output
    document = json.loads(figures.read_text())
    names = [plan["name"] for plan in document["plans"]]
    assert names == ["aa, bbb", "the paper's pre-training", "ten billion interactions"]
    assert document["plans"][1]["items"] == 657_018 and document["plans"][2]["items"] == 100_000_000
    assert done.output.count("first bottleneck") == 3 and "assumed, not measured" in done.output
    for plan in document["plans"]:
        assert plan["hours"] > 0 and plan["bottleneck"] and plan["setting"] and plan["checkpoint bytes"] > 0


def test_memory_in_a_container_is_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antdist.planning.calibration.CONTAINER", tmp_path / "memory.max")
    whole = _host_memory()
    for told, memory in (("max", whole), (f"{1 << 30}", 1 << 30), (f"{whole + 1}", whole)):
        (tmp_path / "memory.max").write_text(f"{told}\n")
        assert _host_memory() == memory


def test_refusals(calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--workers: 3 workers on 2 GPUs"):
        plan_run(config(), gpus=2, workers=3)
    with pytest.raises(UserError, match=r"stream.batch_size: a micro-batch has \d+ windows, fewer than the 64 ranks"):
        plan_run(config(stream={"batch_size": 64}), gpus=64)
    with pytest.raises(UserError, match=r"data.domains: no prepared domain 'zz'"):
        plan_run(config(data={"root": str(tmp_path), "domains": ["zz"]}), gpus=1)
    if calibration.device == "cpu":
        with pytest.raises(UserError, match=r"--calibration: was taken on a cpu"):
            plan_run(config(), gpus=1, calibration=calibration)
    with pytest.raises(UserError, match="no such file"):
        read_calibration(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    for text, message in {
        "{": "is not JSON",
        "{}": "is not a calibration: device",
        "[]": "is not a calibration: it",
    }.items():
        broken.write_text(text)
        with pytest.raises(UserError, match=message):
            read_calibration(broken)
