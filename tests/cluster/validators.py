"""What a real server would say of a file, asked without one: Ray's schema, EC2's shapes, KubeRay's and Kubernetes' own.

Each returns a list of problems, empty where there is none; their tests plant errors and look for them here.
"""

import copy
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import kubernetes_validate
import ray.autoscaler
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"

#: KubeRay's custom resource definitions, which are not committed here: HELIX_TEST_CRDS, or beside the checkout.
CRDS = Path(os.environ.get("HELIX_TEST_CRDS") or ROOT.parent / "shared" / "facts" / "kuberay-crds")

Document = dict[str, Any]


def path_without(folder: Path, program: str) -> str:
    """A PATH that is the system's but for one program, for what has to find its own: links in the new `folder`."""
    folder.mkdir()
    for place in map(Path, ("/usr/bin", "/bin")):
        for found in place.iterdir():
            link = folder / found.name
            if found.name != program and not link.is_symlink():
                link.symlink_to(found)
    return str(folder)


def load_all(path: Path) -> list[Document]:
    """Every document of a YAML file. Anchors make the same object of several; copies can be changed one by one."""
    return [copy_of(document) for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def copy_of(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copy_of(inner) for key, inner in value.items()}
    return [copy_of(inner) for inner in value] if isinstance(value, list) else value


@cache
def ray_schema() -> Document:
    return json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))


def ray_problems(config: Document) -> list[str]:
    """Of a cluster file, by the schema that `ray up` holds it against after it filled in its defaults.

    The schema lets any key of `provider` pass; here it has to be one that the schema names.
    """
    strangers = set(config.get("provider", {})) - set(ray_schema()["properties"]["provider"]["properties"])
    if strangers:
        return [f"provider has no {', '.join(sorted(strangers))}"]
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError) as error:
        return [str(error).splitlines()[0]]
    return []


@cache
def run_instances():
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def ec2_problems(node_config: Document) -> list[str]:
    """Of one node_config, by the shape of EC2's RunInstances; botocore looks at names and types, and this at enums."""
    request = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    if not node_config.get("SubnetIds"):  # Ray's own key, of which it makes one SubnetId after the other
        return ["SubnetIds is missing or empty"]
    request |= {"SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    found = ParamValidator().validate(request, run_instances())
    return [found.generate_report()] if found.has_errors() else list(_bad_enums(request, run_instances()))


def _bad_enums(value: Any, shape: Any, path: str = "") -> Iterator[str]:
    if shape.type_name == "structure":
        for key, inner in value.items():
            yield from _bad_enums(inner, shape.members[key], f"{path}.{key}")
    elif shape.type_name == "list":
        for inner in value:
            yield from _bad_enums(inner, shape.member, f"{path}[]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{path} is {value!r}"


@cache
def kuberay_schemas() -> dict[tuple[str, str], Document]:
    """By apiVersion and kind; empty where the definitions are absent."""
    schemas = {}
    for path in sorted(CRDS.glob("*.yaml")):
        definition = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for version in definition["spec"]["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            kind = definition["spec"]["names"]["kind"]
            schemas[f"{definition['spec']['group']}/{version['name']}", kind] = schema
    return schemas


def _strict(node: Any) -> Any:
    """openAPIV3 as JSON Schema, in which a field that is not named is an error, as in the API server's strict mode."""
    if isinstance(node, list):
        return [_strict(inner) for inner in node]
    if not isinstance(node, dict):
        return node
    node = {key: _strict(inner) for key, inner in node.items()}
    if node.pop("x-kubernetes-int-or-string", None):
        node.pop("type", None)
        node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if node.pop("nullable", None) and isinstance(node.get("type"), str):
        node["type"] = [node["type"], "null"]
    closed = node.get("type") == "object" and isinstance(node.get("properties"), dict)
    if closed and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        node["additionalProperties"] = False
    return node


def kuberay_problems(document: Document) -> list[str]:
    schema = kuberay_schemas().get((document["apiVersion"], document["kind"]))
    if schema is None:
        return [f"no definition of {document['apiVersion']} {document['kind']}"]
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


def kubernetes_problems(document: Document, version: str = "1.33") -> list[str]:
    """Of a core kind, by the schemas of Kubernetes itself; a field that they do not name is an error."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error).splitlines()[0]]
    except (kubernetes_validate.SchemaNotFoundError, IndexError):
        return [f"Kubernetes has no {document.get('apiVersion')} {document.get('kind')}"]
    return []
