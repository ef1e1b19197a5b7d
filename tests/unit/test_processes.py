"""Processes that outlive their parent are told apart from strangers with the same pid."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator

import pytest

from emberbox.linux import processes
from emberbox.linux.processes import ProcessId


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(["sleep", "60"])
    yield running
    running.kill()
    running.wait()


def test_a_living_process_is_known_by_pid_and_start(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)

    assert identity is not None
    assert processes.is_alive(identity)
    assert not processes.is_alive(ProcessId(child.pid, identity.started + 1))


def test_a_stranger_with_the_same_pid_is_not_killed(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)
    assert identity is not None

    ended = processes.end_and_wait(ProcessId(child.pid, identity.started - 1), seconds=60)

    assert ended
    assert processes.is_alive(identity)


def test_ending_waits_until_the_process_is_gone(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)
    assert identity is not None

    assert processes.end_and_wait(identity, seconds=60)

    assert not processes.is_alive(identity)
    assert processes.end_and_wait(identity, seconds=60)


async def test_the_end_of_a_process_is_noticed(child: subprocess.Popen[bytes]) -> None:
    identity = processes.identify(child.pid)
    assert identity is not None
    waiting = asyncio.create_task(processes.wait_for_end(identity))
    await asyncio.sleep(0)

    child.kill()

    async with asyncio.timeout(60):
        await waiting


async def test_waiting_for_what_is_gone_returns_at_once() -> None:
    async with asyncio.timeout(60):
        await processes.wait_for_end(ProcessId(os.getpid(), 0))


def test_there_is_no_identity_without_a_process() -> None:
    assert processes.identify(2**22 + 1) is None
