"""What this machine lends: cores, memory, CUDA devices, their driver and the compiler for them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from helix.doctor import Asked, Check
from helix.registry import CHECKS

CGROUP = Path("/sys/fs/cgroup")

#: Below this a worker of a sweep (Ray, torch, a small model) is killed sooner or later.
LEAST_MEMORY_GIB = 3.0

#: More than any machine has: how a cgroup of version 1 says that there is no limit.
NO_LIMIT_BYTES = 2**60

#: How long a command that only prints its version may take.
PATIENCE_S = 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device. `capability` as in (9, 0)."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """What torch, the driver and the compiler say. `built` is the CUDA version that torch was built with."""

    built: str | None
    architectures: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    driver: str | None
    nvcc: str | None


@CHECKS.register("machine")
def machine(_: Asked) -> Iterable[Check]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield judge_cores(os.cpu_count() or 1, affinity, cpu_quota(CGROUP))
    yield judge_memory(psutil.virtual_memory().total / 2**30, psutil.virtual_memory().available / 2**30, CGROUP)
    yield from judge_cuda(look_at_cuda())


def cpu_quota(cgroup: Path) -> float | None:
    """The cores whose time a cgroup (version 2 or 1) lets this process use, or None where it sets no limit."""
    quota, period = "", "100000"
    if text := _read(cgroup / "cpu.max"):
        quota, period = text.split()
    elif text := _read(cgroup / "cpu" / "cpu.cfs_quota_us"):
        quota, period = text, _read(cgroup / "cpu" / "cpu.cfs_period_us") or period
    return int(quota) / int(period) if quota.isdigit() else None


def memory_limit_gib(cgroup: Path) -> float | None:
    """The memory that a cgroup lets this process use, or None where it sets no limit."""
    text = _read(cgroup / "memory.max") or _read(cgroup / "memory" / "memory.limit_in_bytes") or ""
    return int(text) / 2**30 if text.isdigit() and int(text) < NO_LIMIT_BYTES else None


def judge_cores(cores: int, affinity: int, quota: float | None) -> Check:
    found = f"{affinity} of {cores} cores"
    if quota is not None and quota < affinity:
        advice = (
            f"more than {max(1, int(quota))} threads would only be throttled: keep --workers x --threads below that"
        )
        return Check(name="CPU", status="warn", found=f"{found}, a cgroup allows {quota:g} cores' time", advice=advice)
    return Check(name="CPU", status="ok", found=found)


def judge_memory(total_gib: float, available_gib: float, cgroup: Path) -> Check:
    limit_gib = memory_limit_gib(cgroup)
    usable_gib = min(available_gib, limit_gib or available_gib)
    found = f"{available_gib:.1f} of {total_gib:.1f} GiB free"
    if limit_gib is not None and limit_gib < total_gib:
        found += f", a cgroup allows {limit_gib:.1f} GiB"
    if usable_gib < LEAST_MEMORY_GIB:
        advice = f"a sweep needs about {LEAST_MEMORY_GIB:g} GiB: end other programs, or use --workers 1"
        return Check(name="memory", status="warn", found=found, advice=advice)
    return Check(name="memory", status="ok", found=found)


def look_at_cuda() -> Cuda:
    """Whatever can be seen without computing anything."""
    gpus = []
    architectures: tuple[str, ...] = ()
    if torch.cuda.is_available():
        architectures = tuple(torch.cuda.get_arch_list())
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            gpus.append(Gpu(name=seen.name, capability=(seen.major, seen.minor), memory_gib=seen.total_memory / 2**30))
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    compiled = re.search(r"release ([\d.]+)", _output("nvcc", "--version") or "")
    return Cuda(
        built=torch.version.cuda,
        architectures=architectures,
        gpus=tuple(gpus),
        driver=driver.splitlines()[0] if driver else None,
        nvcc=compiled.group(1) if compiled else None,
    )


def judge_cuda(cuda: Cuda) -> Iterable[Check]:
    """Devices, driver and compiler. A machine without any of them is an ordinary CPU machine."""
    if cuda.built is None:
        if cuda.driver:
            advice = "this torch is built for CPUs: install one for CUDA from PyPI or PyTorch's index to use the GPU"
            yield Check(name="CUDA", status="warn", found=f"driver {cuda.driver}, torch without CUDA", advice=advice)
        else:
            yield Check(
                name="CUDA", status="absent", found="torch is built for CPUs", advice="nothing, to train on CPUs"
            )
        return
    if not cuda.gpus:
        found = f"torch for CUDA {cuda.built} finds no device; driver {cuda.driver or 'not found'}"
        advice = (
            f"install or update the NVIDIA driver (one that supports CUDA {cuda.built}), check CUDA_VISIBLE_DEVICES, "
            "and in a container ask for GPUs (--gpus all); nothing, to train on CPUs"
        )
        yield Check(name="CUDA", status="warn" if cuda.driver else "absent", found=found, advice=advice)
        return
    for index, gpu in enumerate(cuda.gpus):
        yield _judge_gpu(index, gpu, cuda)
    yield _judge_nvcc(cuda)


def _judge_gpu(index: int, gpu: Gpu, cuda: Cuda) -> Check:
    wanted = f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    found = f"{gpu.name}, {wanted}, {gpu.memory_gib:.0f} GiB, driver {cuda.driver}, torch for CUDA {cuda.built}"
    if runs_on(gpu.capability, cuda.architectures):
        return Check(name=f"cuda:{index}", status="ok", found=found)
    advice = (
        f"this torch holds no code for {wanted} (only {', '.join(cuda.architectures)}): kernels fail with 'no kernel "
        "image is available'; install a torch that is built with a newer CUDA, then build mamba-ssm and causal-conv1d"
    )
    return Check(name=f"cuda:{index}", status="fail", found=found, advice=advice)


def runs_on(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether code for these architectures runs: binaries (sm_) on later minors of one major, PTX (compute_) on any."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        number = re.match(r"\d+", digits)
        if number is None:
            continue
        major, minor = divmod(int(number.group()), 10)
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False


def _judge_nvcc(cuda: Cuda) -> Check:
    if cuda.nvcc is None:
        advice = (
            f"only to build mamba-ssm and causal-conv1d: install the CUDA toolkit {cuda.built}, set CUDA_HOME to "
            "its folder and put its bin/ on PATH"
        )
        return Check(name="nvcc", status="absent", found="not found on PATH", advice=advice)
    if cuda.nvcc.split(".")[0] != str(cuda.built).split(".")[0]:
        advice = f"extensions must be built with torch's own CUDA: put nvcc of CUDA {cuda.built} first on PATH"
        found = f"{cuda.nvcc}, torch is built with {cuda.built}"
        return Check(name="nvcc", status="warn", found=found, advice=advice)
    return Check(name="nvcc", status="ok", found=cuda.nvcc)


def _output(*command: str) -> str | None:
    """What a program prints, or None where there is none or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
