"""What an image lacks to be a template: the user `user`, sudo, bash, certificates, and the host's network settings.

It is done inside the machine, by the image's own package manager, as a hidden first step. Bash is a must; everything
else is had where it can be.
"""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from pathlib import Path

from emberbox.images.host_network import HostNetwork
from emberbox.node.building.journal import Journal
from emberbox.node.building.machine import BuildMachine, Finished, OutputLine
from emberbox.node.building.model import StepFailed

_FOLDER = "/var/tmp/.emberbox-provision"
_SECONDS = 1200.0

_SCRIPT = r"""
set -u
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH DEBIAN_FRONTEND=noninteractive
folder=$1
bundle=/etc/ssl/certs/ca-certificates.crt
has() { command -v "$1" >/dev/null 2>&1; }

# Temporary folders that a minimal image may lack.
for place in /tmp /var/tmp; do [ -d $place ] || mkdir -p -m 1777 $place; done

# The host's settings come first: the package manager may need them.
if [ -d "$folder/files" ]; then
  (cd "$folder/files" && find . -type f) | while read -r name; do
    mkdir -p "$(dirname "/$name")" && cat "$folder/files/$name" >"/$name" && chmod 644 "/$name"
  done
fi
trust() {
  [ -f "$folder/host.crt" ] || return 0
  if has update-ca-certificates; then
    mkdir -p /usr/local/share/ca-certificates
    cat "$folder/host.crt" >/usr/local/share/ca-certificates/emberbox-host.crt
    update-ca-certificates >/dev/null 2>&1
  elif has update-ca-trust; then
    mkdir -p /etc/pki/ca-trust/source/anchors
    cat "$folder/host.crt" >/etc/pki/ca-trust/source/anchors/emberbox-host.crt
    update-ca-trust >/dev/null 2>&1
  fi
  if [ ! -e $bundle ]; then
    mkdir -p /etc/ssl/certs
    { cat /etc/pki/tls/certs/ca-bundle.crt 2>/dev/null; cat "$folder/host.crt"; } >$bundle
  fi
}
trust

missing=
want() { has "$1" || missing="$missing $2"; }
if has apt-get; then
  want bash bash; want sudo sudo; want update-ca-certificates ca-certificates; want tar tar; want gzip gzip
  want curl curl; want ss iproute2; want pgrep procps
  if [ -n "$missing" ]; then
    echo "installing$missing"
    options="-q -y -o Acquire::Retries=3 -o Acquire::Languages=none -o Dpkg::Use-Pty=0"
    apt-get $options update >"$folder/log" 2>&1 &&
      apt-get $options install --no-install-recommends $missing >>"$folder/log" 2>&1 ||
      { echo "apt-get could not install$missing:" >&2; tail -n 5 "$folder/log" >&2; }
    apt-get clean; rm -rf /var/lib/apt/lists/*
  fi
elif has apk; then
  want bash bash; want sudo sudo; want update-ca-certificates ca-certificates; want curl curl; want ss iproute2
  want useradd shadow; want pgrep procps
  if [ -n "$missing" ]; then
    echo "installing$missing"
    apk add --no-cache $missing >"$folder/log" 2>&1 ||
      { echo "apk could not install$missing:" >&2; tail -n 5 "$folder/log" >&2; }
  fi
elif has dnf || has microdnf || has yum; then
  manager=dnf; has dnf || manager=microdnf; has $manager || manager=yum
  want bash bash; want sudo sudo; want tar tar; want gzip gzip; want curl curl; want useradd shadow-utils
  want ss iproute; want pgrep procps-ng
  if [ -n "$missing" ]; then
    echo "installing$missing"
    $manager -y install $missing >"$folder/log" 2>&1 ||
      { echo "$manager could not install$missing:" >&2; tail -n 5 "$folder/log" >&2; }
    $manager clean all >/dev/null 2>&1
  fi
elif has pacman; then
  want bash bash; want sudo sudo; want tar tar; want curl curl; want ss iproute2; want pgrep procps-ng
  if [ -n "$missing" ]; then
    echo "installing$missing"
    pacman -Sy --noconfirm $missing >"$folder/log" 2>&1 ||
      { echo "pacman could not install$missing:" >&2; tail -n 5 "$folder/log" >&2; }
  fi
fi
trust

if [ ! -x /bin/bash ]; then
  other=$(command -v bash 2>/dev/null || true)
  if [ -n "$other" ]; then ln -sf "$other" /bin/bash; else
    echo "the image has no bash, and it could not be installed; use an image that has it, or one based on Debian," \
      "Ubuntu or Alpine whose package servers can be reached" >&2
    exit 1
  fi
fi

[ -e /etc/passwd ] || : >/etc/passwd
[ -e /etc/group ] || : >/etc/group
grep -q '^root:' /etc/passwd || echo 'root:x:0:0:root:/root:/bin/bash' >>/etc/passwd
grep -q '^root:' /etc/group || echo 'root:x:0:' >>/etc/group
mkdir -p /root
if ! grep -q '^user:' /etc/passwd; then
  # 1000, or the next that nobody has: some images have a user of their own there.
  id=1000
  while grep -q "^[^:]*:[^:]*:$id:" /etc/passwd || grep -q "^[^:]*:[^:]*:$id:" /etc/group; do id=$((id + 1)); done
  grep -q '^user:' /etc/group || echo "user:x:$id:" >>/etc/group
  group=$(grep '^user:' /etc/group | cut -d: -f3)
  echo "user:x:$id:$group::/home/user:/bin/bash" >>/etc/passwd
  [ ! -e /etc/shadow ] || grep -q '^user:' /etc/shadow || echo 'user:*:19500:0:99999:7:::' >>/etc/shadow
fi
if [ ! -d /home/user ]; then
  mkdir -p /home/user
  [ ! -d /etc/skel ] || cp -a /etc/skel/. /home/user/
fi
chown -R "$(grep '^user:' /etc/passwd | cut -d: -f3,4)" /home/user
if has sudo; then
  mkdir -p /etc/sudoers.d
  echo 'user ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/user
  chmod 440 /etc/sudoers.d/user
else
  echo "the image has no sudo, and it could not be installed; 'user' cannot become root by it" >&2
fi
"""


