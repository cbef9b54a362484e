"""The best trial of a cell as a registered model: weights as safetensors, code as text, inputs and outputs described.

What MLflow calls a model is a folder: orchestration/pyfunc_model.py, the package helix, weights.safetensors, model.json
and the versions that they need. Nothing in it is a pickle. To load it is to run its code: who may write to the registry
is trusted by all who load from it.
"""

import hashlib
import re
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow.pyfunc
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.types.schema import ColSpec, DataType, Map, Schema

from helix.storage import Storage, json_bytes
from helix.training.checkpoint import BEST_FILE, best_manifest
from helix.training.predictor import describe
from helix.training.trainer import trial_folder
from orchestration.lineage import CONSTRAINTS, ROOT
from orchestration.once import made_once

#: Where the model lies among the artifacts of its run, and the alias of the version that is its cell's best.
FOLDER = "model"
ALIAS = "best"

#: What the package helix imports to predict (tests/orchestration/test_model_store.py), and MLflow to load it.
REQUIREMENTS = (
    *("mlflow", "numba", "numpy", "omegaconf", "pandas", "pyarrow", "pyyaml", "safetensors", "soundfile", "soxr"),
    "torch",
)

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "wav", required=False), ColSpec(DataType.string, "path", required=False)]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Map(DataType.double), "probabilities"),
        ]
    ),
)


def best_weights_sha256(storage: Storage, trial_id: str) -> str | None:
    """The sha256 of the file of a trial's best weights, None where it kept none. ValueError: they are damaged."""
    body = best_manifest(storage, trial_folder(trial_id))
    return None if body is None else body["files"][BEST_FILE]["sha256"]


def save_model(storage: Storage, described: dict[str, Any], classes: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the best weights of a trial as an MLflow model into `folder`, which must not exist; what it says of itself.

    `described` is the spec.json of the trial. Raises ValueError where the weights are missing or damaged.
    """
    trial_id = described["trial_id"]
    body = best_manifest(storage, trial_folder(trial_id))
    if body is None:
        raise ValueError(f"trial {trial_id} kept no best weights")
    weights = storage.get(f"{trial_folder(trial_id)}/best/{BEST_FILE}")
    if hashlib.sha256(weights).hexdigest() != body["files"][BEST_FILE]["sha256"]:
        raise ValueError(f"the best weights of trial {trial_id} are damaged where they are stored")
    said = describe(
        described["spec"],
        classes,
        weights_sha256=body["files"][BEST_FILE]["sha256"],
        trial_id=trial_id,
        data_manifest=described["data_manifest"],
        science_version=described["science_version"],
        **{key: body[key] for key in ("epoch", "metric", "value")},
    )
    with tempfile.TemporaryDirectory() as aside:
        files = {"weights": Path(aside, "weights.safetensors"), "described": Path(aside, "model.json")}
        files["weights"].write_bytes(weights)
        files["described"].write_bytes(json_bytes(said))
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(ROOT / "orchestration" / "pyfunc_model.py"),
            artifacts={name: path.as_uri() for name, path in files.items()},
            code_paths=[str(ROOT / "helix")],
            signature=SIGNATURE,
            pip_requirements=pinned(REQUIREMENTS),
            metadata={key: said[key] for key in ("trial_id", "weights_sha256", "data_manifest", "epoch", "metric")},
        )
    return said


def pinned(names: Sequence[str]) -> list[str]:
    """Requirements at the versions of constraints.txt, or where that did not travel at those installed here."""
    pins: dict[str, str] = {}
    if CONSTRAINTS.is_file():
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        found = (re.fullmatch(r"([\w.-]+)==([\w.!-]+)\s*", line) for line in lines)
        pins = {match[1].lower().replace("_", "-"): match[2] for match in found if match}
    # A local version such as 2.13.0+cpu is one that no index has.
    return [f"{name}=={pins.get(name) or metadata.version(name).partition('+')[0]}" for name in names]


def register(
    client: MlflowClient,
    storage: Storage,
    *,
    database: str,
    name: str,
    run: Run,
    described: dict[str, Any],
    classes: Sequence[str],
    text: str,
) -> str:
    """The version of the registered model `name` that is these weights, made now if there is none; it becomes `ALIAS`.

    `database` identifies the MLflow that `client` talks to. However often and from however many processes this is
    called, the same weights are one version.
    """
    trial_id = described["trial_id"]
    sha256 = best_weights_sha256(storage, trial_id)
    if sha256 is None:
        raise ValueError(f"trial {trial_id} kept no best weights")

    def find() -> str | None:
        found = client.search_model_versions(f"name = '{name}'")
        versions = [int(one.version) for one in found if one.tags.get("helix.weights_sha256") == sha256]
        return str(min(versions)) if versions else None

    def make() -> str:
        with tempfile.TemporaryDirectory() as aside:
            said = save_model(storage, described, classes, Path(aside, FOLDER))
            try:
                client.create_registered_model(name, tags={"helix.level": "cell"}, description=text)
            except MlflowException as error:
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
            client.log_artifacts(run.info.run_id, str(Path(aside, FOLDER)), FOLDER)
        version = client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/{FOLDER}",
            run_id=run.info.run_id,
            tags={"helix.weights_sha256": sha256, "helix.trial_id": trial_id},
            description=f"Trial {trial_id}, weights of epoch {said['epoch']} ({said['metric']} {said['value']:.4f}).",
        )
        return str(version.version)

    def lives(version: str) -> bool:
        try:
            client.get_model_version(name, version)
        except MlflowException:
            return False
        return True

    version = made_once(
        storage,
        f"{database}/models/{name}/{sha256[:16]}",
        find=find,
        make=make,
        remove=lambda version: client.delete_model_version(name, version),
        lives=lives,
    )
    client.set_registered_model_alias(name, ALIAS, version)
    return version
