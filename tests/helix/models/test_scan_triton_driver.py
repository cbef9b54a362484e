"""A machine that lacks what Triton compiles in C is told so before a trial spends anything, and nothing else scans."""

import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import helix.models.scan as scan
from helix.checks import scan as checks
from helix.doctor import Asked
from helix.models.agreement import conv_inputs, scan_inputs, scanned
from helix.models.blocks.mamba import BiMambaLayer
from helix.models.scan import conv_silu, selective_scan
from helix.models.scan_error import UnusableScanError
from orchestration.recovery import UNWRITABLE, Budget, Ended, decide, kind

NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."


class Driver:
    """triton.runtime.driver where its library cannot be made: each use of it raises."""

    def __init__(self, error: Exception):
        self.error, self.asked = error, 0

    @property
    def active(self) -> object:
        self.asked += 1
        raise self.error


@pytest.fixture
def own() -> ModuleType:
    """The module under test."""
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    return importlib.import_module("helix.models.scan_triton_driver")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler is to be found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def refused(own: ModuleType, error: Exception, monkeypatch: pytest.MonkeyPatch) -> UnusableScanError:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(own, "driver", Driver(error))
    with pytest.raises(UnusableScanError) as raised:
        own.require_driver()
    return raised.value


def test_without_a_compiler_it_says_so_with_tritons_own_line_and_what_to_do(own, bare, monkeypatch):
    said = str(refused(own, RuntimeError(NO_COMPILER), monkeypatch))
    assert "no C compiler: CC is not set" in said and NO_COMPILER in said
    for cure in ("apt-get install gcc libc6-dev python3-dev", "CC names", "mamba-ssm", "HELIX_SCAN=reference"):
        assert cure in said


def test_a_named_compiler_that_is_not_there_is_named(own, bare, monkeypatch):
    monkeypatch.setenv("CC", "icc-13")
    error = refused(own, FileNotFoundError(errno.ENOENT, "No such file or directory", "icc-13"), monkeypatch)
    assert error.found.startswith("CC is 'icc-13', which is no program here")


def test_headers_that_are_missing_are_found_missing(own, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", sys.executable)  # any program
    monkeypatch.setattr(sysconfig, "get_path", lambda _name, _scheme: str(tmp_path))
    error = refused(own, subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), monkeypatch)
    assert f"no Python.h in {tmp_path}" in error.found and "python3-dev" in error.advice
    (tmp_path / "Python.h").touch()
    error = refused(own, subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), monkeypatch)
    assert "Python.h" not in error.found and "see above what the compiler said" in error.advice


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (PermissionError(errno.EACCES, "Permission denied", ".triton"), "TRITON_CACHE_DIR"),
        (OSError(errno.EROFS, "Read-only file system", ".triton"), "TRITON_CACHE_DIR"),
        (AssertionError("libcuda.so cannot found!"), "ldconfig"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_other_trouble_has_another_cure(own, error, cure, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name, _scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    said = refused(own, error, monkeypatch)
    assert cure in said.advice and repr(error) in said.found and "apt-get" not in said.advice


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ESTALE, "Stale file handle"),
        subprocess.CalledProcessError(-9, ["gcc"]),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=repr,
)
def test_what_may_be_otherwise_at_the_next_attempt_is_no_trait_of_the_machine(own, error, monkeypatch):
    monkeypatch.setattr(own, "driver", Driver(error))
    with pytest.raises(type(error)) as raised:
        own.require_driver()
    assert raised.value is error


