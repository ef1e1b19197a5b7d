"""The host that an Emberbox of the tests runs on, this one or the lab, and the Emberbox's processes there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

from tests.clients.support.instance import Emberbox
from tests.clients.support.timing import seconds
from tests.lab.host import Lab
from tests.lab.lab import API_PORT, IN_EMBERBOX

_LAB_DATA_DIR = "/var/lib/emberbox"


@dataclass(frozen=True)
class Host:
    """Where commands are run as root."""

    emberbox: Emberbox
    api_port: int
    """The port on which the API listens there."""
    data_dir: str
    lab: Lab | None = None

    def run(self, command: str) -> str:
        """Run a shell command and return what it printed; fails the test when the command fails."""
        if self.lab is not None:
            done = self.lab.shell(command, capture=True, timeout=seconds(60))
        else:
            done = subprocess.run(command, shell=True, capture_output=True, timeout=seconds(60), check=False)
        words = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, f"{command}: {words}{done.stderr.decode('utf-8', 'replace')}"
        return words

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        self.run(f"kill -{number.value} {pid}")

    def pids(self) -> dict[str, int]:
        """The process of each role, by name."""
        status: dict[str, Any] = (
            self.emberbox.status()
            if self.lab is None
            else json.loads(self.run(f"{IN_EMBERBOX} emberbox status --json"))
        )
        return {each["name"]: each["pid"] for each in status["processes"]}

    def proxies(self) -> list[int]:
        """Pids of the edge's HAProxy."""
        found = self.run(f"pgrep -f '^[^ ]*[h]aproxy .*{self.data_dir}/' || true")
        return [int(pid) for pid in found.split()]


def host_of(emberbox: Emberbox) -> Host | str:
    """The host, or why there is none to run commands on."""
    port = int(emberbox.api_url.rsplit(":", 1)[1])
    if emberbox.data_dir is not None:
        return Host(emberbox, port, emberbox.data_dir) if os.geteuid() == 0 else "needs root"
    lab = Lab()
    boot = lab.running()
    if boot is not None and boot.ports.get(str(API_PORT)) == port:
        return Host(emberbox, API_PORT, _LAB_DATA_DIR, lab)
    return "needs an Emberbox on this host that the tests started, or the lab's; this one was given by E2B_API_URL"
