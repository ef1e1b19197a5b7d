#!/bin/sh
# Finishes the base template's root file system. Runs on the building host; $1 is the root.
set -eu
root=$1

# The user that sandboxes run commands as.
chroot "$root" useradd --uid 1000 --user-group --create-home --shell /bin/bash user
printf 'user ALL=(ALL:ALL) NOPASSWD: ALL\n' > "$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
chroot "$root" install -d -o user -g user -m 0755 /code

# Debian refuses `pip install` outside a virtual environment. A sandbox is thrown away, and its users expect pip to work.
rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED

# Every command of the SDKs runs in a login shell. Debian's asks `id` who it is, which takes longer than all the rest.
sed -i 's/"$(id -u)"/"${EUID:-$(id -u)}"/' "$root/etc/profile"

# Services that a package starts at its installation have nothing to run under.
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
chmod 0755 "$root/usr/sbin/policy-rc.d"

# The runtime puts the real ones over these at every start.
printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
: > "$root/etc/resolv.conf"
printf 'sandbox\n' > "$root/etc/hostname"
: > "$root/etc/machine-id"

# What differs from one build to the next.
rm -f "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/var/cache/ldconfig/aux-cache
rm -f "$root"/etc/passwd- "$root"/etc/group- "$root"/etc/shadow- "$root"/etc/gshadow- "$root"/etc/subuid- "$root"/etc/subgid-
