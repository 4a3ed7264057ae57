"""The verdict: against the t-test written out, at its edges, and what prevents a comparison."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t as student

from antdist.evaluation.ranking import Ranks
from antdist.evaluation.results import Run, RunKey
from antdist.evaluation.significance import compare, decide_transfer, judge, list_differences

KEY = RunKey(
    target="pantry",
    manifest="m",
    features={"text": "t", "price": "p"},
    seeds=(0, 1),
    epochs=9,
    budget="b",
    split="test",
)


def make_run(ranks: list[list[int]], key: RunKey = KEY) -> Run:
    users = len(ranks[0])
    return Run(key, [Ranks(np.arange(users), np.array(r), np.zeros(users, bool)) for r in ranks])


def test_compare_equals_the_t_test_written_out() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 40)), rng.random((3, 40))
    gains = (a - b).mean(0)
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(40))
    result = compare(a, b)
    assert result.p_value == pytest.approx(2 * student.sf(abs(t), 39))
    assert result.difference == pytest.approx(a.mean() - b.mean())
    assert result.relative == pytest.approx(a.mean() / b.mean() - 1)
    assert (result.users, result.seeds) == (40, 3)


def test_seeds_are_averaged_not_counted_as_users() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 30)), rng.random((1, 30))
    assert compare(np.tile(a, (50, 1)), np.tile(b, (50, 1))).p_value == pytest.approx(compare(a, b).p_value)


def test_false_positive_rate_is_the_stated_one() -> None:
    rng = np.random.default_rng(2)
    alarms = [compare(*(rng.random((1, 60)) for _ in "ab")).significant for _ in range(2000)]
    assert 0.08 < np.mean(alarms) < 0.12


@pytest.mark.filterwarnings("error")
def test_degenerate_cases() -> None:
    same = np.array([[0.0, 1.0, 0.5]])
    assert compare(same, same).p_value == 1.0 and decide_transfer(compare(same, same)) == "none"
    better = compare(same + 0.25, same)
    assert better.p_value == 0.0 and decide_transfer(better) == "positive"
    assert compare(np.array([[1.0]]), np.array([[0.0]])).p_value == 1.0
    nothing = compare(np.array([[1.0, 0.0, 1.0]]), np.zeros((1, 3)))
    assert nothing.relative is None


def test_verdicts() -> None:
    rng = np.random.default_rng(3)
    low, high = rng.random((1, 200)), rng.random((1, 200)) + 0.5
    assert decide_transfer(compare(high, low)) == "positive"
    assert decide_transfer(compare(low, high)) == "negative"
    assert decide_transfer(None) == "unknown"


def test_list_differences_names_keys_and_values() -> None:
    assert list_differences(KEY, KEY) == []
    other = KEY.model_copy(update={"epochs": 4, "seeds": (0,), "features": {"text": "u", "price": "p", "image": "i"}})
    assert list_differences(KEY, other) == [
        "seeds: 0, 1 against 0",
        "epochs: 9 against 4",
        "features.image: none against i",
        "features.text: t against u",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"target": "arts"},
        {"manifest": "n"},
        {"features": {"text": "t"}},
        {"seeds": (0, 2)},
        {"epochs": 8},
        {"budget": "c"},
        {"split": "validation"},
    ],
)
def test_unknown_without_a_matching_scratch(change: dict[str, object]) -> None:
    ranks = [[1, 1, 1, 2], [1, 2, 1, 1]]
    scratch = make_run([[90, 80, 90, 70], [90, 90, 60, 90]])
    assert judge(make_run(ranks), scratch).transfer == "positive"
    judged = judge(make_run(ranks, KEY.model_copy(update=change)), scratch)
    assert judged.transfer == "unknown" and judged.comparison is None
    assert next(iter(change)) in judged.differs[0]


def test_unknown_without_scratch_or_with_other_users() -> None:
    run = make_run([[1, 2], [3, 4]])
    assert judge(run, None).differs == ["no matching scratch"]
    other = make_run([[1, 2, 3], [3, 4, 5]])
    assert judge(run, other).transfer == "unknown" and "users: 2 against 3" in judge(run, other).differs[0]


def test_judge_uses_the_given_metric() -> None:
    adapted, scratch = make_run([[1, 1, 1, 2]] * 2), make_run([[9, 8, 9, 7]] * 2)
    assert judge(adapted, scratch).transfer == "none"  # all are within the first ten
    assert judge(adapted, scratch, "NDCG@10").transfer == "positive"
