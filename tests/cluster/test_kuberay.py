"""The manifests of cluster/kuberay are what KubeRay's and Kubernetes' own schemas take, and do what they say.

Rules that KubeRay writes in Go or in CEL and not in a schema are checked here one by one, where these files touch them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from helix.checks.versions import read_pins
from tests.cluster.validators import (
    CLUSTER,
    CRDS,
    ROOT,
    Document,
    copy_of,
    kuberay_problems,
    kuberay_schemas,
    kubernetes_problems,
    load_all,
)

FOLDER = CLUSTER / "kuberay"
DOCUMENTS = [
    pytest.param(document, id=f"{document['kind']}-{document['metadata']['name']}")
    for path in (*sorted(FOLDER.glob("*.yaml")), CLUSTER / "mlflow" / "kubernetes.yaml")
    for document in load_all(path)
]
RAY = [document for document in DOCUMENTS if "RayC" in str(document.id) or "RayJob" in str(document.id)]
CORE = [document for document in DOCUMENTS if document not in RAY]

with_definitions = pytest.mark.skipif(
    not CRDS.exists(), reason=f"no custom resource definitions of KubeRay at {CRDS}; HELIX_TEST_CRDS names a folder"
)


def load(name: str) -> Document:
    (document,) = load_all(FOLDER / name)
    return document


@with_definitions
@pytest.mark.parametrize("document", RAY)
def test_kuberay_takes_the_manifest(document: Document):
    assert kuberay_problems(document) == []


@pytest.mark.parametrize("document", CORE)
def test_kubernetes_takes_the_manifest(document: Document):
    assert kubernetes_problems(document) == []


def planted(document: Document, path: str, value: Any) -> Document:
    changed = inner = copy_of(document)
    *way, last = path.split("/")
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[int(last) if isinstance(inner, list) else last] = value
    return changed


@with_definitions
@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster.yaml", "spec/enableInTreeAutoscalin", True),
        ("raycluster.yaml", "spec/authOptions/mode", "tokens"),
        ("raycluster.yaml", "spec/autoscalerOptions/version", "v3"),
        ("raycluster.yaml", "spec/autoscalerOptions/idleTimeoutSeconds", "soon"),
        ("raycluster.yaml", "spec/gcsFaultToleranceOptions/redisPasword", {"value": "x"}),
        ("raycluster.yaml", "spec/workerGroupSpecs/0/maxReplicas", "12"),
        ("raycluster.yaml", "spec/workerGroupSpecs/0/template/spec/tolerationz", []),
        ("raycluster.yaml", "spec/workerGroupSpecs/0/template/spec/containers/0/lifecycle/preStop/exec/command", "x"),
        ("raycluster.yaml", "spec/headGroupSpec/template/spec/containers/0/env/0/valu", "x"),
        ("rayjob.yaml", "spec/clusterSelector", "helix"),
        ("rayjob.yaml", "spec/entrypoints", "x"),
        ("raycronjob.yaml", "spec/jobTemplate/backoffLimit", "0"),
        ("raycronjob.yaml", "spec/concurrencyPolicy", "Forbid"),
        ("raycronjob.yaml", "spec/timeZone", ""),
    ],
)
def test_an_error_planted_in_a_ray_manifest_is_found(name: str, path: str, value: Any):
    assert kuberay_problems(planted(load(name), path, value))


@with_definitions
def test_a_required_field_that_is_left_out_is_found():
    document = load("raycronjob.yaml")
    del document["spec"]["schedule"]
    assert any("schedule" in problem for problem in kuberay_problems(document))


@pytest.mark.parametrize("document", CORE)
def test_an_error_planted_in_any_core_manifest_is_found(document: Document):
    assert kubernetes_problems(planted(document, "metadata/nam", "x"))
    assert kubernetes_problems(planted(document, "kind", "Deploiment"))
    if document.get("spec"):
        assert kubernetes_problems(planted(document, "spec/sepc", {}))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", "spec/template/spec/containers/0/imagee", "x"),
        ("Deployment", "spec/replicas", "one"),
        ("StatefulSet", "spec/template/spec/containers/0/ports/0/containerPort", "http"),
        ("NetworkPolicy", "spec/ingress", {"from": []}),
        ("Service", "spec/ports/0/targetport", 1),
    ],
)
def test_an_error_planted_deep_in_a_core_manifest_is_found(kind: str, path: str, value: Any):
    documents = [parameter.values[0] for parameter in CORE]
    *_, document = [found for found in documents if found["kind"] == kind and walks(found, path)]
    assert kubernetes_problems(planted(document, path, value))


def walks(document: Any, path: str) -> bool:
    for step in path.split("/")[:-1]:
        document = document[int(step)] if isinstance(document, list) else document.get(step)
        if document is None:
            return False
    return True


# What the manifests promise, and what KubeRay's operator checks in Go


def pods(document: Document) -> Iterator[Document]:
    """Every pod template's spec in a document."""
    spec = document.get("spec") or {}
    if document["kind"] in ("Deployment", "StatefulSet"):
        yield spec["template"]["spec"]
    elif document["kind"] == "RayCluster":
        yield spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield group["template"]["spec"]


def test_the_pins_of_the_manifests_are_those_of_the_constraints():
    pins = read_pins((ROOT / "constraints.txt").read_text())
    assert load("raycluster.yaml")["spec"]["rayVersion"] == pins["ray"]


