#!/usr/bin/env bash
# On a virtual machine, after install.sh: the services beside Ray, for the user that Ray runs as, and `ray` on the PATH.
# They are started by cluster/aws.yaml, not here. Run as root from a checkout. Usage: install_services.sh USER
set -euo pipefail

user=${1:?usage: install_services.sh USER}
root=$(cd "$(dirname "$0")/../.." && pwd)
etc=${ETC:-/etc}
install -d "$etc/helix" "$etc/systemd/system" "$etc/profile.d"
for unit in helix-notice.service helix-schedule.service helix-schedule.timer; do
    install -m 644 "$root/cluster/$unit" "$etc/systemd/system/"
done
# systemd takes HOME from the user, and so Ray its token from there.
for service in helix-notice helix-schedule; do
    install -d "$etc/systemd/system/$service.service.d"
    printf '[Service]\nUser=%s\n' "$user" >"$etc/systemd/system/$service.service.d/user.conf"
done
printf 'PATH=/opt/ray/bin:/usr/bin:/bin\nRAY_AUTH_MODE=token\n' >"$etc/helix/notice.env"
# shellcheck disable=SC2016  # the shell that logs in expands it
echo 'PATH=/opt/ray/bin:$PATH' >"$etc/profile.d/ray.sh"
