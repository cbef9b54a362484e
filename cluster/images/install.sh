#!/usr/bin/env bash
# Puts what every node needs onto a machine or into an image: the pinned dependencies in /opt/ray, and of this project
# what runs beside Ray in /opt/helix. The package itself comes with each job. Run as root from a checkout.
# Usage: install.sh cpu|gpu [FOLDER OF WHEELS, from build_kernels.sh; for gpu]
set -euo pipefail

kind=${1:?usage: install.sh cpu|gpu [WHEELS]}
wheels=${2:-}
root=$(cd "$(dirname "$0")/../.." && pwd)
ray=${RAY_PREFIX:-/opt/ray}
helix=${HELIX_PREFIX:-/opt/helix}
case $kind in
cpu) extras=() ;;
gpu) extras=(gpu) ;;
*) echo "install.sh: unknown kind '$kind'; known: cpu, gpu" >&2 && exit 2 ;;
esac
if [ "$kind" = gpu ] && [ -z "$wheels" ]; then
    echo "install.sh: gpu needs the folder of wheels that build_kernels.sh made" >&2 && exit 2
fi

# Stopped halfway and run again, it goes on: an environment that is there is kept.
[ -x "$ray/bin/python" ] || "${PYTHON:-python3}" -m venv "$ray"
mkdir -p "$helix/cluster"
"$ray/bin/python" "$root/cluster/images/requirements.py" ${extras[@]+"${extras[@]}"} >"$helix/requirements.txt"
"$ray/bin/python" -m pip install --no-cache-dir -c "$root/constraints.txt" ${wheels:+--find-links "$wheels"} \
    -r "$helix/requirements.txt"
install -m 755 "$root"/cluster/{notice_daemon.py,fetch_secret.py,local_nvme.sh} "$helix/cluster/"
install -m 644 "$root/cluster/README.md" "$root/constraints.txt" "$helix/cluster/"
