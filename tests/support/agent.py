"""A machine for the agent's tests: emberd as PID 1 in namespaces of its own.

The root is an overlay of the host's root with a throw-away upper, so that whatever the agent writes
(host name, trust store, users' files) stays inside. The network is a namespace joined by one veth pair.
It is the container runtime's shape with nothing of the node around it. Needs root.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.networks import AGENTS, Claim

AGENT = Path(__file__).parents[2] / "agent"
PORT = 49983
# Mounting is slow while others on the host mount and unmount: the agent itself is up in milliseconds.
START_PATIENCE = 180
CONTROL = "control-secret-of-the-tests"


_START = r"""
set -e
mount -t tmpfs tmpfs "$DIR"
mkdir "$DIR/upper" "$DIR/work" "$DIR/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$DIR/upper,workdir=$DIR/work" "$DIR/root"
R="$DIR/root"
mount -t proc proc "$R/proc"
mount -t tmpfs -o mode=755 tmpfs "$R/dev"
for n in null zero full random urandom tty; do
  : > "$R/dev/$n"
  mount --bind "/dev/$n" "$R/dev/$n"
done
mkdir "$R/dev/pts" "$R/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$R/dev/pts"
ln -s pts/ptmx "$R/dev/ptmx"
ln -s /proc/self/fd "$R/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$R/tmp"
mount -t tmpfs -o mode=755 tmpfs "$R/run"
cat > "$R/etc/passwd" <<END
root:x:0:0:root:/root:/bin/bash
user:x:1000:1000::/home/user:/bin/bash
other:x:1001:1001::/home/other:/bin/bash
END
cat > "$R/etc/group" <<END
root:x:0:
staff:x:50:user
user:x:1000:
other:x:1001:
END
rm -rf "$R/home/user" "$R/home/other" "$R/root"/.[bp]* "$R/etc/profile.d"
mkdir -p "$R/home/user" "$R/home/other"
chown 1000:1000 "$R/home/user"
chown 1001:1001 "$R/home/other"
chmod 700 "$R/home/other"
chmod 700 "$R/root"
cp "$BINARY" "$R/emberd"
hostname before
ip link set lo up
# No right to set the clock (it is the host's), to trace, or to load modules: as in a container.
exec setpriv --bounding-set=-sys_time,-sys_ptrace,-sys_module,-sys_boot,-syslog,-sys_rawio,-sys_resource \
  chroot "$R" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  GORACE=halt_on_error=1 EMBERD_CONTROL_HASH="$HASH" /emberd
"""


def build() -> Path:
    """Build emberd when its sources are newer, and return it.

    `EMBERD` names another one, such as one with race detection, which then ends at the first race.
    """
    if chosen := os.environ.get("EMBERD"):
        return Path(chosen)
    binary = AGENT / "build" / "emberd"
    newest = max(p.stat().st_mtime for p in AGENT.rglob("*.go"))
    if not binary.exists() or binary.stat().st_mtime < newest:
        part = binary.with_suffix(f".{os.getpid()}")
        subprocess.run([AGENT / "build.sh", part], check=True)
        part.replace(binary)
    return binary


_CLAIMS: list[Claim] = []
"""Never given back, nor let go: clients keep connections by address, and one to an earlier machine would be used for
its successor."""


class AgentMachine:
    """One machine; use it as a context manager. `url` is the agent's address seen from the host."""

    def __init__(self, *, log_reader_leaves: bool = False) -> None:

        tag = secrets.token_hex(3)
        self.netns = f"agt{tag}"
        self._veth = f"agt{tag}h"
        claim = Claim(AGENTS)
        _CLAIMS.append(claim)
        self._host_ip, self.ip = (str(address) for address in claim.network)
        self.url = f"http://{self.ip}:{PORT}"
        self._dir = Path(tempfile.mkdtemp(prefix="agent-machine-"))
        self._log = self._dir.parent / f"{self._dir.name}.log"
        self._log_reader_leaves = log_reader_leaves
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> AgentMachine:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
        subprocess.run(["ip", "link", "del", self._veth], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True, check=False)
        shutil.rmtree(self._dir, ignore_errors=True)
        self._log.unlink(missing_ok=True)

    def _start(self) -> None:
        ip = lambda *a: subprocess.run(["ip", *a], check=True, capture_output=True)  # noqa: E731
        ip("netns", "add", self.netns)
        ip("link", "add", self._veth, "type", "veth", "peer", "name", "eth0", "netns", self.netns)
        ip("addr", "add", f"{self._host_ip}/31", "dev", self._veth)
        ip("link", "set", self._veth, "up")
        ip("-n", self.netns, "addr", "add", f"{self.ip}/31", "dev", "eth0")
        ip("-n", self.netns, "link", "set", "eth0", "up")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self.netns),
                    *("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
                    *("--propagation", "private", "sh", "-c", _START),
                ],
                env={
                    **os.environ,
                    "DIR": str(self._dir),
                    "BINARY": str(build()),
                    "HASH": hashlib.sha256(CONTROL.encode()).hexdigest(),
                },
                stdout=subprocess.PIPE if self._log_reader_leaves else log,
                stderr=log,
            )
        if self._process.stdout is not None:
            self._process.stdout.close()
        deadline = time.monotonic() + START_PATIENCE
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1).close()
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                return
        raise RuntimeError(f"the agent did not start:\n{self.log()}")

    def log(self) -> str:
        """What the agent printed so far."""
        return self._log.read_text(errors="replace")

    def control(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Call a control route with the node's secret."""
        return self.call(method, path, body, {"X-Ember-Control": CONTROL})

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return the status and body of one plain request."""
        request = urllib.request.Request(f"{self.url}{path}", data=body, method=method, headers=headers or {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    @property
    def init_pid(self) -> int:
        """The host's pid of emberd (the machine's PID 1)."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        return int(children[0])
