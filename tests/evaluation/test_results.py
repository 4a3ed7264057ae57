"""Per-user results on disk: round trip, damage, pooling of seeds, the budget's digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from antdist.config.load import load_config
from antdist.config.schema import RelearnConfig
from antdist.config.semantics import meanings
from antdist.errors import UserError
from antdist.evaluation.ranking import Ranks
from antdist.evaluation.results import Run, RunKey, budget_digest, load_ranks, pool, save_ranks


def make_run(seeds: tuple[int, ...], users: int = 5, **key: object) -> Run:
    fields = {"target": "scientific", "manifest": "ab", "features": {"text": "t"}, "epochs": 3, "budget": "b"}
    rng = np.random.default_rng(sum(seeds))
    seen = np.arange(users) == 1
    ranks = [Ranks(np.arange(users), rng.integers(1, 99, users), seen) for _ in seeds]
    return Run(RunKey.model_validate(fields | {"seeds": seeds, "split": "test"} | key), ranks)


def test_round_trip(tmp_path: Path) -> None:
    run, path = make_run((0, 7)), tmp_path / "deep" / "ranks.npz"
    save_ranks(path, run)
    again = load_ranks(path)
    assert again.key == run.key
    for ours, theirs in zip(again.ranks, run.ranks, strict=True):
        assert all(np.array_equal(getattr(ours, name), value) for name, value in vars(theirs).items())
    assert [p.name for p in path.parent.iterdir()] == ["ranks.npz"]


def test_other_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no per-user results here"):
        load_ranks(tmp_path / "none.npz")
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"text\.npz: not per-user results"):
        load_ranks(path)
    np.savez(path, ranks=np.ones((1, 2)))
    with pytest.raises(UserError, match="not per-user results"):
        load_ranks(path)
    whole = tmp_path / "whole.npz"
    save_ranks(whole, make_run((0,)))
    path.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(UserError, match="not per-user results"):
        load_ranks(path)


@pytest.mark.parametrize(
    "change", [{"ranks": np.ones((1, 5))}, {"ranks": np.ones((2, 4))}, {"seen": np.zeros(4, bool)}]
)
def test_results_of_inconsistent_shapes_are_refused(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    run, path = make_run((0, 7)), tmp_path / "ranks.npz"
    fitting = {"ranks": np.ones((2, 5)), "users": np.arange(5), "seen": np.zeros(5, bool)}
    np.savez(path, **{**fitting, "key": np.array(run.key.model_dump_json())})
    assert len(load_ranks(path).ranks) == 2
    np.savez(path, **{**fitting, **change, "key": np.array(run.key.model_dump_json())})
    with pytest.raises(UserError, match="shapes of per-user results disagree"):
        load_ranks(path)


def test_a_flipped_bit_never_ends_in_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "ranks.npz"
    save_ranks(path, make_run((0,), users=40))
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            load_ranks(path)
        except UserError:
            refused += 1
    assert refused > len(whole) / 2
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(UserError, match="not per-user results"):
        load_ranks(tmp_path / "array.npy")


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "ranks.npz"
    np.savez(path, ranks=np.array([print], dtype=object))
    with pytest.raises(UserError, match="not per-user results"):
        load_ranks(path)


def test_pool_joins_seeds_in_order() -> None:
    one, two = make_run((5,)), make_run((1, 3))
    pooled = pool([one, two])
    assert pooled.key.seeds == (1, 3, 5)
    assert pooled.ranks == [*two.ranks, *one.ranks]
    with pytest.raises(UserError, match="differ in manifest, epochs, so their seeds cannot be pooled"):
        pool([one, make_run((2,), epochs=4, manifest="cd")])
    with pytest.raises(AssertionError):
        pool([one, make_run((5,))])


OTHER_VALUES = {"training.engine": "plain", "training.deepspeed": "{a: 1}", "training.hang.step_minutes": "7.0"}
OTHER_VALUES |= {"model.activation_checkpointing": "true"}
CHANGEABLE = [key for key, meaning in meanings(RelearnConfig).items() if meaning.resume == "free" and "." in key]


@pytest.mark.parametrize("key", [key for key in CHANGEABLE if not key.startswith(("ray.", "tracking.", "data."))])
def test_keys_free_on_resume_keep_trials_comparable(key: str) -> None:
    """A seed that was trained before a restart is pooled with one that was trained after it."""
    changed = load_config(RelearnConfig, None, [f"{key}={OTHER_VALUES.get(key, '3')}"])
    assert changed != RelearnConfig()
    assert budget_digest(changed) == budget_digest(RelearnConfig())


def test_budget_digests_how_to_learn_not_how_to_run() -> None:
    def digest(**changes: object) -> str:
        return budget_digest(RelearnConfig.model_validate(changes))

    plain = digest()
    assert digest(strategy="scratch", seeds=[1, 2], target="x", variants=["keep_price_bias"]) == plain
    training = RelearnConfig().training.model_dump()
    assert digest(training=training | {"engine": "plain", "log_every": 3, "keep_every": 7}) == plain
    assert digest(training=training | {"learning_rate": 0.5}) != plain
    assert digest(training=training | {"patience": 3}) != plain
    assert digest(model={"dropout": 0.1}) != plain
    assert digest(stream={"mode": "prefix"}) != plain
