"""A table with more parts than a process may open files is read nevertheless, or refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from antdist.errors import UserError
from antdist.features import limits
from antdist.features.featurize import featurize_domains
from tests.items import some_items

PARTS = 80
READER = """
import resource, sys
import numpy as np
from antdist.data.domain import open_domain
from antdist.errors import UserError
from antdist.features import limits
from antdist.features.catalogue import Catalogue
limits.OTHERS = 40
resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[2])))
try:
    print(len(Catalogue([open_domain(sys.argv[1])], ["price"]).features(np.arange(80)).values["price"]))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hard", "output"),
    [(4096, "80"), (70, "features: the features need 120 open files, but the system allows a process 70.")],
)
def test_more_parts_than_open_files(make_domain: Any, hard: int, output: str) -> None:
    domain = make_domain("d", some_items(PARTS), items_per_shard=1)
    featurize_domains([domain], price="log", workers=0)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(domain.folder), str(hard)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(output)


def test_more_parts_than_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_MAPS", tmp_path / "max_map_count")
    limits.raise_limits(1000)
    limits.MOST_MAPS.write_text("65530\n")
    limits.raise_limits(1000)
    limits.MOST_MAPS.write_text("1000\n")
    with pytest.raises(
        UserError, match=r"1,512 memory maps, but the system allows a process 1,000.*max_map_count=3024"
    ):
        limits.raise_limits(1000)
