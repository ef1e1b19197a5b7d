"""How much uploaded archives may take: of a team, and of the disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncIterator

import httpx
import pytest

from emberbox.control import uploads
from tests.integration.control.test_builds import archive, files_left, link, register, start
from tests.support.control import World, serving_world

DAY = 24 * 3600
NOISE = archive(content=hashlib.shake_256(b"").digest(700 * 1024))
"""Two of them fit into 2 MiB."""


def name(number: int) -> str:
    return f"{number:064x}"


async def put(world: World, number: int, data: bytes = NOISE) -> httpx.Response:
    return await world.client.put((await link(world, "mine", name(number)))["url"], content=data)


def age(world: World, number: int, seconds: float) -> None:
    (path,) = (world.settings.api_dir / "files").rglob(f"{name(number)}.tar.gz")
    os.utime(path, (time.time() - seconds, time.time() - seconds))


def numbers_left(world: World) -> list[int]:
    return [int(file.removesuffix(".tar.gz"), 16) for file in files_left(world)]


async def copy(world: World, number: int) -> None:
    """Have a build wait that needs an archive."""
    steps = [{"type": "COPY", "args": [".", "/app"], "filesHash": name(number)}]
    answer = await start(world, await register(world), fromImage="debian", steps=steps)
    assert answer.status_code == 202, answer.text


async def test_what_would_be_too_much_for_a_team_is_refused() -> None:
    async with serving_world(uploads_mb_per_team=2) as world:
        await register(world)

        answers = [await put(world, number) for number in range(3)]

        assert [answer.status_code for answer in answers] == [200, 200, 507]
        assert "EMBERBOX_UPLOADS_MB_PER_TEAM" in answers[2].json()["message"]
        assert numbers_left(world) == [0, 1]


async def test_what_comes_at_the_same_time_counts() -> None:
    async with serving_world(uploads_mb_per_team=2) as world:
        await register(world)

        answers = await asyncio.gather(*(put(world, number) for number in range(8)))

        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [507] * 6
        assert len(numbers_left(world)) == 2


async def test_an_upload_that_breaks_off_gives_its_room_back() -> None:
    async with serving_world(uploads_mb_per_team=1) as world:
        await register(world)

        broken = await put(world, 0, NOISE[:-8])
        whole = await put(world, 1)

        assert (broken.status_code, whole.status_code) == (400, 200)
        assert numbers_left(world) == [1]


async def test_the_number_of_archives_is_bounded_too() -> None:
    async with serving_world(uploads_mb_per_team=1) as world:
        await register(world)

        answers = [await put(world, number, archive()) for number in range(17)]

        assert [answer.status_code for answer in answers] == [200] * 16 + [507]


async def test_the_archive_that_was_used_longest_ago_makes_room() -> None:
    async with serving_world(uploads_mb_per_team=3, builds_at_once=1) as world:
        world.node.build_hold = asyncio.Event()
        await register(world)
        for number in range(4):
            await put(world, number)
        await copy(world, 0)
        await world.control.builds.tend()
        for number, hours in enumerate((5, 2, 4, 3)):
            age(world, number, hours * 3600)

        answer = await put(world, 4)
        world.node.build_hold.set()

        assert answer.status_code == 200
        assert numbers_left(world) == [0, 1, 3, 4]  # 0 is older than 2, and a build needs it


async def test_an_archive_that_a_client_was_told_of_waits_for_its_build() -> None:
    async with serving_world(uploads_mb_per_team=2) as world:
        await register(world)
        for number in range(2):
            await put(world, number)
            age(world, number, (3 - number) * 3600)
        await world.control.builds.tend()
        assert (await link(world, "mine", name(0)))["present"]

        answer = await put(world, 2)

        assert answer.status_code == 200
        assert numbers_left(world) == [0, 2]
        await copy(world, 0)


async def test_an_archive_that_is_only_asked_for_goes_in_the_end(world: World) -> None:
    await register(world)
    for number in range(2):
        await put(world, number)
        age(world, number, world.settings.uploads_keep_seconds + 2 * 3600)
    await copy(world, 1)

    asked = await link(world, "mine", name(0))
    await world.control.builds.tend()

    assert asked["present"]
    assert numbers_left(world) == [1]


async def test_a_refused_upload_takes_nobodys_place() -> None:
    async with serving_world(uploads_mb_per_team=2) as world:
        await register(world)
        for number in range(2):
            await put(world, number)
        age(world, 0, DAY)
        await world.control.builds.tend()

        answer = await put(world, 2, NOISE * 2)

        assert answer.status_code == 507
        assert numbers_left(world) == [0, 1]


async def test_an_upload_leaves_some_of_the_disk_free(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(world)
    monkeypatch.setattr(uploads, "RESERVE_BYTES", 1 << 60)

    answer = await put(world, 0)

    assert answer.status_code == 507
    assert "the server's disk has" in answer.json()["message"]
    assert files_left(world) == []


async def test_an_upload_ends_within_the_time_of_a_link(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    await register(world)
    url = (await link(world, "mine", name(0)))["url"]
    monkeypatch.setattr(uploads, "LINK_SECONDS", 0.5)

    async def slowly() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    answer = await world.client.put(url, content=slowly(), headers={"Content-Length": "1000000"})

    assert answer.status_code == 400
    assert "took longer" in answer.json()["message"]
    assert files_left(world) == []
