"""One SQLite store for each test file: the first use of a store takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from antdist.config.schema import TrackingConfig
from antdist.tracking import store
from antdist.tracking.store import tracking_uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage: Path = tmp_path_factory.mktemp("storage")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(TrackingConfig(), storage)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the number of retries, without the minutes between them."""
    monkeypatch.setattr(store, "WAITS", (0.01,) * len(store.WAITS))
