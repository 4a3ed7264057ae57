"""The container files against hadolint, and against what they copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.linters import CLUSTER, PROJECT, lint

FILES = [
    CLUSTER / "docker" / "Dockerfile.gpu",
    CLUSTER / "docker" / "Dockerfile.cpu",
    CLUSTER / "mlflow" / "Dockerfile",
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CLUSTER)))
def test_dockerfiles_pass_the_linter(file: Path) -> None:
    assert lint("hadolint", "--no-color", file) == ""


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (":3.11-slim-bookworm", ":latest", "DL3007"),
        ("USER 1000", "USER root", "DL3002"),
        ("COPY configs configs", "COPY configs", "unexpected"),  # no destination: does not parse
        ("WORKDIR /opt/antdist", "RUN cd /opt/antdist", "DL3003"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, old: str, new: str, rule: str) -> None:
    text = FILES[0].read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    assert rule in lint("hadolint", "--no-color", tmp_path / "Dockerfile")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CLUSTER)))
def test_image_copies_existing_paths_and_runs_unprivileged(file: Path) -> None:
    lines = file.read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((PROJECT / source).exists() for source in line.split()[1:-1]), line
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]


@pytest.mark.parametrize("file", FILES[:2], ids=lambda file: file.name)
def test_a_code_change_does_not_reinstall_dependencies(file: Path) -> None:
    text = file.read_text()
    before, install, after = text.partition("RUN PIP_NO_CACHE_DIR=1 make setup")
    copied = [source for line in before.splitlines() if line.startswith("COPY") for source in line.split()[1:-1]]
    assert install and copied == [
        "Makefile",
        "setup.cfg",
        "pyproject.toml",
        "constraints.txt",
        "antdist/__init__.py",
        "antdist/version.py",
    ]
    assert all(f"COPY {folder} {folder}" in after for folder in ("antdist", "launch", "configs"))
