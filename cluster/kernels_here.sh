#!/usr/bin/env bash
# On a machine with a GPU and nvcc: builds mamba-ssm and causal-conv1d for that GPU alone, against the torch of the
# checkout's environment, installs them there, and ends with what `helix doctor` finds. Run again, it builds again.
# Usage: cluster/kernels_here.sh [FOLDER FOR THE WHEELS] [ARCHS, such as 9.0; else those of the GPUs that torch sees]
# PYTHON: the environment's, else .venv's. MAX_JOBS: compilers at once, 2 GiB each. SOURCES: as in build_kernels.sh.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
wheels=${1:-$root/build/kernels}
refuse() { echo "kernels_here.sh: $1" >&2 && exit 2; }

case $python in
/*) ;;
*/*) python=$PWD/$python ;; # it is called from another folder, too
esac
[ -x "$(command -v "$python")" ] || refuse "$python is not there; \`make .venv/.ready\` makes it, PYTHON names another"
cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")') || refuse "$python cannot import torch"
[ -n "$cuda" ] || refuse "the torch of $python is built for CPUs; install one for CUDA: pip install -c constraints.txt torch"
if [ -z "${CUDA_HOME:-}" ]; then
    nvcc=$(command -v nvcc) || nvcc=/usr/local/cuda/bin/nvcc
    CUDA_HOME=$(dirname "$(dirname "$nvcc")")
fi
export CUDA_HOME
[ -x "$CUDA_HOME/bin/nvcc" ] || refuse "no nvcc on PATH nor in $CUDA_HOME/bin; install the CUDA toolkit $cuda and set \
CUDA_HOME (without these kernels helix scans by Triton, which wants a C compiler and Python.h only; see helix doctor)"
found=$("$CUDA_HOME/bin/nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
[ "${found%%.*}" = "${cuda%%.*}" ] || refuse "nvcc is of CUDA $found and torch of $cuda; set CUDA_HOME to a $cuda"
archs=${2:-$("$python" -c 'import torch
print(",".join(sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))')}
[ -n "$archs" ] || refuse "torch sees no GPU here; name what to build for, as in: kernels_here.sh $wheels 9.0"

[ -x "$(command -v "${CXX:-g++}")" ] ||
    refuse "no ${CXX:-g++}, which nvcc compiles with; install it (build-essential on Debian), or name another by CXX"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || refuse "no Python.h in $headers; install the headers of that Python (python3-dev on Debian)"

echo "building for sm_${archs//./} with CUDA $found into $wheels"
mkdir -p "$wheels"
wheels=$(cd "$wheels" && pwd)
# Apart from those that an earlier version left there.
built=$(mktemp -d "$wheels/building.XXXXXX")
trap 'rm -rf "$built"' EXIT
BUILD_PYTHON=$python MAX_JOBS=${MAX_JOBS:-$(nproc)} "$root/cluster/images/build_kernels.sh" "$built" "$archs"
made=()
for wheel in "$built"/causal_conv1d-*.whl "$built"/mamba_ssm-*.whl; do
    mv -f "$wheel" "$wheels"
    made+=("$wheels/${wheel##*/}")
done
"$python" -m pip install --force-reinstall --no-deps -c "$root/constraints.txt" "${made[@]}"
# What they import beside torch.
[ -n "${SOURCES:-}" ] ||
    "$python" -m pip install -c "$root/constraints.txt" --find-links "$wheels" causal-conv1d mamba-ssm
cd "$root"
"$python" -c 'import torch
from helix.models.scan import scan_backend
print("scan:", scan_backend(torch.device("cuda"), torch.float32, backend="mamba_ssm"), "can be used")'
"$python" -m helix.doctor
