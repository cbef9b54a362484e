#!/usr/bin/env bash
# Builds wheels of mamba-ssm and causal-conv1d, once, for the GPUs named, against the torch that is pinned: PyPI has
# their sources only. Needs nvcc of the CUDA that torch is built for, and minutes; run it where the image is built.
# Usage: build_kernels.sh FOLDER [ARCHS, such as 8.6,8.9: A10G and L4, L40S]
set -euo pipefail

folder=${1:?usage: build_kernels.sh FOLDER [ARCHS]}
export HELIX_CUDA_ARCHS=${2:-8.6,8.9}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=${BUILD_PREFIX:-/opt/build}
"${PYTHON:-python3}" -m venv "$build"
"$build/bin/python" -m pip install --no-cache-dir -c "$root/constraints.txt" torch numpy ninja packaging setuptools wheel
# FORCE_BUILD: no wheel that was built for another torch. KEEP_CUDA_BUILD: with Mamba-1's kernel.
# no-build-isolation: against this torch. PYTORCH_NVCC: their lists of architectures are fixed; nvcc.sh cuts them.
export MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
export PYTORCH_NVCC="$here/nvcc.sh" MAX_JOBS=${MAX_JOBS:-4}
"$build/bin/python" -m pip wheel --no-cache-dir --no-build-isolation --no-deps -c "$root/constraints.txt" \
    -w "$folder" causal-conv1d mamba-ssm