def test_a_full_disk_is_that_and_no_trait_of_the_machine(own, bare, monkeypatch):
    monkeypatch.setattr(own, "driver", Driver(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError) as raised:
        own.require_driver()
    assert kind(raised.value) == UNWRITABLE


def test_the_interpreter_needs_none_of_it(own, bare, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    broken = Driver(RuntimeError(NO_COMPILER))
    monkeypatch.setattr(own, "driver", broken)
    own.require_driver()
    assert broken.asked == 0


COMPILE = """
import torch
torch.cuda.is_available = lambda: True
from helix.models.scan_error import UnusableScanError
from helix.models.scan_triton_driver import require_driver
try:
    require_driver()
except UnusableScanError as error:
    print("refused:", error)
else:
    assert not torch.cuda.is_initialized()
    print("made")
"""


@pytest.mark.skipif(
    shutil.which("gcc") is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="gcc makes what Triton is to make, with Python.h, and one of them is not here",
)
def test_triton_itself_fails_without_a_compiler_and_what_it_once_made_needs_none(own, tmp_path):
    """Its own driver, source and compilation, for a GPU that is not there: libcuda is a library of empty functions."""
    cache, empty = tmp_path / "cache", tmp_path / "empty"
    empty.mkdir()
    if file := shutil.which("file"):  # by which platform.architecture() names the machine, and Triton its cache
        (empty / "file").symlink_to(file)
    source = Path(own.triton.__file__).parent / "backends/nvidia/driver.c"
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+", source.read_text(encoding="utf-8"))))
    stub = tmp_path / "libcuda.c"
    stub.write_text("".join(f"void {name}{v}(void) {{}}\n" for name in names for v in ("", "_v2", "_v3")))
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", stub], check=True)

    def ask(path: str) -> str:
        own_settings = {"CC", "TRITON_INTERPRET", "TRITON_DEFAULT_BACKEND"}
        settings = {name: value for name, value in os.environ.items() if name not in own_settings}
        settings |= {"PATH": path, "TRITON_CACHE_DIR": str(cache)}
        settings |= dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = ask(str(empty))
    assert said.startswith("refused:") and "no C compiler" in said and "Failed to find C compiler" in said
    assert ask(os.environ["PATH"]) == "made\n"
    assert ask(str(empty)) == "made\n"


# --- Where it is asked.


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A backend of the CPU, taken before others, that lacks something of this machine; holds when it was asked."""
    asked: list[str] = []

    def ready() -> None:
        asked.append("asked")
        raise UnusableScanError("numba", "no C compiler", "install one")

    scans = SimpleNamespace(
        selective_scan=lambda u, *_others: u.clone(), conv_silu=lambda u, *_others: u.clone(), WORKSPACE_BYTES={}
    )
    backend = scan.Backend(device="cpu", load=lambda: scans, ready=ready)  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(scan.BACKENDS, "numba", backend)
    monkeypatch.setattr(scan, "_kernels", {})
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    scan._import.cache_clear()
    scan._make_ready.cache_clear()
    yield asked
    scan._import.cache_clear()
    scan._make_ready.cache_clear()


def test_a_layer_on_a_machine_that_lacks_something_is_refused_and_no_other_scan_is_taken(lacking):
    assert scan.scan_backend(torch.device("cpu"), torch.float32) == "numba"
    with pytest.raises(UnusableScanError, match="no C compiler; install one"):
        BiMambaLayer(8, 6, 3, 4)(torch.randn(1, 5, 8))
    with pytest.raises(UnusableScanError):
        scanned(selective_scan)(*scan_inputs(1, 5, 4, 3))
    with pytest.raises(UnusableScanError):
        conv_silu(*conv_inputs(1, 5, 4, 3))
    assert (
        scanned(lambda *x, **options: selective_scan(*x, **options, backend="reference"))(*scan_inputs(1, 5, 4, 3))
        .isfinite()
        .all()
    )


def test_what_failed_is_asked_again_and_what_is_ready_is_not(lacking, monkeypatch):
    for _ in range(2):
        with pytest.raises(UnusableScanError):
            scan.require_usable("numba")
    assert len(lacking) == 2
    monkeypatch.setitem(scan.BACKENDS, "numba", replace(scan.BACKENDS["numba"], ready=lambda: lacking.append("made")))
    for _ in range(3):
        scanned(selective_scan)(*scan_inputs(1, 5, 4, 3))
    assert lacking == ["asked", "asked", "made"]


def test_who_only_counts_or_names_a_scan_does_not_ask(lacking):
    assert scan.kernels("numba") is not None
    with scan.simulated("numba"):
        scanned(selective_scan)(*scan_inputs(1, 5, 4, 3))
    assert scan.scan_backend(torch.device("cpu"), torch.float32) == "numba"
    assert not lacking


def test_such_a_trial_is_not_tried_three_times(lacking):
    with pytest.raises(UnusableScanError) as raised:
        scan.require_usable("numba")
    assert decide([Ended(error=kind(raised.value), step=0)], Budget()).action == "stop"


def test_the_scan_for_cuda_asks_triton(own, bare, monkeypatch):
    monkeypatch.setattr(own, "driver", Driver(RuntimeError(NO_COMPILER)))
    with pytest.raises(UnusableScanError):
        scan.BACKENDS["triton"].ready()


# --- What the doctor says.


def test_the_doctor_says_once_what_triton_lacks_and_keeps_its_report(own, bare, monkeypatch):
    monkeypatch.setattr(own, "driver", Driver(RuntimeError(NO_COMPILER)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("HELIX_SCAN", raising=False)
    scan._make_ready.cache_clear()
    rows = {row.name: row for row in checks.scan(Asked(storage="runs"))}
    assert rows["scan on cpu: choice"].status == "ok"
    assert rows["scan on cuda: choice"].status == "fail"
    assert "scan triton on cuda" in rows["scan on cuda: choice"].advice
    row = rows["scan triton on cuda"]
    assert row.status == "fail" and "no C compiler" in row.found and "apt-get install gcc" in row.advice
    assert "nvcc and an -arch" not in row.advice and "wrong" not in row.advice
    assert not [name for name in rows if name.startswith(("scan triton on cuda,", "conv triton"))]
    assert "scan on cpu: same bits again" in rows


def test_a_scan_that_raises_when_it_is_run_again_is_one_row(monkeypatch):
    def raises(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")

    monkeypatch.setattr(checks, "selective_scan", raises)
    row = checks.judge_determinism("cpu")
    assert row.status == "fail" and "unspecified launch failure" in row.found


def test_a_full_disk_is_a_row_of_the_doctor_too(lacking, monkeypatch):
    def ready() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(scan.BACKENDS, "numba", replace(scan.BACKENDS["numba"], ready=ready))
    (row,) = checks.self_tests("numba", "cpu")
    assert row.status == "fail" and "No space left" in row.found
