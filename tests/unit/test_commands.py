"""Running external commands."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from emberbox.commands import CommandFailed, CommandTimedOut, run


async def test_output_and_input_pass_whole() -> None:
    done = await run(["cat"], timeout=60, input=bytes(range(256)))

    assert (done.returncode, done.stdout) == (0, bytes(range(256)))


async def test_a_failure_tells_the_command_its_code_and_its_words() -> None:
    with pytest.raises(CommandFailed, match="sh ended with exit code 3: it broke") as caught:
        await run(["sh", "-c", "echo it broke >&2; exit 3"], timeout=60)

    assert caught.value.returncode == 3


async def test_a_missing_command_is_said_so() -> None:
    with pytest.raises(CommandFailed, match="no-such-command could not be started"):
        await run(["no-such-command"], timeout=60)


async def test_a_missing_command_that_dies_with_us_is_said_so_too() -> None:
    with pytest.raises(CommandFailed, match="no-such-command could not be started"):
        await run(["no-such-command"], timeout=60, dies_with_us=True)


async def test_a_command_that_dies_with_us_ends_when_we_are_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = (
        "import asyncio, sys; from emberbox.commands import run;"
        f"asyncio.run(run(['sh', '-c', 'echo $$ > {pid_file}; exec sleep 60'], timeout=60, dies_with_us=True))"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", script)
    async with asyncio.timeout(60):
        while not pid_file.exists() or not pid_file.read_text():
            await asyncio.sleep(0.02)

    parent.kill()
    await parent.wait()

    assert await ended(int(pid_file.read_text()))


async def test_a_command_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    with pytest.raises(CommandTimedOut, match="longer than"):
        await run(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], timeout=3)

    assert await ended(int(pid_file.read_text()))


async def test_a_cancelled_caller_leaves_no_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    task = asyncio.create_task(run(["sh", "-c", f"echo $$ > {pid_file}; sleep 60"], timeout=60))
    async with asyncio.timeout(60):
        while not (pid_file.exists() and pid_file.read_text()):
            await asyncio.sleep(0.01)

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert await ended(int(pid_file.read_text()))


async def ended(pid: int) -> bool:
    async with asyncio.timeout(60):
        while True:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            if state == "Z" and os.getppid() != pid:  # an orphan that its new parent has yet to reap
                return True
            await asyncio.sleep(0.01)
