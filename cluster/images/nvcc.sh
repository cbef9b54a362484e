#!/usr/bin/env bash
# nvcc for the architectures of HELIX_CUDA_ARCHS alone (8.6,8.9): the setup.py of mamba-ssm and of causal-conv1d name
# nine, whatever TORCH_CUDA_ARCH_LIST says. Those that are named there and not here are left out; one that is named here
# and not there is added, since code for its GPU is what is asked for.
set -euo pipefail

: "${HELIX_CUDA_ARCHS:?HELIX_CUDA_ARCHS is not set; wanted architectures such as 8.6,8.9}"
kept=()
compiles=
while [ $# -gt 0 ]; do
    case $1 in
    -gencode) compiles=yes && shift 2 ;;
    -gencode=*) compiles=yes && shift ;;
    *) kept+=("$1") && shift ;;
    esac
done
if [ -n "$compiles" ]; then
    IFS=, read -ra archs <<<"$HELIX_CUDA_ARCHS"
    for arch in "${archs[@]}"; do
        if [[ ! $arch =~ ^[0-9]+\.[0-9]$ ]]; then
            echo "nvcc.sh: HELIX_CUDA_ARCHS holds '$arch'; wanted architectures such as 8.6,8.9" >&2 && exit 2
        fi
        kept+=(-gencode "arch=compute_${arch/./},code=sm_${arch/./}")
    done
fi
exec "${NVCC:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}" ${kept[@]+"${kept[@]}"}