def fingerprint(host: HostNetwork, path: str) -> str:
    """Changes with anything that would be done otherwise."""
    return hashlib.sha256(f"{_SCRIPT}\n{host.fingerprint()}\n{path}".encode()).hexdigest()


async def provision(machine: BuildMachine, host: HostNetwork, path: str, work_dir: Path, journal: Journal) -> None:
    """Make the machine's files those of a template.

    Args:
        path: the image's PATH, kept for login shells; empty: nothing to keep.

    Raises:
        StepFailed: the image has no shell, or no bash that could be had.
    """
    files = {f"{_FOLDER}/provision.sh": _SCRIPT}
    if host.certificates:
        files[f"{_FOLDER}/host.crt"] = "\n".join(pem.strip() for pem in host.certificates) + "\n"
    for name, text in host.files.items():
        files[f"{_FOLDER}/files/{name}"] = text
    if host.env:
        lines = "".join(f"{name}={value}\n" for name, value in sorted(host.env.items()))
        files[f"{_FOLDER}/files/etc/environment"] = lines
    if path:
        script = f"# The PATH of the image.\nexport PATH={shlex.quote(path)}\n"
        files[f"{_FOLDER}/files/etc/profile.d/00-image-path.sh"] = script
    for name, text in files.items():
        await _write(machine, name, text, work_dir)
    said: list[str] = []
    argv = ("/bin/sh", f"{_FOLDER}/provision.sh", _FOLDER)
    try:
        async for event in machine.execute(argv, user="root", env=host.env, seconds=_SECONDS):
            if isinstance(event, OutputLine):
                said.append(event.text)
                journal.log(event.text, "warn" if event.error else "info")
            elif isinstance(event, Finished) and event.exit_code != 0:
                raise StepFailed("\n".join(said[-3:]) or f"preparing the image ended with exit code {event.exit_code}")
    except StepFailed as error:
        if "/bin/sh" in str(error):
            raise StepFailed(f"the image has no shell (/bin/sh), which a template needs: {error}") from error
        raise
    await machine.do('rm -rf -- "$1"', _FOLDER)


async def _write(machine: BuildMachine, name: str, text: str, work_dir: Path) -> None:
    data = text.encode()
    with tempfile.TemporaryFile(dir=work_dir) as file:
        file.write(data)
        file.flush()
        await machine.upload(file.fileno(), len(data), name)
