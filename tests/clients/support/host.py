"""The host that an Emberbox of the tests runs on, this one or the lab, and the Emberbox's processes there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.clients.support.instance import ROOT, Emberbox
from tests.clients.support.timing import seconds
from tests.lab.host import Lab
from tests.lab.lab import API_PORT, in_emberbox, start_emberbox

_LAB_DATA_DIR = "/var/lib/emberbox"
_LAB_ROOT = "/opt/emberbox"
_PLAIN = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"}
"""What makes a command line print for programs."""


@dataclass(frozen=True)
class Host:
    """Where commands are run as root."""

    emberbox: Emberbox
    api_port: int
    """The port on which the API listens there."""
    data_dir: str
    lab: Lab | None = None

    @property
    def tree(self) -> str:
        """The folder of this project there."""
        return str(ROOT) if self.lab is None else _LAB_ROOT

    def run(self, command: str, *, timeout: float = 60) -> str:
        """Run a shell command and return what it printed; fails the test when the command fails."""
        done = self._run(command, timeout=timeout)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def command(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `emberbox` for this Emberbox."""
        if self.lab is None:
            return self.emberbox.command(*arguments, "--data", self.data_dir, timeout=seconds(timeout))
        return self._run(in_emberbox("emberbox", *arguments, settings=_PLAIN), timeout=timeout)

    def command_in_terminal(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of `emberbox` for this Emberbox, to be started in a terminal."""
        environment = {**os.environ, **self.emberbox.settings, "TERM": "xterm", "COLUMNS": "120"}
        if self.lab is None:
            return [sys.executable, "-m", "emberbox", *arguments, "--data", self.data_dir], environment
        shown = {"TERM": "xterm", "COLUMNS": "120"}
        return self.lab.argv(in_emberbox("emberbox", *arguments, settings=shown), terminal=True), environment

    def module(self, module: str, *arguments: str) -> str:
        """Run a Python module of this project and return what it printed."""
        words = (module, *arguments)
        here = f"cd {ROOT} && {shlex.join([sys.executable, '-m', *words])}"
        return self.run(here if self.lab is None else in_emberbox(*words))

    def restart(self, settings: Mapping[str, str]) -> None:
        """End the lab's Emberbox with all its sandboxes, and start it with these settings beside the lab's own."""
        assert self.lab is not None
        self.run(in_emberbox("emberbox", "down"), timeout=200)
        start_emberbox(self.lab, settings)

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        self.run(f"kill -{number.value} {pid}")

    def pids(self) -> dict[str, int]:
        """The process of each role, by name."""
        status: dict[str, Any] = json.loads(self.command("status", "--json").stdout)
        return {each["name"]: each["pid"] for each in status["processes"]}

    def proxies(self) -> list[int]:
        """Pids of the edge's HAProxy."""
        found = self.run(f"pgrep -f '^[^ ]*[h]aproxy .*{self.data_dir}/' || true")
        return [int(pid) for pid in found.split()]

    def _run(self, command: str, *, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        if self.lab is None:
            done = subprocess.run(command, shell=True, capture_output=True, timeout=seconds(timeout), check=False)
        else:
            done = self.lab.shell(command, capture=True, timeout=seconds(timeout))
        out, err = (each.decode("utf-8", "replace") for each in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def host_of(emberbox: Emberbox) -> Host | str:
    """The host, or why there is none to run commands on."""
    port = urlsplit(emberbox.api_url).port or 0
    if emberbox.data_dir is not None:
        return Host(emberbox, port, emberbox.data_dir) if os.geteuid() == 0 else "needs root"
    lab = Lab()
    boot = lab.running()
    if boot is not None and boot.ports.get(str(API_PORT)) == port:
        return Host(emberbox, API_PORT, _LAB_DATA_DIR, lab)
    return "needs an Emberbox on this host that the tests started, or the lab's; this one was given by E2B_API_URL"
