"""Around a command: an address where nobody listens is told at once."""

from __future__ import annotations

import time

import pytest

from antdist.config.schema import RayConfig
from antdist.errors import UserError
from antdist.orchestration.session import ray_session
from tests.ranks import free_port


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_told_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    import ray  # noqa: F401  # its import is not what is timed

    start = time.monotonic()
    with (
        pytest.raises(UserError, match=f"ray.address {address}: no Ray answers.*refused.*`ray start --head`"),
        ray_session(RayConfig()),
    ):
        pass
    assert time.monotonic() - start < 5


def test_the_address_of_the_jobs_page_is_not_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """RAY_ADDRESS is also where `ray job` looks for the page."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with (
        pytest.raises(UserError, match=r"no Ray answers \(Invalid Ray address: 'http://127.0.0.1:8265'\)"),
        ray_session(RayConfig()),
    ):
        pass
