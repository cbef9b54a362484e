"""`ray job submit` on loopback: nodes with the dependencies and without this package, and no way in without a token."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from helix.storage import FolderStorage
from orchestration import sweep

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--grid", "demo", "--variants", "mamba-mel", "--folds", "1", "training.epochs=1"),
    *("data.options.clips_per_class=16", "model.width=40", "model.options.mamba.d_state=16", "training.batch_size=24"),
)
RAY = "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head that runs: its dashboard, its Python, and the environment that holds its token."""

    url: str
    python: Path
    environment: dict[str, str]
    token: str

    def submit(self, *arguments: str, token: bool = True) -> subprocess.CompletedProcess[str]:
        """`ray job submit` as people type it, from the root of the repository."""
        named = {name: value for name, value in self.environment.items() if token or not name.startswith("RAY_AUTH")}
        command = [str(self.python), "-c", RAY, "job", "submit", "--address", self.url, "--working-dir", ".", "--"]
        return subprocess.run(
            [*command, "python", "orchestration/sweep.py", *arguments],
            cwd=ROOT,
            env=named,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def jobs(self, **headers: str) -> Any:
        """All jobs, as the head tells those who may ask."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/jobs/", headers=headers)) as answer:
            return json.load(answer)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a token, whose Python sees the dependencies of this one and nothing that is only linked into it."""
    folder = Path(tempfile.mkdtemp(prefix="helix-job-"))  # short: Ray's sockets lie in it
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    places = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    Path(sysconfig.get_path("purelib", vars=places), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    if subprocess.run([python, "-c", "import helix"], cwd=folder, capture_output=True).returncode == 0:
        pytest.skip("helix is copied into this environment, so its dependencies cannot be had without it")
    token = secrets.token_hex(32)
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "HELIX_", "MLFLOW_"))}
    environment = {
        **kept,
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    dashboard = free_port()
    ports = {"--port": free_port(), "--dashboard-port": dashboard, "--ray-client-server-port": free_port()}
    ports |= {"--dashboard-agent-listen-port": free_port(), "--dashboard-agent-grpc-port": free_port()}
    start = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    start += ["--object-store-memory=100000000", *(f"{name}={port}" for name, port in ports.items())]
    output = (folder / "output").open("w+")
    process = subprocess.Popen([python, "-c", RAY, *start], cwd=folder, env=environment, stdout=output, stderr=output)
    running = Head(url=f"http://127.0.0.1:{dashboard}", python=python, environment=environment, token=token)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                running.jobs(Authorization=f"Bearer {token}")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the head did not start ({error}): {(folder / 'output').read_text()[-3000:]}")
                time.sleep(0.3)
        yield running
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for child in children:
            if child.is_running():
                child.kill()
        output.close()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.service
def test_a_sweep_is_submitted_with_a_token_and_refused_without(head: Head, tmp_path: Path):
    storage = FolderStorage(tmp_path / "storage")

    with pytest.raises(urllib.error.HTTPError) as refused:
        head.jobs()
    assert refused.value.code == 401
    anonymous = head.submit(*SMALL, "--storage", str(storage.root), token=False)
    assert anonymous.returncode != 0
    assert head.jobs(Authorization=f"Bearer {head.token}") == []
    assert not storage.root.exists()

    done = head.submit(*SMALL, "--storage", str(storage.root))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "1 trials: 0 done, 1 to train" in done.stdout
    (name,) = storage.children("trials")
    assert storage.exists(f"trials/{name}/result.json")

    wrong = head.submit("--grid", "nonsense", "--storage", str(storage.root))
    assert wrong.returncode != 0
    codes = sorted(job["driver_exit_code"] for job in head.jobs(Authorization=f"Bearer {head.token}"))
    assert codes == [0, sweep.REFUSED]
