"""Versions, extensions, machine and storage: each fault is caused, and the row says what it is and what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from helix.checks.extensions import BUILD, explain, import_error, judge
from helix.checks.machine import Cuda, Gpu, cpu_quota, judge_cores, judge_cuda, judge_memory, memory_limit_gib, runs_on
from helix.checks.storage import judge_storage, storage
from helix.checks.versions import NEEDED, OPTIONAL, judge_python, read_pins
from helix.checks.versions import judge as judge_versions
from helix.doctor import Asked, Check

ROOT = Path(__file__).resolve().parents[3]

# Versions


def test_the_pins_of_this_tree_are_read_whatever_the_case_of_a_name():
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8") + "# torch==0.1\nPyYAML == x\n\n")
    assert pins["torch"] == "2.13.0"
    assert pins["typing-extensions"]
    assert pins["flask"]


def judged(installed: dict[str, str | None], pins: dict[str, str] | None) -> dict[str, Check]:
    return {check.name: check for check in judge_versions(installed, pins)}


def test_a_build_of_the_pinned_torch_is_the_pinned_torch():
    assert judged({"torch": "2.13.0+cpu"}, {"torch": "2.13.0"})["torch"].status == "ok"


def test_another_torch_than_the_pinned_one_is_a_warning_that_names_the_cause():
    row = judged({"torch": "2.12.1"}, {"torch": "2.13.0"})["torch"]
    assert row.status == "warn"
    assert "torch==2.13.0" in row.advice
    assert "mamba-ssm" in row.advice


def test_without_pins_any_version_will_do():
    assert judged({"torch": "2.12.1"}, None)["torch"].status == "ok"


@pytest.mark.parametrize("name", [*NEEDED, *OPTIONAL])
def test_what_is_missing_fails_only_where_a_sweep_needs_it(name: str):
    row = judged({name: None}, {})[name]
    assert (row.status, row.needed) == (("fail", True) if name in NEEDED else ("absent", False))
    assert row.advice


def test_an_old_python_cannot_run_a_sweep():
    row = judge_python((3, 9), "3.9.1")
    assert (row.status, row.needed) == ("fail", True)
    assert "3.11" in row.advice
    assert judge_python((3, 14), "3.14.0").status == "ok"


# Extensions


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a package of the given name and contents that this process and its children find first."""

    def make(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


def test_a_package_that_was_built_for_another_torch_is_reported_with_its_error_and_its_cure(fake_package):
    said = "/lib/selective_scan_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"
    fake_package("mamba_ssm", f"raise ImportError({said!r})")
    error = import_error("mamba_ssm")
    assert error is not None
    row = judge("mamba_ssm", error, cuda=True)
    assert row.status == "fail"
    assert said in row.found
    for words in (
        "built for another torch",
        "MAMBA_FORCE_BUILD=TRUE",
        "--no-build-isolation",
        "MAMBA_KEEP_CUDA_BUILD=TRUE",
    ):
        assert words in row.advice


def test_triton_is_missed_where_torch_is_for_cuda_and_nowhere_else():
    assert "pip install" in judge("triton", "", cuda=True).advice
    assert "nothing" in judge("triton", "", cuda=False).advice


def test_a_package_that_crashes_the_process_is_reported_and_this_process_lives(fake_package):
    fake_package("causal_conv1d", "import os; os.abort()")
    error = import_error("causal_conv1d")
    assert error
    assert judge("causal_conv1d", error, cuda=True).status == "fail"


def test_a_package_that_works_is_ok(fake_package):
    fake_package("causal_conv1d", "causal_conv1d_fn = None")
    assert judge("causal_conv1d", import_error("causal_conv1d"), cuda=True).status == "ok"


def test_a_package_that_is_not_there_is_absent_with_how_to_build_it_where_there_is_cuda():
    assert import_error("no_such_package_anywhere") == ""
    assert BUILD in judge("mamba_ssm", "", cuda=True).advice
    assert judge("mamba_ssm", "", cuda=False).advice.startswith("nothing")


@pytest.mark.parametrize(
    ("package", "error", "says"),
    [
        ("mamba_ssm", "ImportError: x.so: undefined symbol: _ZNK3c10", ["another torch", "MAMBA_FORCE_BUILD"]),
        (
            "mamba_ssm",
            "ImportError: libstdc++.so.6: version `GLIBCXX_3.4.32' not found",
            ["newer compiler", "FORCE_BUILD"],
        ),
        (
            "causal_conv1d",
            "ImportError: libcudart.so.12: cannot open shared object",
            ["CUDA that is not here", "FORCE_BUILD"],
        ),
        ("mamba_ssm", "ModuleNotFoundError: No module named 'triton'", ["torch for CUDA"]),
        (
            "mamba_ssm",
            "ModuleNotFoundError: No module named 'selective_scan_cuda'",
            ["without its CUDA kernel", "KEEP_CUDA"],
        ),
        ("mamba_ssm", "RuntimeError: CUDA error: no kernel image is available", ["architectures", "FORCE_BUILD"]),
        (
            "torchaudio",
            "OSError: libtorchaudio.so: undefined symbol: _ZN2at",
            ["pip uninstall torchaudio", "another torch"],
        ),
        (
            "torchaudio",
            "OSError: libcudart.so.13: cannot open shared object file",
            ["pip uninstall torchaudio", "not here"],
        ),
    ],
)
def test_each_reported_failure_has_its_own_explanation(package: str, error: str, says: list[str]):
    assert [words for words in says if words not in explain(package, error)] == []


# Machine


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_a_quota_of_either_version_of_cgroups_is_read(files: dict[str, str], cores: float | None, tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(tmp_path) == cores


def test_more_cores_than_the_quota_pays_for_are_a_warning():
    assert judge_cores(64, 64, 4.0).status == "warn"
    assert judge_cores(4, 4, 4.0).status == "ok"
    assert judge_cores(4, 4, None).status == "ok"


@pytest.mark.parametrize(("name", "limit"), [("memory.max", "2147483648"), ("memory.max", "max")])
def test_a_memory_limit_that_is_too_small_for_a_worker_is_a_warning(name: str, limit: str, tmp_path: Path):
    (tmp_path / name).write_text(limit)
    limited = limit != "max"
    assert memory_limit_gib(tmp_path) == (2.0 if limited else None)
    assert judge_memory(32.0, 16.0, tmp_path).status == ("warn" if limited else "ok")


def cuda(**changes) -> Cuda:
    gpu = Gpu(name="H100", capability=(9, 0), memory_gib=80)
    known = {
        "built": "13.0",
        "architectures": ("sm_80", "sm_90", "compute_90"),
        "gpus": (gpu,),
        "driver": "590",
        "nvcc": "13.0",
    }
    return Cuda(**(known | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "status", "says"),
    [
        (cuda(built=None, gpus=(), driver=None), "absent", "CPUs"),
        (cuda(built=None, gpus=()), "warn", "this torch is built for CPUs"),
        (cuda(gpus=()), "warn", "driver"),
        (cuda(gpus=(), driver=None), "absent", "CUDA_VISIBLE_DEVICES"),
        (cuda(nvcc=None), "absent", "CUDA_HOME"),
        (cuda(nvcc="12.4"), "warn", "first on PATH"),
        (cuda(architectures=("sm_75", "sm_80")), "fail", "no kernel image"),
        (cuda(), "ok", ""),
    ],
)
def test_each_state_of_cuda_has_its_row(facts: Cuda, status: str, says: str):
    worst = max(judge_cuda(facts), key=lambda check: ["ok", "absent", "warn", "fail"].index(check.status))
    assert worst.status == status
    assert says in worst.advice


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_80", "sm_90"], True),
        ((12, 1), ["sm_80", "sm_90"], False),
        ((12, 1), ["sm_90", "compute_90"], True),
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_100a"], True),
        ((7, 5), ["compute_90"], False),
    ],
)
def test_code_runs_on_later_minors_of_its_major_and_ptx_on_whatever_comes_later(capability, architectures, runs):
    assert runs_on(capability, architectures) is runs


