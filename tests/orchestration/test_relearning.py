"""Transfer that does not help is not preferred to training from scratch, and never promoted."""

from __future__ import annotations

from typing import Any

import pytest

from antdist.orchestration.relearning import choose


@pytest.mark.parametrize(
    ("validation", "transfers", "chosen", "promoted"),
    [
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "positive"}, "relearn", True),
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "none"}, "scratch", True),  # the gain may be chance
        ({"scratch": 0.10, "relearn": 0.12}, {"relearn": "unknown"}, "scratch", True),  # not comparable
        ({"scratch": 0.10, "relearn": 0.08}, {"relearn": "negative"}, "scratch", True),
        (
            {"scratch": 0.10, "finetune": 0.13, "relearn": 0.12},
            {"finetune": "none", "relearn": "positive"},
            "relearn",
            True,
        ),
        (
            {"scratch": 0.10, "finetune": 0.13, "relearn": 0.12},
            {"finetune": "positive", "relearn": "positive"},
            "finetune",
            True,
        ),
        ({"relearn": 0.12}, {"relearn": "positive"}, "relearn", True),  # against scratch trials of an earlier command
        ({"relearn": 0.12}, {"relearn": "none"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "negative"}, "relearn", False),
        ({"relearn": 0.12}, {"relearn": "unknown"}, "relearn", False),
        ({"scratch": 0.10}, {}, "scratch", True),
        ({"scratch": 0.10, "relearn": 0.10}, {"relearn": "positive"}, "scratch", True),
    ],
)
def test_transfer_must_show_that_it_helps(
    validation: dict[Any, float], transfers: dict[Any, Any], chosen: str, promoted: bool
) -> None:
    assert choose(validation, transfers) == (chosen, promoted)
