"""Fixtures of the lab's tests: a lab that runs already, its Emberbox, and commands in it.

Start one with `make lab` first; without it every test here is skipped and says so. Nothing is started by the tests
themselves, because a boot takes longer than a test may.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2b import Sandbox

from tests.lab.host import Lab

SCALE = 15.0
NAMES = ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    running = Lab().running() is not None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.lab)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))
            if not running:
                item.add_marker(pytest.mark.skip(reason="no lab is running; start it with 'make lab'"))


@pytest.fixture(scope="session")
def in_lab() -> Callable[[str], str]:
    """Runs a command as root in the lab and returns what it printed; fails the test when the command fails."""
    lab = Lab()

    def run(command: str) -> str:
        done = lab.shell(command, capture=True, timeout=300)
        output = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, f"{command}: {output}{done.stderr.decode('utf-8', 'replace')}"
        return output

    return run


@pytest.fixture(scope="session", autouse=True)
def client_environment() -> Iterator[None]:
    """Points the official client at the lab's Emberbox."""
    lab_py = Path(__file__).parent / "lab.py"
    command = [sys.executable, str(lab_py), "env"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if printed.returncode != 0:
        pytest.skip(f"no Emberbox runs in the lab: {printed.stderr.strip()}")
    words = (line.removeprefix("export ").partition("=") for line in printed.stdout.splitlines())
    values = {name: value.strip("'\"") for name, _, value in words if name in NAMES}
    before = {name: os.environ.get(name) for name in NAMES}
    os.environ.update(values)
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def new_sandbox() -> Iterator[Callable[[], Sandbox]]:
    """Makes sandboxes that end with the test."""
    made: list[Sandbox] = []

    def make() -> Sandbox:
        sandbox = Sandbox.create(timeout=1800, request_timeout=30 * SCALE)
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.kill(request_timeout=30 * SCALE)
