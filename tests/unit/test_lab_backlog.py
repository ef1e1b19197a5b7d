"""Connections that wait at another process's port."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.lab.backlog import raise_backlog

LISTEN = """
import socket, sys
one = socket.socket()
one.bind(("127.0.0.1", 0))
one.listen(0)
print(one.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def listening() -> Iterator[tuple[int, int]]:
    """Pid and port of a process at whose port one connection may wait."""
    process = subprocess.Popen([sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    yield process.pid, int(process.stdout.readline())
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


def waiting(port: int, most: int) -> int:
    """How many of `most` connections are taken while nobody accepts them."""
    taken = 0
    with contextlib.ExitStack() as stack:
        for _ in range(most):
            one = stack.enter_context(socket.socket())
            one.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                one.connect(("127.0.0.1", port))
                taken += 1
    return taken


def test_more_connections_wait(listening: tuple[int, int]) -> None:
    pid, port = listening
    before = waiting(port, 4)

    raise_backlog(pid, [port], waiting=16)

    assert before < 4
    assert waiting(port, 8) == 8


def test_a_port_at_which_it_does_not_listen_is_named(listening: tuple[int, int]) -> None:
    with pytest.raises(LookupError, match=r"does not listen at \[1\]"):
        raise_backlog(listening[0], [1])


def test_a_process_that_has_ended_is_an_error() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    with pytest.raises(OSError, match=os.strerror(3)):
        raise_backlog(process.pid, [1])