def test_the_cluster_asks_for_a_token_and_the_head_comes_back():
    spec = load("raycluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}, "the operator makes the token; a Secret of ours would be one more"
    options = spec["gcsFaultToleranceOptions"]
    assert "valueFrom" in options["redisPassword"] and "value" not in options["redisPassword"]
    assert "redis-password" not in spec["headGroupSpec"]["rayStartParams"]
    containers = [container for pod in pods(load("raycluster.yaml")) for container in pod["containers"]]
    named = {entry["name"] for container in containers for entry in container["env"]}
    assert not {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "RAY_AUTH_TOKEN"} & named, "the operator sets them"


def test_the_head_holds_drivers_and_no_trial():
    head = load("raycluster.yaml")["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0" and head["rayStartParams"]["num-gpus"] == "0"
    assert yaml.safe_load(yaml.safe_load(head["rayStartParams"]["resources"])) == {"trial_driver": 12}
    assert head["template"]["spec"]["nodeSelector"]["eks.amazonaws.com/capacityType"] == "ON_DEMAND"


def test_workers_are_spot_first_with_a_tail_and_come_from_nothing():
    spec = load("raycluster.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    prices = yaml.safe_load((CLUSTER / "prices.yaml").read_text())["prices"]
    priorities = {}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never", "autoscaler v2 wants it"
        market = {"SPOT": "spot", "ON_DEMAND": "on-demand"}[pod["nodeSelector"]["eks.amazonaws.com/capacityType"]]
        machine = pod["nodeSelector"]["node.kubernetes.io/instance-type"]
        assert group["labels"] == {"helix/market": market, "helix/instance-type": machine}
        assert machine in prices
        if "nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]:
            priorities.setdefault(market, []).append(group["priority"])
    assert min(priorities["spot"]) > max(priorities["on-demand"])


def test_a_worker_that_is_ended_drains_first_and_has_the_time_for_it():
    for group in load("raycluster.yaml")["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "/opt/helix/cluster/notice_daemon.py", "--drain-now"]
        assert int(command[3]) < pod["terminationGracePeriodSeconds"] <= 110, "of the 120 s that AWS gives"


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_a_job_goes_to_the_cluster_that_stands(name: str):
    document = load(name)
    spec = document["spec"].get("jobTemplate", document["spec"])
    assert spec["clusterSelector"] == {"ray.io/cluster": load("raycluster.yaml")["metadata"]["name"]}
    # the operator refuses these beside a clusterSelector
    assert spec.get("backoffLimit", 0) == 0 and not spec.get("suspend") and "rayClusterSpec" not in spec
    assert not spec.get("shutdownAfterJobFinishes") and "ttlSecondsAfterFinished" not in spec
    assert yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].startswith("s3://")
    assert spec["entrypoint"].startswith("python orchestration/")
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode"), "a string in the schema; the operator knows four"


def test_every_pod_is_as_narrow_as_it_can_be():
    for parameter in DOCUMENTS:
        for pod in pods(parameter.values[0]):
            assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
                assert container["resources"]["limits"]["memory"]
            is_head = pod["containers"][0]["name"] == "ray-head"
            assert pod["automountServiceAccountToken"] is is_head, "only the autoscaler talks to Kubernetes"


def test_every_server_is_behind_a_policy_and_its_secrets_are_in_no_file():
    documents = [parameter.values[0] for parameter in DOCUMENTS]
    assert not [document for document in documents if document["kind"] == "Secret"]
    policies = [document["spec"] for document in documents if document["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in policies, "what no policy allows is shut"
    assert all(rule.get("from") for policy in policies for rule in policy.get("ingress", [])), "an empty from is all"
    services = [document for document in documents if document["kind"] == "Service"]
    assert services
    for service in services:
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
        assert service["spec"]["selector"] in [policy["podSelector"].get("matchLabels") for policy in policies]
    assert load("raycluster.yaml")["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_what_the_documents_name_is_made_somewhere():
    documents = [parameter.values[0] for parameter in DOCUMENTS]
    accounts = {document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"}
    readmes = "".join((CLUSTER / folder / "README.md").read_text() for folder in ("kuberay", "mlflow"))
    for document in documents:
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "helix"
        for pod in pods(document):
            assert pod.get("serviceAccountName") in {None, *accounts}
            claims = {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
            volumes = {volume["name"] for volume in pod.get("volumes", [])} | claims
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                for entry in container.get("env", []):
                    reference = entry.get("valueFrom", {}).get("secretKeyRef")
                    if reference:
                        assert f"create secret generic {reference['name']}" in readmes
                        made = readmes.split(f"generic {reference['name']}")[1]
                        assert re.search(rf"--from-(file|literal)={reference['key']}=", made)
            for volume in pod.get("volumes", []):
                if "secret" in volume:
                    assert f"create secret generic {volume['secret']['secretName']}" in readmes


@with_definitions
def test_the_definitions_are_of_the_versions_that_the_manifests_are_of():
    assert {("ray.io/v1", kind) for kind in ("RayCluster", "RayJob", "RayCronJob")} <= set(kuberay_schemas())


def test_yaml_files_of_the_folder_are_all_looked_at():
    assert {path.name for path in Path(FOLDER).iterdir()} == {
        *("README.md", "base.yaml", "raycluster.yaml", "rayjob.yaml", "raycronjob.yaml"),
    }
