"""The tracking server's compose file: valid by the Compose schema, no committed password."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.cluster.linters import CLUSTER, PROJECT, lint

COMPOSE = CLUSTER / "mlflow" / "compose.yaml"


def check(file: Path) -> str:
    return lint("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_compose_file_is_valid() -> None:
    assert check(COMPOSE) == ""


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("healthcheck:", "health_check:", "health_check"),
        ("condition: service_healthy", "condition: healthy", "healthy"),
        ("restart: unless-stopped", "restart: [always]", "restart"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = COMPOSE.read_text()
    assert old in text
    (tmp_path / "compose.yaml").write_text(text.replace(old, new))
    assert named in check(tmp_path / "compose.yaml")


def test_passwords_are_only_in_an_ignored_file() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    secrets = {
        key: value
        for service in services.values()
        for key, value in service["environment"].items()
        if re.search("PASS|KEY", key)
    }
    assert len(secrets) == 4 and all(re.fullmatch(r"\$\{\w+:[?-][^}]*\}", value) for value in secrets.values())
    variables = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    example = dict(
        line.split("=", 1)
        for line in (COMPOSE.parent / "env.example").read_text().splitlines()
        if not line.startswith("#")
    )
    assert variables == set(example)
    assert not any(value for key, value in example.items() if re.search("PASS|KEY", key))
    assert ".env" in (PROJECT / ".gitignore").read_text().splitlines()


def test_mlflow_version_is_the_tested_one() -> None:
    (version,) = re.findall(r"\bmlflow==\S+", (COMPOSE.parent / "Dockerfile").read_text())
    assert version in (PROJECT / "constraints.txt").read_text().splitlines()


def test_only_the_server_is_published_by_default_on_loopback() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert {name: service.get("ports") for name, service in services.items()} == {
        "database": None,
        "server": ["${LISTEN:-127.0.0.1}:5000:5000"],
    }
