"""One SQLite store for each test file: the first use of a store takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from antdist.config.schema import TrackingConfig
from antdist.tracking.store import tracking_uri

# Tests that take a server away would else wait for MLflow's own retries.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    storage: Path = tmp_path_factory.mktemp("storage")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return tracking_uri(TrackingConfig(), storage)
