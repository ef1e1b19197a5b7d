"""A pytest plugin for runs in the lab: a limit of time, and a lab that dies by itself.

The lab's kernel runs on an emulated processor and has died under load where none of Emberbox's code runs (ADR 22). So
a test that fails is asked about: when the lab is dead, it and the tests after it are skipped with that reason, and the
run does not fail. A failure in a lab that lives is a failure.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.lab.host import Lab

ALIVE = "date > /var/lib/emberbox/.alive && sync /var/lib/emberbox/.alive && ! dmesg | grep -q 'blocked for more than'"
ALIVE_SECONDS = 120.0
HANGS_AFTER_SECONDS = 420
"""For one test, where all have a limit: they are short ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lab-seconds", type=float, default=None, help="tests that begin later than this after the start are skipped"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Limits(config.getoption("--lab-seconds")), "lab limits")


class Limits:
    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._until = None if seconds is None else time.monotonic() + seconds
        self._dead = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self._seconds is not None:
            for item in items:
                item.add_marker(pytest.mark.timeout(HANGS_AFTER_SECONDS), append=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self._dead:
            pytest.skip(f"the lab died before: {self._dead}")
        if self._until is not None and time.monotonic() > self._until:
            pytest.skip(f"the lab's {self._seconds:.0f} s are over; `make test-lab` runs everything")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        outcome = yield
        report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
        if not report.failed:
            return
        self._dead = self._dead or why_dead()
        if self._dead:
            path, line, _ = item.location
            report.outcome = "skipped"
            report.longrepr = (path, (line or 0) + 1, f"Skipped: the lab died under it: {self._dead}")


def why_dead() -> str:
    """The reason why the lab does not work any more; empty when it does."""
    lab = Lab()
    console = lab.console().strip().splitlines()
    last = console[-1] if console else "its console is empty"
    if lab.running() is None:
        return f"QEMU has ended; {last}"
    try:
        done = lab.shell(ALIVE, capture=True, timeout=ALIVE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it does not answer within {ALIVE_SECONDS:g} s; {last}"
    return "" if done.returncode == 0 else f"its disk or kernel hangs; {last}"
