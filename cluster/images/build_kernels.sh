#!/usr/bin/env bash
# Builds wheels of mamba-ssm and causal-conv1d, once, for the GPUs named, against the torch that is pinned: PyPI has
# their sources only. Needs nvcc of the CUDA that torch is built for, and minutes; run it where the image is built.
# Usage: build_kernels.sh FOLDER [ARCHS, such as 8.6,8.9: A10G and L4, L40S]
# BUILD_PYTHON: an environment whose torch to build against, instead of one made for it. SOURCES: a folder with the
# sources as pip downloads them, where there is no network; the build's own needs are then there already.
set -euo pipefail

folder=${1:?usage: build_kernels.sh FOLDER [ARCHS]}
export HELIX_CUDA_ARCHS=${2:-8.6,8.9}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
nvcc=${NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
if [ ! -x "$nvcc" ]; then
    echo "build_kernels.sh: $nvcc is not there; install the CUDA toolkit of torch's version and set CUDA_HOME to it" >&2
    exit 2
fi
python=${BUILD_PYTHON:-}
if [ -z "$python" ]; then
    build=${BUILD_PREFIX:-/opt/build}
    "${PYTHON:-python3}" -m venv "$build"
    python=$build/bin/python
    "$python" -m pip install --no-cache-dir -c "$root/constraints.txt" torch numpy ninja packaging setuptools wheel
elif [ -z "${SOURCES:-}" ]; then
    "$python" -m pip install --no-cache-dir -c "$root/constraints.txt" ninja packaging setuptools wheel
fi
# torch looks for ninja on PATH alone, and pip leaves it beside python. Without it torch compiles one file at a time, and
# by nvcc itself: for all nine architectures, whatever PYTORCH_NVCC and MAX_JOBS say.
found=$(command -v "$python") || { echo "build_kernels.sh: $python is not there; BUILD_PYTHON names it" >&2 && exit 2; }
PATH=$(cd "$(dirname "$found")" && pwd):$PATH
export PATH
if ! ninja --version >/dev/null 2>&1; then
    echo "build_kernels.sh: no ninja that runs beside $found nor on PATH, and torch compiles for chosen GPUs by ninja" \
        "alone; install it there: $python -m pip install -c constraints.txt ninja" >&2
    exit 2
fi
# FORCE_BUILD: no wheel that was built for another torch. KEEP_CUDA_BUILD: with Mamba-1's kernel.
# no-build-isolation: against this torch. PYTORCH_NVCC: their lists of architectures are fixed; nvcc.sh cuts them.
export MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
export PYTORCH_NVCC="$here/nvcc.sh" MAX_JOBS=${MAX_JOBS:-4}
"$python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps -c "$root/constraints.txt" \
    ${SOURCES:+--no-index --find-links "$SOURCES"} -w "$folder" causal-conv1d mamba-ssm
