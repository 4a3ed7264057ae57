"""Repeat what may succeed later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

T = TypeVar("T")


def retry(
    work: Callable[[], T],
    waits: Sequence[float],
    is_retryable: Callable[[BaseException], bool],
    report: Callable[[BaseException, float], None],
) -> T:
    """Call `work`, and after a retryable error again, once for each of the `waits` (seconds).

    Args:
        work: repeatable without harm.
        report: called before each wait with the error and the seconds.

    Raises:
        The error of the last attempt, or one that is not retryable.
    """

    def report_attempt(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        assert error is not None and state.next_action is not None
        report(error, state.next_action.sleep)

    attempts = Retrying(
        wait=wait_chain(*map(wait_fixed, waits), wait_fixed(0)),
        stop=stop_after_attempt(len(waits) + 1),
        retry=retry_if_exception(is_retryable),
        before_sleep=report_attempt,
        reraise=True,
    )
    return attempts(work)
