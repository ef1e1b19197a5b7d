"""Changes are in memory before anybody looks: a child maps a file, opens another, and tells what it finds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from emberbox.linux.opengate import OpenGate
from emberbox.runtime.firecracker import changes

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(changes.why_not_held(Path(__file__).parent)),
    reason="needs root and a kernel that can hold who opens a file (CONFIG_FANOTIFY_ACCESS_PERMISSIONS)",
)

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 64
DEADLINE = 30

CHILD = f"""
import mmap, sys
memory, upper, maps, opens = sys.argv[1:]
with open(memory, "r+b") as handle:
    half = {PAGES // 2 * PAGE}
    if maps == "whole":
        parts = [mmap.mmap(handle.fileno(), 0, flags=mmap.MAP_PRIVATE)]
    elif maps == "halves":
        between = mmap.mmap(-1, 1 << 20)
        parts = [mmap.mmap(handle.fileno(), half, flags=mmap.MAP_PRIVATE, offset=at) for at in (0, half)]
    else:
        parts = []
print("ready", flush=True)
sys.stdin.readline()
if opens == "opens":
    try:
        open(upper).close()
    except PermissionError:
        print("refused", flush=True)
        sys.exit()
print("".join(chr(part[at]) for part in parts for at in range(0, len(part), {PAGE})), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "memory.0"
    path.write_bytes(b"." * PAGES * PAGE)
    return path


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    path = tmp_path / "upper"
    path.touch()
    return path


def piece(path: Path, content: dict[int, str]) -> Path:
    with path.open("wb") as out:
        out.truncate(PAGES * PAGE)
        for page, value in content.items():
            out.seek(page * PAGE)
            out.write(value.encode() * PAGE)
    return path


class Child:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self.said: list[str] = []
        self._process = process

    async def line(self) -> str:
        assert self._process.stdout
        async with asyncio.timeout(DEADLINE):
            self.said.append((await self._process.stdout.readline()).decode().strip())
        return self.said[-1]

    async def go_on(self) -> None:
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def child(base: Path, upper: Path, *, maps: str = "whole", opens: str = "opens") -> AsyncIterator[Child]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, str(base), str(upper), maps, opens, stdin=pipe, stdout=pipe
    )
    try:
        loading = Child(process)
        assert await loading.line() == "ready"
        yield loading
    finally:
        with contextlib.suppress(ProcessLookupError):  # one that is refused ends
            process.kill()
        await process.wait()


async def load(loading: Child, base: Path, upper: Path, change: Path) -> str:
    async with changes.written(upper, loading.pid, base, [change]):
        await loading.go_on()
        return await loading.line()


@pytest.mark.parametrize("maps", ["whole", "halves"])
async def test_what_is_opened_after_the_mapping_finds_the_changes_in_it(
    base: Path, upper: Path, tmp_path: Path, maps: str
) -> None:
    older = piece(tmp_path / "memory.1", dict.fromkeys(range(28, 40), "a") | {63: "a"})
    newer = piece(tmp_path / "memory.2", {0: "b", 30: "b", 33: "b"})
    async with child(base, upper, maps=maps) as loading:
        async with changes.written(upper, loading.pid, base, [older, newer]):
            await loading.go_on()
            found = await loading.line()

        assert found == "b" + "." * 27 + "aabaabaaaaaa" + "." * 23 + "a"
    assert base.read_bytes() == b"." * PAGES * PAGE


async def test_more_places_than_one_call_takes_are_all_written(tmp_path: Path, upper: Path) -> None:
    base = tmp_path / "memory.0"
    base.write_bytes(b"." * 4096 * PAGE)
    with (tmp_path / "memory.1").open("wb") as out:
        out.truncate(4096 * PAGE)
        for page in range(0, 4096, 3):
            out.seek(page * PAGE)
            out.write(b"x" * PAGE)
    async with child(base, upper) as loading, changes.written(upper, loading.pid, base, [tmp_path / "memory.1"]):
        await loading.go_on()
        assert await loading.line() == "x.." * 1365 + "x"


async def test_others_are_not_held(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper) as loading, changes.written(upper, loading.pid, base, [change]):
        async with asyncio.timeout(DEADLINE):
            await asyncio.to_thread(upper.read_bytes)
        await loading.go_on()
        assert (await loading.line())[5] == "a"


async def test_one_that_never_opens_its_disk_is_not_taken_for_loaded(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper, opens="not") as loading:
        with pytest.raises(changes.NotWritten, match="without opening its disk"):
            await load(loading, base, upper, change)


async def test_one_that_has_not_mapped_its_memory_does_not_get_its_disk(
    base: Path, upper: Path, tmp_path: Path
) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper, maps="nothing") as loading:
        with pytest.raises(changes.NotWritten, match="has not mapped"):
            await load(loading, base, upper, change)
        assert loading.said == ["ready", "refused"]


async def test_a_block_that_fails_for_it_says_why(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper, maps="nothing") as loading:
        with pytest.raises(changes.NotWritten, match="has not mapped"):
            await refused(loading, base, upper, change)


async def refused(loading: Child, base: Path, upper: Path, change: Path) -> None:
    async with changes.written(upper, loading.pid, base, [change]):
        await loading.go_on()
        raise ValueError(await loading.line())


async def test_memory_of_which_only_a_part_is_mapped_is_refused(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper) as loading:
        with base.open("ab") as longer:
            longer.write(b"." * PAGE)
        with pytest.raises(changes.NotWritten, match="not all of it"):
            await load(loading, base, upper, change)


async def test_a_block_that_is_cancelled_stays_cancelled(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper, maps="nothing") as loading:
        loads = asyncio.create_task(hangs(loading, base, upper, change))
        async with asyncio.timeout(DEADLINE):
            while "refused" not in loading.said:
                await asyncio.sleep(0.01)
        loads.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loads


async def hangs(loading: Child, base: Path, upper: Path, change: Path) -> None:
    async with changes.written(upper, loading.pid, base, [change]):
        await loading.go_on()
        await loading.line()
        await asyncio.Event().wait()


async def test_no_descriptor_is_left(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper) as loading:
        before = set(os.listdir("/proc/self/fd"))
        await load(loading, base, upper, change)
        assert set(os.listdir("/proc/self/fd")) == before


async def test_memory_that_is_gone_is_an_error_with_how_much_was_written(
    base: Path, upper: Path, tmp_path: Path
) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper) as loading:
        with pytest.raises(OSError, match="0 of 4096 bytes"):
            changes.write(loading.pid, [(4096, 4096 + PAGES * PAGE, 0)], change)


async def test_a_block_that_fails_leaves_nobody_waiting(base: Path, upper: Path, tmp_path: Path) -> None:
    change = piece(tmp_path / "memory.1", {5: "a"})
    async with child(base, upper) as loading:
        with pytest.raises(ValueError, match="load failed"):
            async with changes.written(upper, loading.pid, base, [change]):
                raise ValueError("load failed")
        await loading.go_on()
        assert await loading.line() == "." * PAGES


def test_a_file_that_is_missing_has_no_gate(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        OpenGate(tmp_path / "none")
    assert len(os.listdir("/proc/self/fd")) == len(before)
