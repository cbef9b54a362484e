"""The registered model of a cell: whoever has its folder can predict, and nothing in it is a pickle."""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import soundfile
import yaml
from mlflow.exceptions import MlflowException

from helix.data.shards import Recordings
from helix.spec import TrialSpec
from helix.storage import Storage
from helix.training.trainer import Fit, fit
from orchestration import model_store
from orchestration.lineage import ROOT
from orchestration.model_store import REQUIREMENTS, best_weights_sha256, pinned, save_model
from tests.conftest import with_training


@pytest.fixture(scope="module")
def sounds(tiny_data: Recordings, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("sounds")
    for row in range(2):
        soundfile.write(folder / f"{row}.wav", tiny_data.wave(row), 16_000, subtype="PCM_16")
    return sorted(folder.iterdir())


@pytest.fixture
def described(tiny_spec: TrialSpec, tiny_data: Recordings, storage: Storage):
    """The spec.json of a trial that is done."""
    result = fit(with_training(tiny_spec, epochs=1), tiny_data, Fit(storage=storage))
    return storage.get_json(f"trials/{result['trial_id']}/spec.json")


@pytest.fixture
def folder(described, tiny_data: Recordings, storage: Storage, tmp_path: Path) -> Path:
    save_model(storage, described, tiny_data.classes, tmp_path / "model")
    return tmp_path / "model"


def test_paths_and_bytes_give_classes_and_probabilities(folder: Path, sounds: list[Path], tiny_data: Recordings):
    model = mlflow.pyfunc.load_model(str(folder))
    paths, data = [str(path) for path in sounds], [path.read_bytes() for path in sounds]
    said = model.predict(pd.DataFrame({"path": paths}))
    assert list(said.columns) == ["class", "probability", "probabilities"]
    assert set(said["class"]) <= set(tiny_data.classes)
    for row in said.to_dict("records"):
        assert list(row["probabilities"]) == list(tiny_data.classes)
        assert sum(row["probabilities"].values()) == pytest.approx(1, rel=1e-5)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["class"]]
    same = [pd.DataFrame({"wav": data}), [{"path": path} for path in paths], {"wav": data}]
    for given in same:
        pd.testing.assert_frame_equal(model.predict(given), said)


@pytest.mark.parametrize("given", [["a.wav"], [b"RIFF"], "a.wav", pd.DataFrame({"file": ["a.wav"]})])
def test_input_in_another_form_is_refused_and_no_empty_answer(folder: Path, given):
    with pytest.raises((ValueError, MlflowException), match="column wav"):
        mlflow.pyfunc.load_model(str(folder)).predict(given)


def test_a_row_with_two_sounds_is_refused(folder: Path, sounds: list[Path]):
    row = {"wav": [sounds[0].read_bytes()], "path": [str(sounds[1])]}
    with pytest.raises(ValueError, match="holds 2 sounds"):
        mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame(row))


def test_nothing_in_the_folder_is_a_pickle_and_it_loads_where_pickles_are_forbidden(
    folder: Path, sounds: list[Path], monkeypatch: pytest.MonkeyPatch
):
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {"", ".py", ".json", ".yaml", ".txt", ".safetensors"}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 3e6
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    assert len(mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"path": [str(sounds[0])]}))) == 1


def test_the_folder_brings_the_code_that_it_needs(folder: Path, sounds: list[Path], tmp_path: Path):
    """In a process of its own, started elsewhere, where no other helix can be imported."""
    script = f"""
import sys
class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("orchestration", "dashboards"):
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Closed())
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model({str(folder)!r})
print(model.predict(pandas.DataFrame({{"path": [{str(sounds[0])!r}]}})).to_json(orient="records"))
import helix
print(helix.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer, place = done.stdout.strip().splitlines()[-2:]
    here = mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame({"path": [str(sounds[0])]}))
    assert json.loads(answer)[0]["class"] == here["class"][0]
    np.testing.assert_allclose(json.loads(answer)[0]["probability"], here["probability"][0], rtol=1e-5)
    assert Path(place).is_relative_to(folder)


def test_the_requirements_are_what_the_code_imports_at_the_versions_of_the_constraints(folder: Path):
    packages = metadata.packages_distributions()
    script = (
        "import sys, helix.training.predictor;"
        "print(*[m.__file__ for n, m in list(sys.modules.items()) if n.split('.')[0] == 'helix'])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {"mlflow"}
    for path in [*map(Path, done.stdout.split()), ROOT / "orchestration" / "pyfunc_model.py"]:
        for node in ast.parse(path.read_text()).body:  # optional kernels are imported later than that
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported |= {packages[name.split(".")[0]][0].lower() for name in names if name.split(".")[0] in packages}
    # The namespace of mlflow is that of two of its own parts as well; storages are not opened to predict.
    assert imported - {"helix-sweeps", "mlflow-tracing", "mlflow-skinny"} <= {*REQUIREMENTS}
    pins = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    said = (folder / "requirements.txt").read_text().split()
    assert said == [f"{name}=={pins[name]}" for name in REQUIREMENTS]


def test_where_the_constraints_did_not_travel_the_installed_versions_are_named(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(model_store, "CONSTRAINTS", tmp_path / "constraints.txt")
    assert pinned(["torch", "numpy"]) == [
        f"torch=={metadata.version('torch').partition('+')[0]}",
        f"numpy=={metadata.version('numpy')}",
    ]


def test_the_signature_and_the_origin_are_written_on_it(folder: Path, described, storage: Storage):
    said = yaml.safe_load((folder / "MLmodel").read_text())
    assert [column["name"] for column in json.loads(said["signature"]["inputs"])] == ["wav", "path"]
    assert [column["name"] for column in json.loads(said["signature"]["outputs"])] == [
        "class",
        "probability",
        "probabilities",
    ]
    assert said["metadata"]["trial_id"] == described["trial_id"]
    assert said["metadata"]["weights_sha256"] == best_weights_sha256(storage, described["trial_id"])
    assert re.fullmatch("[0-9a-f]{64}", said["metadata"]["data_manifest"])


def test_damaged_weights_are_not_made_a_model(described, tiny_data: Recordings, storage: Storage, tmp_path: Path):
    key = f"trials/{described['trial_id']}/best/model.safetensors"
    data = bytearray(storage.get(key))
    data[-1] ^= 1
    storage.put(key, bytes(data))
    with pytest.raises(ValueError, match="are damaged"):
        save_model(storage, described, tiny_data.classes, tmp_path / "model")
    storage.delete_folder(f"trials/{described['trial_id']}/best")
    with pytest.raises(ValueError, match="kept no best weights"):
        save_model(storage, described, tiny_data.classes, tmp_path / "model")
    assert not (tmp_path / "model").exists()
