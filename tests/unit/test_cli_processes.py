"""Processes known by pid and start time."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from emberbox.cli.processes import ProcessRef


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_a_running_process_is_alive(sleeper: subprocess.Popen[bytes]) -> None:
    assert ProcessRef.of(sleeper.pid).alive


def test_another_process_with_the_same_pid_is_not_taken_for_ours(sleeper: subprocess.Popen[bytes]) -> None:
    earlier = dataclasses.replace(ProcessRef.of(sleeper.pid), started=1)

    assert not earlier.alive
    assert not earlier.signal(signal.SIGKILL)
    assert sleeper.poll() is None


def test_a_process_of_an_earlier_boot_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    assert not dataclasses.replace(ProcessRef.of(sleeper.pid), boot="another").alive


def test_a_zombie_is_not_alive(sleeper: subprocess.Popen[bytes]) -> None:
    ref = ProcessRef.of(sleeper.pid)

    os.kill(sleeper.pid, signal.SIGKILL)

    assert ref.wait(60)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1; done"
    process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    ref = ProcessRef.of(process.pid)

    ref.stop(grace=0.2)

    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()


def test_a_pid_that_nobody_has_cannot_be_referred_to() -> None:
    with pytest.raises(ProcessLookupError):
        ProcessRef.of(2**22 + 1)
