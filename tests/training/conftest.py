"""What the training tests share: two small domains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import NAMES
from tests.worlds import make_domains


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the domains `NAMES`; tests do not modify it."""
    folder = tmp_path_factory.mktemp("data")
    make_domains(folder, NAMES)
    return folder
