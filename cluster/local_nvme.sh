#!/usr/bin/env bash
# Makes one file system of the NVMe disks that come with this EC2 instance and gives it to a user; run again, it changes
# nothing. Their contents end with the instance: it is for caches. Usage: local_nvme.sh FOLDER USER
set -euo pipefail

folder=${1:?usage: local_nvme.sh FOLDER USER}
user=${2:?usage: local_nvme.sh FOLDER USER}
devices=${DEVICES:-/dev/disk/by-id}
mkdir -p "$folder"
if mountpoint -q "$folder"; then
    exit 0
fi
# A name for each disk; the same disk has another one, with a namespace (_1), on newer kernels.
mapfile -t disks < <(find "$devices" -name 'nvme-Amazon_EC2_NVMe_Instance_Storage_*' ! -name '*-part*' \
    -exec readlink -f {} + 2>/dev/null | sort -u)
if [ "${#disks[@]}" = 0 ]; then
    echo "local_nvme: this instance has no disk of its own; $folder stays on the root volume" >&2
elif [ "${#disks[@]}" = 1 ]; then
    mkfs.ext4 -q -F -m 0 "${disks[0]}"
    mount -o noatime "${disks[0]}" "$folder"
else
    mdadm --create /dev/md0 --run --force --level=0 --raid-devices="${#disks[@]}" "${disks[@]}"
    mkfs.ext4 -q -F -m 0 /dev/md0
    mount -o noatime /dev/md0 "$folder"
fi
chown "$user" "$folder"
