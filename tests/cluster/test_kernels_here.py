"""One command builds the CUDA kernels for the GPU of a machine, and says what is missing before it builds anything.

The pinned sources themselves are driven with stand-ins for the compilers where HELIX_TEST_KERNEL_SOURCES names a folder
with the archives that pip downloads: MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download
--no-deps --no-binary :all: --no-build-isolation -c constraints.txt mamba-ssm causal-conv1d.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.cluster.validators import CLUSTER, ROOT, path_without

SCRIPT = CLUSTER / "kernels_here.sh"

#: Any program that takes --version stands in for ninja where nothing is compiled.
NINJA = "/bin/true"


def stand_in(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def machine(
    folder: Path, *, torch: str = "13.0", nvcc: str | None = "13.0", gpus: str = "9.0", headers: bool = True
) -> dict[str, str]:
    """An environment of stand-ins: a python whose torch is of that CUDA and sees such GPUs, and compilers."""
    python = f"""
echo "python $*" >>{folder}/calls
env | grep -E '^(MAMBA|CAUSAL|PYTORCH_NVCC|HELIX_CUDA|MAX_JOBS|CUDA_HOME)' >>{folder}/calls
case "$*" in
*torch.version.cuda*) echo "{torch}" ;;
*get_device_capability*) echo "{gpus}" ;;
*sysconfig*) echo {folder}/include ;;
*"pip install"*" ninja "*) ln -sf {NINJA} {folder}/ninja ;;
*"pip wheel"*)
    echo "ninja $(command -v ninja)" >>{folder}/calls
    while [ "$1" != -w ]; do shift; done
    touch "$2/causal_conv1d-2.whl" "$2/mamba_ssm-2.whl" ;;
