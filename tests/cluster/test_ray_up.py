"""The autoscaler's file against Ray's own validation, and against antdist's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig
from tests.cluster.linters import CLUSTER, PROJECT
from tests.ray_internals import prepare_cluster_config


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "ray-up" / "aws.yaml").read_text())


def test_config_is_valid_for_ray_up(config: dict[str, Any]) -> None:
    whole = prepare_cluster_config(config)
    assert whole["available_node_types"]["head"]["max_workers"] == 0
    # none of Ray's defaults, which install another Ray and open the dashboard to all addresses
    commands = [c for key, value in whole.items() if key.endswith("commands") for c in value]
    assert commands and not any("pip install -U" in c for c in commands)
    heads = [c for c in commands if "--head" in c]
    assert heads and all("--dashboard-host=127.0.0.1" in c for c in heads)


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown key": lambda c: c.update(idle_timeout=5),
    "a kind without resources": lambda c: c["available_node_types"]["gpu"].pop("resources"),
    "a number as text": lambda c: c["available_node_types"]["gpu"].update(min_workers="4"),
    "a misspelt key of a kind": lambda c: c["available_node_types"]["gpu"].update(minimum=4),
    "an unknown head node type": lambda c: c.update(head_node_type="master"),
    "fewer nodes in all than the least of each": lambda c: c.update(max_workers=3),
    "a command that is not text": lambda c: c["setup_commands"].append({"run": "make"}),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file_is_refused(config: dict[str, Any], name: str) -> None:
    BREAKS[name](config)
    with pytest.raises((ValidationError, ValueError)):
        prepare_cluster_config(config)


def test_node_types_match_the_elastic_range(config: dict[str, Any]) -> None:
    ray = load_config(PretrainConfig, PROJECT / "configs" / "scale.yaml").ray
    gpu = config["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"]) == (ray.fewest, ray.workers)
    assert gpu["resources"] == {"CPU": ray.cpus_per_worker, "GPU": ray.gpus_per_worker}
    assert config["max_workers"] == sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())


def test_every_ray_start_requires_the_token(config: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert all("RAY_AUTH_MODE=token" in command for command in config[key] if "ray start" in command)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
