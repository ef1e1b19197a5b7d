"""Starting, restarting and stopping roles; the roles here are small shell scripts."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from emberbox.cli.roles import Role
from emberbox.cli.state import RoleProcess
from emberbox.cli.supervisor import RoleFailed, Supervisor, rotate, tail

SERVE = """
trap 'rm -f {dir}/{name}.up; echo stopped {name} >> {dir}/order; exit 0' TERM
touch {dir}/{name}.up
while :; do sleep 0.05; done
"""


def a_role(directory: Path, name: str, script: str = SERVE) -> Role:
    up = directory / f"{name}.up"
    return Role(
        name=name,
        argv=["bash", "-c", script.format(dir=directory, name=name)],
        environment=dict(os.environ),
        log=directory / f"{name}.log",
        ready=up.exists,
    )


class Seen:
    """The last processes that the supervisor told of."""

    def __init__(self) -> None:
        self.processes: list[RoleProcess] = []

    def __call__(self, processes: list[RoleProcess]) -> None:
        self.processes = processes

    def named(self, name: str) -> RoleProcess | None:
        return next((one for one in self.processes if one.name == name), None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.02)


async def start(supervisor: Supervisor, *, deadline: float = 120) -> None:
    supervisor.begin()
    await supervisor.ready(deadline=deadline)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
async def pair(tmp_path: Path, seen: Seen) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor([a_role(tmp_path, "first"), a_role(tmp_path, "second")], changed=seen)
    await start(supervisor)
    yield supervisor
    await supervisor.stop()


async def test_a_killed_role_comes_back_and_is_counted(pair: Supervisor, seen: Seen) -> None:
    before = seen.named("first")
    assert before is not None

    os.kill(before.process.pid, signal.SIGKILL)
    await until(lambda: (now := seen.named("first")) is not None and now.process != before.process)

    after = seen.named("first")
    assert after is not None
    assert after.restarts == 1
    assert seen.named("second") is not None


async def test_roles_stop_in_the_reverse_order_of_their_start(pair: Supervisor, seen: Seen, tmp_path: Path) -> None:
    await pair.stop()

    assert (tmp_path / "order").read_text().splitlines() == ["stopped second", "stopped first"]
    assert seen.processes == []


async def test_a_role_that_ends_again_and_again_fails_the_start_with_its_last_words(tmp_path: Path, seen: Seen) -> None:
    roles = [a_role(tmp_path, "good"), a_role(tmp_path, "bad", "echo no database >&2; exit 3")]

    with pytest.raises(RoleFailed, match=r"(?s)bad does not start \(exit code 3\).*no database") as failure:
        await start(Supervisor(roles, changed=seen))

    assert str(roles[1].log) in failure.value.message
    assert seen.processes == []
    assert not (tmp_path / "good.up").exists()


async def test_a_role_that_never_answers_fails_the_start(tmp_path: Path, seen: Seen) -> None:
    mute = a_role(tmp_path, "mute", "exec sleep 60")

    with pytest.raises(RoleFailed, match="mute did not answer"):
        await start(Supervisor([mute], changed=seen), deadline=0.3)

    assert seen.processes == []


async def test_a_program_that_does_not_exist_fails_the_start(tmp_path: Path, seen: Seen) -> None:
    role = Role("lost", [str(tmp_path / "nothing")], {}, tmp_path / "lost.log", lambda: False)

    with pytest.raises(RoleFailed, match="lost cannot be started"):
        await start(Supervisor([role], changed=seen))


async def test_a_role_that_ignores_sigterm_is_killed(tmp_path: Path, seen: Seen) -> None:
    stubborn = a_role(tmp_path, "stubborn", "trap '' TERM; touch {dir}/{name}.up; while :; do sleep 0.05; done")
    supervisor = Supervisor([stubborn], changed=seen, stop_grace=0.2)
    await start(supervisor)
    process = seen.processes[0].process

    await supervisor.stop()

    assert not process.alive


def test_a_large_log_is_moved_aside_and_emptied(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    log.write_bytes(b"x" * 100)

    rotate(log, limit=99)

    assert log.stat().st_size == 0
    assert (tmp_path / "api.log.1").read_bytes() == b"x" * 100


def test_a_small_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "api.log"
    log.write_bytes(b"x")

    rotate(log, limit=99)

    assert log.read_bytes() == b"x"


def test_the_end_of_a_log_that_does_not_exist(tmp_path: Path) -> None:
    assert "is empty" in tail(tmp_path / "none.log")
