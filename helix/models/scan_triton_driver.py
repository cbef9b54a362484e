"""What Triton's kernels need of a machine besides a GPU: a library that Triton compiles in C, once, at its first use.

Kernels themselves are compiled by Triton, with an assembler that it brings: nvcc is not needed. What loads and launches
them is a file of C that becomes a module of this Python, kept in Triton's cache (~/.triton, or TRITON_CACHE_DIR).
"""

import errno
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import triton
from triton import knobs
from triton.runtime import driver

from helix.models.scan_error import UnusableScanError
from helix.out_of_memory import is_out_of_memory

#: Of what the system refuses this is a trait of the machine: Triton's cache cannot be written to. A disk that is full,
#: too many open files or a share that is away are none.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR)

INSTALL = (
    "install a C compiler and the headers of this Python, once (apt-get install gcc libc6-dev python3-dev on Debian "
    "and Ubuntu; CC names another compiler)"
)
OTHERWISE = (
    "mamba-ssm and causal-conv1d, where they are installed, scan without (cluster/kernels_here.sh builds them, with "
    "nvcc); HELIX_SCAN=reference does, slowly and in more memory"
)


def require_driver() -> None:
    """Have Triton's library made, or loaded where an earlier process made it. It takes a second, and no CUDA context.

    Nothing is needed under TRITON_INTERPRET=1. Raises UnusableScanError where it cannot be made.
    """
    if knobs.runtime.interpret:
        return
    try:
        _ = driver.active.utils  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError, ImportError, OSError, subprocess.CalledProcessError) as error:
        if _passes(error):
            raise
        missing = what_is_missing()
        found = f"{missing or 'what launches its kernels cannot be made'} (triton {triton.__version__} said: {error!r})"
        raise UnusableScanError("triton", found, f"{_advice(error, missing)}; {OTHERWISE}") from error


def _passes(error: Exception) -> bool:
    """Whether another attempt may find it otherwise, so that it is judged by who knows what to do about it."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode < 0  # the compiler was killed
    if isinstance(error, OSError):
        return error.errno not in CLOSED
    return is_out_of_memory(error)


def what_is_missing() -> str:
    """Which of the two that a compilation by Triton needs is not here, in words; nothing where both are."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC is {named!r}, which is no program here"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler: CC is not set, and neither gcc nor clang is on PATH"
    # As Triton asks for them: Debian's own scheme names a folder that holds none.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_path("include", scheme)
    return "" if Path(headers, "Python.h").is_file() else f"no Python.h in {headers}"


def _advice(error: Exception, missing: str) -> str:
    if missing:
        return INSTALL
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return "set TRITON_CACHE_DIR to a folder that can be written to"
    if isinstance(error, subprocess.CalledProcessError):
        return f"see above what the compiler said; where it lacks something, {INSTALL}"
    return "see what Triton said, and that NVIDIA's driver is installed (nvidia-smi, ldconfig -p | grep libcuda)"