*helix.doctor*) exit "${{DOCTOR:-0}}" ;;
esac
"""
    if nvcc is not None:
        stand_in(folder / "cuda/bin/nvcc", f'echo "Cuda compilation tools, release {nvcc}, V{nvcc}.88"')
    if headers:
        (folder / "include").mkdir()
        (folder / "include/Python.h").touch()
    return {
        "PATH": path_without(folder / "system", "ninja"),
        "CXX": str(stand_in(folder / "g++", "exit 1")),
        "PYTHON": str(stand_in(folder / "python", python)),
        "CUDA_HOME": str(folder / "cuda"),
    }


def run(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, folder / "wheels", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_kernels_are_built_for_the_gpu_that_is_there_installed_and_looked_at(tmp_path: Path):
    done = run(tmp_path, machine(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert "-m venv" not in calls, "against the torch that is there"
    wheel = next(line for line in calls.splitlines() if "pip wheel" in line)
    assert "--no-build-isolation" in wheel and f"-w {tmp_path}/wheels/building." in wheel and "--no-index" not in wheel
    for setting in (
        *("MAMBA_FORCE_BUILD=TRUE", "MAMBA_KEEP_CUDA_BUILD=TRUE", "CAUSAL_CONV1D_FORCE_BUILD=TRUE"),
        *("HELIX_CUDA_ARCHS=9.0", f"PYTORCH_NVCC={CLUSTER}/images/nvcc.sh", "MAX_JOBS="),
    ):
        assert setting in calls
    order = ["pip wheel", "pip install --force-reinstall", 'backend="mamba_ssm"', "-m helix.doctor"]
    assert sorted(order, key=calls.index) == order
    assert {path.name for path in (tmp_path / "wheels").iterdir()} == {"causal_conv1d-2.whl", "mamba_ssm-2.whl"}


def test_wheels_of_an_earlier_version_are_not_installed_beside_the_new_ones(tmp_path: Path):
    old = tmp_path / "wheels" / "mamba_ssm-1.whl"
    old.parent.mkdir()
    old.touch()
    done = run(tmp_path, machine(tmp_path))
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    (installed,) = [line for line in calls if "pip install --force-reinstall" in line]
    assert installed.count("mamba_ssm-") == 1 and "mamba_ssm-2.whl" in installed
    assert old.exists() and (tmp_path / "wheels/mamba_ssm-2.whl").exists()


def test_a_python_that_is_named_from_here_is_found_from_elsewhere(tmp_path: Path):
    environment = machine(tmp_path) | {"PYTHON": "./python"}
    done = subprocess.run([SCRIPT, "wheels"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "wheels").iterdir()} == {"causal_conv1d-2.whl", "mamba_ssm-2.whl"}
    assert "-m helix.doctor" in (tmp_path / "calls").read_text()


def test_torch_finds_the_ninja_of_the_environment_that_it_is_in(tmp_path: Path):
    """Also where that is named from here, or is on PATH by a bare name."""
    for number, python in enumerate(("{}/python", "./python", "python")):
        place = tmp_path / str(number)
        place.mkdir()
        environment = machine(place) | {"PYTHON": python.format(place)}
        environment["PATH"] += f":{place}" if python == "python" else ""
        (place / "system/python").unlink(missing_ok=True)
        done = subprocess.run([SCRIPT, "wheels"], env=environment, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"ninja {place}/ninja" in (place / "calls").read_text().splitlines()


def test_without_ninja_nothing_is_compiled(tmp_path: Path):
    done = run(tmp_path, machine(tmp_path) | {"SOURCES": str(tmp_path / "sources")})
    assert done.returncode == 2 and f"no ninja that runs beside {tmp_path}/python" in done.stderr
    assert "pip" not in (tmp_path / "calls").read_text()


def test_without_a_network_everything_comes_from_the_sources(tmp_path: Path):
    (tmp_path / "ninja").symlink_to(NINJA)
    done = run(tmp_path, machine(tmp_path) | {"SOURCES": str(tmp_path / "sources")})
    assert done.returncode == 0, done.stderr
    pips = [line for line in (tmp_path / "calls").read_text().splitlines() if "-m pip" in line]
    assert len(pips) == 2 and "--no-deps" in pips[1]
    assert f"--no-index --find-links {tmp_path}/sources" in pips[0]


def test_it_ends_as_the_doctor_ends(tmp_path: Path):
    assert run(tmp_path, machine(tmp_path) | {"DOCTOR": "1"}).returncode == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nvcc": None}, "no nvcc"),
        ({"torch": ""}, "is built for CPUs"),
        ({"nvcc": "12.8"}, "nvcc is of CUDA 12.8 and torch of 13.0"),
        ({"gpus": ""}, "torch sees no GPU here"),
        ({"headers": False}, "no Python.h in"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_built(given: dict, said: str, tmp_path: Path):
    done = run(tmp_path, machine(tmp_path, **given))
    assert done.returncode == 2 and said in done.stderr
    assert "pip" not in (tmp_path / "calls").read_text()


def test_without_a_compiler_nothing_is_built(tmp_path: Path):
    done = run(tmp_path, machine(tmp_path) | {"CXX": "/none/g++"})
    assert done.returncode == 2 and "no /none/g++" in done.stderr
    assert "pip" not in (tmp_path / "calls").read_text()


def test_a_gpu_that_is_not_there_can_be_named(tmp_path: Path):
    assert run(tmp_path, machine(tmp_path, gpus=""), "8.9,9.0").returncode == 0
    assert "HELIX_CUDA_ARCHS=8.9,9.0" in (tmp_path / "calls").read_text()


def test_an_environment_that_is_not_there_is_refused(tmp_path: Path):
    done = run(tmp_path, machine(tmp_path) | {"PYTHON": str(tmp_path / "none")})
    assert done.returncode == 2 and "PYTHON names another" in done.stderr


def test_wheels_for_images_are_refused_without_nvcc_before_anything_is_installed(tmp_path: Path):
    environment = {"PATH": "/usr/bin:/bin", "CUDA_HOME": str(tmp_path), "BUILD_PREFIX": str(tmp_path / "build")}
    command = [CLUSTER / "images" / "build_kernels.sh", tmp_path / "wheels", "9.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and f"{tmp_path}/bin/nvcc is not there" in done.stderr
    assert list(tmp_path.iterdir()) == []


#: torch as a CUDA build of it would look to a setup.py.
AS_CUDA = """
import os, runpy, sys, torch
import torch.utils.cpp_extension as extension
torch.version.cuda, extension.CUDA_HOME = "13.0", os.environ["CUDA_HOME"]
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
#: A compiler that writes down what it is asked and makes empty files.
COMPILER = """
case "$*" in
-V | --version | -v | *-dumpversion* | *-dumpfullversion*) {version}; exit ;;
esac
echo "$@" >>{calls}
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : >"$2"; fi; shift; done
"""


