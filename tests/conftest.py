"""What tests of several folders share: a storage, a few seconds of tones, and specs small enough to train in one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helix.data.shards import Recordings, open_prepared, prepare
from helix.protocol import profile
from helix.spec import AugmentSpec, DataSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.storage import Storage

TINY_TONES = {"clips_per_class": 16}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden losses of this version (make golden)"
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run as a worker does on one core, so that their numbers do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "storage")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Recordings:
    """Four folds of the tones, a handful of clips each."""
    storage = Storage(tmp_path_factory.mktemp("tones"))
    prepared = prepare("tones", TINY_TONES, source=None, storage=storage)
    return open_prepared(storage, prepared.prefix)


@pytest.fixture
def tiny_spec() -> TrialSpec:
    """Two blocks of width 16 for three epochs of three steps."""
    return TrialSpec(
        data=DataSpec(dataset="tones", fold=1, options=TINY_TONES),
        model=ModelSpec(frontend="mel", pattern=("mamba", "attention"), width=16, options={"mamba": {"d_state": 4}}),
        augment=AugmentSpec(),
        training=TrainingSpec(epochs=3, batch_size=24, lr=1e-3),
        protocol=profile("paper"),
    )


def with_training(spec: TrialSpec, **changes) -> TrialSpec:
    return replace(spec, training=replace(spec.training, **changes))
