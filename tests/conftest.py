"""What tests of several folders share: a storage, a few seconds of tones, and specs small enough to train in one."""

import gc
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helix.data.shards import Recordings, open_prepared, prepare
from helix.loopback import FaultProxy, environment_of, make_bucket, s3_server_on_loopback
from helix.protocol import profile
from helix.spec import AugmentSpec, DataSpec, ModelSpec, TrainingSpec, TrialSpec
from helix.storage import FolderStorage, Storage
from orchestration.grid import VARIANTS, Grid, Trial
from orchestration.plan import Snapshot, make_plan

CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking"),
)

TINY_TONES = {"clips_per_class": 16}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="write the golden losses of this version (make golden)"
    )


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end; walking it again takes a fifth of a second each time that
    garbage is collected, which the benches do before each timing."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Tests run as a worker does on one core, so that their numbers do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "storage")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Recordings:
    """Four folds of the tones, a handful of clips each."""
    storage = FolderStorage(tmp_path_factory.mktemp("tones"))
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


@pytest.fixture
def tiny_sweep(tiny_spec: TrialSpec, tiny_data: Recordings, storage: Storage) -> Snapshot:
    """Two variants on two folds for two epochs, with their data in the storage and nothing trained yet."""
    prepare("tones", TINY_TONES, source=None, storage=storage)
    trials = []
    for fold in (1, 2):
        for variant in VARIANTS[3::2]:
            spec = replace(
                with_training(tiny_spec, epochs=2),
                data=replace(tiny_spec.data, fold=fold),
                model=replace(tiny_spec.model, frontend=variant.frontend, pattern=variant.pattern[2:4]),
            )
            trials.append(Trial(variant=variant, spec=spec))
    return Snapshot(
        grid_name="test",
        grid=Grid(question="Does it replay?", dataset="tones", folds=(1, 2)),
        plan=make_plan(trials, tiny_data),
        recordings=tiny_data,
        storage=storage,
        command="test",
    )


def with_training(spec: TrialSpec, **changes) -> TrialSpec:
    return replace(spec, training=replace(spec.training, **changes))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[str]:
    """The URL of an S3 server on loopback for all tests of this process."""
    with s3_server_on_loopback(tmp_path_factory.mktemp("moto")) as endpoint:
        yield endpoint


@pytest.fixture
def s3_address(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3://bucket/prefix in a fresh bucket; the environment, which subprocesses inherit, leads boto3 there alone."""
    for name, value in environment_of(s3_server, tmp_path).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, bucket)
    return f"s3://{bucket}/some/prefix"


@pytest.fixture
def fault_proxy(s3_server: str, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the S3 server; storage that is opened from here on goes through it."""
    with FaultProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.address)
        yield proxy


@pytest.fixture(name="browser", scope="module")
def _browser() -> Iterator[Any]:
    """Headless Chromium, as playwright's `Browser`."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=list(CHROMIUM_FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where screenshots are kept: HELIX_ARTIFACTS, or this test's own folder."""
    folder = Path(os.environ.get("HELIX_ARTIFACTS") or tmp_path / "pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
