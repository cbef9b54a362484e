"""Whether packages with compiled code can be imported here, tried in a process that may crash; and why if not."""

import subprocess
import sys
from collections.abc import Iterable
from importlib import util

import torch

from helix.doctor import Asked, Check
from helix.registry import CHECKS

#: How long one import may take; mamba_ssm imports transformers and triton.
PATIENCE_S = 120

#: How both CUDA packages are built for the torch and the GPU that are here, and what each setting is for.
BUILD = (
    "MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=4 pip install "
    "--no-build-isolation --no-cache-dir -c constraints.txt causal-conv1d mamba-ssm"
)
BUILD_WHY = (
    "(FORCE_BUILD compiles instead of fetching a wheel that was built for another torch, KEEP_CUDA_BUILD keeps the "
    "Mamba-1 kernel, --no-build-isolation builds against this torch, --no-cache-dir forgets older builds; needs nvcc; "
    "cluster/kernels_here.sh of a checkout does all of it, and for the GPU that is here alone, a ninth of the work)"
)
REINSTALL_TORCHAUDIO = (
    "helix does not use torchaudio: pip uninstall torchaudio; whoever needs it installs the build that belongs to this "
    "torch, from the same index (PyPI's is built for CUDA and does not load beside a CPU torch)"
)

#: The packages, and what an import failure of each is cured by when the error says nothing more particular.
EXTENSIONS = {
    "mamba_ssm": f"build it again: {BUILD}",
    "selective_scan_cuda": f"mamba-ssm was installed without its CUDA kernel; build it again: {BUILD} {BUILD_WHY}",
    "causal_conv1d": f"build it again: {BUILD}",
    "triton": "pip install -c constraints.txt --force-reinstall triton",
    "torchaudio": REINSTALL_TORCHAUDIO,
}

#: What an error holds, and what that means.
MEANINGS = (
    (("undefined symbol",), "it was built for another torch than {torch}"),
    (("glibcxx", "cxxabi", "glibc_"), "it was built with a newer compiler than this machine's C++ library belongs to"),
    (
        ("libcudart", "libcublas", "libc10_cuda", "libtorch_cuda", "libnvrtc"),
        "it was built for a CUDA that is not here",
    ),
    (("no kernel image",), "it holds no code for this GPU: its list of architectures ends before it"),
    (("no module named 'triton'",), "triton is missing, which only a torch for CUDA brings"),
    (
        ("no module named 'selective_scan_cuda'",),
        "it was installed without its CUDA kernel (MAMBA_SKIP_CUDA_BUILD, a CPU)",
    ),
)


@CHECKS.register("extensions")
def extensions(_: Asked) -> Iterable[Check]:
    for package in EXTENSIONS:
        yield judge(package, import_error(package), cuda=torch.version.cuda is not None)


def import_error(package: str) -> str | None:
    """None where `import package` works, '' where it is not installed, else the last line of what it says."""
    if util.find_spec(package) is None:
        return ""
    command = [sys.executable, "-P", "-c", f"import {package}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the import did not end within {PATIENCE_S} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the import ended the process with code {done.returncode}"


def judge(package: str, error: str | None, *, cuda: bool) -> Check:
    """`error` as from `import_error`; `cuda`: whether torch is built for it, without which none of these is missed."""
    name = f"import {package}"
    if error is None:
        return Check(name=name, status="ok", found="can be imported")
    if error:
        return Check(name=name, status="fail", found=error, advice=explain(package, error))
    if package in ("mamba_ssm", "selective_scan_cuda", "causal_conv1d") and cuda:
        return Check(name=name, status="absent", found="not installed", advice=f"{BUILD} {BUILD_WHY}")
    if package == "triton" and cuda:
        return Check(name=name, status="absent", found="not installed", advice=f"{EXTENSIONS[package]}: it is the scan")
    return Check(name=name, status="absent", found="not installed", advice="nothing: it would not be used here")


def explain(package: str, error: str) -> str:
    """What an import error means, and what to do about it."""
    said = error.lower()
    cure = EXTENSIONS[package]
    for words, meaning in MEANINGS:
        if any(word in said for word in words):
            why = f" {BUILD_WHY}" if BUILD in cure and BUILD_WHY not in cure else ""
            return f"{meaning.format(torch=torch.__version__)}; {cure}{why}"
    return cure
