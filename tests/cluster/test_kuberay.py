"""The manifests: valid by KubeRay's CRDs as the API server applies them, and consistent with configs/."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from antdist.config.load import load_config
from antdist.config.schema import PretrainConfig
from tests.cluster.linters import CLUSTER, PROJECT
from tests.ray_internals import drain_timeout_variable

SCHEMAS = PROJECT.parent / "shared" / "schemas"
Schema = dict[str, Any]
Manifest = dict[str, Any]


def strict(schema: Any) -> Any:
    """Convert a CRD's schema to JSON schema; fields that the API server would drop are refused."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    done = {key: value if key in ("default", "enum", "example") else strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string") is True:
        done.pop("type", None)
        done["type"] = ["integer", "string"]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") is True or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not open_ended:
        done["additionalProperties"] = False
    return done


@pytest.fixture(scope="module")
def schemas() -> dict[str, Schema]:
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's schemas absent: no folder ../shared/schemas beside the project")
    found = {}
    for kind in ("RayCluster", "RayJob"):
        crd = yaml.load(
            (SCHEMAS / f"kuberay-{kind.lower()}s.crd.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        assert crd["spec"]["names"]["kind"] == kind
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        # metadata is checked by Kubernetes itself, not by the CRD
        schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
        found[kind] = {**schema, "required": ["apiVersion", "kind", "metadata", "spec"]}
    return found


def manifest(name: str) -> Manifest:
    # copies in place of what YAML anchors share
    return json.loads(json.dumps(yaml.safe_load((CLUSTER / "kuberay" / name).read_text())))


def find_errors(schema: Schema, value: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in Draft202012Validator(schema).iter_errors(value)]


@pytest.fixture
def cluster() -> Manifest:
    return manifest("raycluster.yaml")


@pytest.fixture
def job() -> Manifest:
    return manifest("rayjob.yaml")


def test_manifests_are_valid_for_kuberay(schemas: dict[str, Schema], cluster: Manifest, job: Manifest) -> None:
    for found in (cluster, job):
        assert found["apiVersion"] == "ray.io/v1"
        assert find_errors(schemas[found["kind"]], found) == []


def gpu_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["workerGroupSpecs"][0]["template"]["spec"]


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a field that KubeRay does not know": lambda spec: spec.update(gcsFaultTolerance={}),
    "a misspelt field of a group": lambda spec: spec["workerGroupSpecs"][0].update(minReplica=1),
    "a misspelt field of a pod": lambda spec: gpu_pod(spec).update(terminationGracePeriod=300),
    "a misspelt field of a container": lambda spec: gpu_pod(spec)["containers"][0].update(volumeMount=[]),
    "a number as text": lambda spec: spec["workerGroupSpecs"][0].update(minReplicas="4"),
    "an environment variable that is a number": lambda spec: gpu_pod(spec)["containers"][0]["env"].append({"name": "A", "value": 240}),
    "an unknown mode of authentication": lambda spec: spec["authOptions"].update(mode="password"),
    "an invalid quantity": lambda spec: gpu_pod(spec)["containers"][0]["resources"]["limits"].update(memory="64 GB"),
    "a group without its template": lambda spec: spec["workerGroupSpecs"][0].pop("template"),
    "a secret without its key": lambda spec: gpu_pod(spec)["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"].pop("key"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_manifest_is_refused(schemas: dict[str, Schema], cluster: Manifest, job: Manifest, name: str) -> None:
    broken = copy.deepcopy(cluster)
    BREAKS[name](broken["spec"])
    assert len(find_errors(schemas["RayCluster"], broken)) == 1
    broken = copy.deepcopy(job)
    BREAKS[name](broken["spec"]["rayClusterSpec"])
    assert len(find_errors(schemas["RayJob"], broken)) == 1


def test_volume_claim_is_valid_for_kubernetes(schemas: dict[str, Schema], cluster: Manifest) -> None:
    """The schema of a claim is part of that of a pod, for ephemeral volumes."""
    pod = schemas["RayCluster"]["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    volume = pod["properties"]["spec"]["properties"]["volumes"]["items"]["properties"]
    schema = volume["ephemeral"]["properties"]["volumeClaimTemplate"]["properties"]["spec"]
    claim = manifest("storage.yaml")
    assert find_errors(schema, claim["spec"]) == []
    assert find_errors(schema, claim["spec"] | {"accessMode": "ReadWriteMany"})
    (used,) = {v["persistentVolumeClaim"]["claimName"] for p in pods(cluster["spec"]) for v in p["volumes"]}
    assert claim["metadata"]["name"] == used and claim["spec"]["accessModes"] == ["ReadWriteMany"]


def pods(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield group["template"]["spec"]


def environment(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


def test_rayjob_and_raycluster_have_the_same_cluster(cluster: Manifest, job: Manifest) -> None:
    expected = dict(cluster["spec"])
    expected.pop("gcsFaultToleranceOptions")
    assert job["spec"]["rayClusterSpec"] == expected


def test_worker_groups_match_the_elastic_range(cluster: Manifest) -> None:
    config = load_config(PretrainConfig, PROJECT / "configs" / "scale.yaml").ray
    gpu = cluster["spec"]["workerGroupSpecs"][0]
    assert (gpu["minReplicas"], gpu["maxReplicas"]) == (config.fewest, config.workers)
    limits = gpu_pod(cluster["spec"])["containers"][0]["resources"]["limits"]
    assert (int(limits["cpu"]), int(limits["nvidia.com/gpu"])) == (config.cpus_per_worker, config.gpus_per_worker)


def test_entrypoint_is_a_valid_antdist_command(job: Manifest) -> None:
    command = job["spec"]["entrypoint"]
    assert not re.search(r"[\"'\\$*?;&|<>()]", command), "a shell would change it"
    python, script, option, config, *overrides = shlex.split(command)
    assert (python, option) == ("python", "--config")
    inside = [Path(path).relative_to("/opt/antdist") for path in (script, config)]
    assert all((PROJECT / path).is_file() for path in inside)
    loaded = load_config(PretrainConfig, PROJECT / inside[1], overrides)
    mounted = gpu_pod(job["spec"]["rayClusterSpec"])["containers"][0]["volumeMounts"][0]["mountPath"]
    assert loaded.data.domains and Path(loaded.data.root).is_relative_to(mounted)
    assert Path(loaded.ray.storage).is_relative_to(mounted)


def test_ray_version_is_the_installed_one(cluster: Manifest) -> None:
    assert f"ray=={cluster['spec']['rayVersion']}" in (PROJECT / "constraints.txt").read_text().splitlines()


def test_an_evicted_pod_has_time_for_a_checkpoint(cluster: Manifest) -> None:
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        variables = environment(pod)
        assert pod["terminationGracePeriodSeconds"] >= int(variables[drain_timeout_variable()]) + 30
        assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    assert JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S < 120


def test_secrets_are_references_and_pods_unprivileged(cluster: Manifest) -> None:
    for pod in pods(cluster["spec"]):
        for name, value in environment(pod).items():
            secret = re.search("MLFLOW|AWS|PASSWORD|TOKEN|KEY", name)
            assert (isinstance(value, dict) and "secretKeyRef" in value) if secret else isinstance(value, str), name
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert all(c["securityContext"]["allowPrivilegeEscalation"] is False for c in pod["containers"])
    assert "secretKeyRef" in cluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    assert cluster["spec"]["authOptions"]["mode"] == "token"


def test_drivers_do_not_take_a_workers_place(cluster: Manifest, job: Manifest) -> None:
    (wanted,) = yaml.safe_load(job["spec"]["entrypointResources"])
    offered = [
        g["groupName"]
        for g in cluster["spec"]["workerGroupSpecs"]
        if wanted in g["rayStartParams"].get("resources", "")
    ]
    assert offered == ["data"]
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