# Storage


def test_a_storage_that_can_be_written_is_ok_and_left_as_it_was(tmp_path: Path):
    assert judge_storage(str(tmp_path / "runs")).status == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    assert judge_storage(str(tmp_path / "runs")).status == "ok"
    assert (tmp_path / "runs").is_dir()


def test_a_storage_that_cannot_be_written_is_needed_and_fails(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    for address in (str(tmp_path / "file" / "runs"), "gopher://hole"):
        row = judge_storage(address)
        assert (row.status, row.needed) == ("fail", True)
        assert row.advice


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no file system here that nobody can write to")
def test_a_read_only_storage_fails_also_for_root():
    assert judge_storage("/sys/kernel/helix-runs").status == "fail"


def test_a_ray_that_does_not_start_is_a_finding(tmp_path: Path):
    def breaks() -> str:
        raise RuntimeError("the raylet died")

    rows = {row.name: row for row in storage(Asked(storage=str(tmp_path), rehearse_ray=breaks))}
    assert rows["local Ray"].status == "fail"
    assert "the raylet died" in rows["local Ray"].found


@pytest.mark.ray
def test_the_command_starts_a_ray_and_stops_it(tmp_path: Path):
    command = [sys.executable, "-m", "orchestration.cli", "doctor", "--ray", "--storage", str(tmp_path)]
    run = "import sys; from orchestration.cli import main; sys.exit(main())"
    command[1:3] = ["-c", run]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a task ran in process" in " ".join(done.stdout.split())