#: A python of a CUDA build of torch, whose `pip wheel` compiles sources with what the environment says, as pip does.
BUILDER = """
case "$*" in
*"pip wheel"*) cd {source} && exec {python} -c "$AS_CUDA" ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize("package", ["mamba_ssm", "causal_conv1d"])
def test_the_real_sources_are_compiled_for_one_architecture_instead_of_nine(package: str, tmp_path: Path):
    """With ninja where pip puts it: beside the python, which is not on PATH."""
    folder = os.environ.get("HELIX_TEST_KERNEL_SOURCES")
    archives = sorted(Path(folder).glob(f"{package}-*.tar.gz")) if folder else []
    if not archives:
        pytest.skip("HELIX_TEST_KERNEL_SOURCES names no folder with the sources that pip downloads")
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if ninja is None:
        pytest.skip("there is no ninja; pip install ninja")
    system, found = path_without(tmp_path / "system", "ninja"), {}
    for way in ("as it is", "by build_kernels.sh"):
        place = tmp_path / way.replace(" ", "-")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(place, filter="data")
        (source,) = place.iterdir()
        nvcc_version = 'echo "Cuda compilation tools, release 13.0, V13.0.88"'
        stand_in(place / "cuda/bin/nvcc", COMPILER.format(version=nvcc_version, calls=place / "calls"))
        cxx = stand_in(place / "cxx", COMPILER.format(version='g++ "$@"', calls=place / "others"))
        python = stand_in(place / "environment/python", BUILDER.format(source=source, python=sys.executable))
        (place / "environment/ninja").symlink_to(ninja)
        environment = {
            "PATH": system,
            "CUDA_HOME": str(place / "cuda"),
            "TORCH_CUDA_ARCH_LIST": "9.0",
            "AS_CUDA": AS_CUDA,
            **dict.fromkeys(("CC", "CXX", "LDSHARED"), str(cxx)),
        }
        if way == "as it is":
            environment |= {"PATH": f"{python.parent}:{system}"}
            environment |= dict.fromkeys(("MAMBA_FORCE_BUILD", "CAUSAL_CONV1D_FORCE_BUILD"), "TRUE")
            command = [python, "-m", "pip wheel"]
        else:
            environment |= {"BUILD_PYTHON": str(python), "SOURCES": str(folder)}
            command = [CLUSTER / "images" / "build_kernels.sh", place / "wheels", "9.0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert list(source.rglob("build.ninja")), "not one file after the other"
        found[way] = set(re.findall(r"code=sm_(\d+)", (place / "calls").read_text()))
    assert len(found["as it is"]) == 9, "TORCH_CUDA_ARCH_LIST is still not heard"
    assert found["by build_kernels.sh"] == {"90"}


def test_the_script_is_named_where_a_reader_looks():
    assert "cluster/kernels_here.sh" in (ROOT / "BENCHMARKS.md").read_text()
    assert "kernels_here.sh" in (CLUSTER / "images" / "README.md").read_text()
