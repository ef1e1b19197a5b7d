"""The templates that ship with Emberbox: read from their folders, built on first use, or when asked."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from emberbox.control.errors import Invalid
from emberbox.control.shipped_folder import load_shipped, pack
from emberbox.wire import node_pb2 as pb
from tests.support.control import World, eventually, serving_world

TOML = """
[template]
from = "base"
description = "says hello"
cpu_count = 1
memory_mb = 512
start_command = "python3 /opt/hello/main.py"
ready_command = "true"

[[step]]
type = "COPY"
args = ["server", "/opt/hello", "root"]

[[step]]
type = "RUN"
args = ["chmod +x /opt/hello/main.py", "root"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "hello"
    (place / "server").mkdir(parents=True)
    (place / "template.toml").write_text(TOML)
    (place / "server" / "main.py").write_text("print('hello')\n")
    (place / "server" / "run").write_text("#!/bin/sh\n")
    (place / "server" / "run").chmod(0o700)
    return tmp_path


@pytest.fixture
async def world(folder: Path) -> AsyncIterator[World]:
    async with serving_world(templates_dir=folder, first_build_wait_seconds=60) as made:
        yield made


def test_a_folder_is_read_with_a_hash_of_what_it_copies(folder: Path) -> None:
    first = load_shipped(folder, "hello")
    (folder / "hello" / "server" / "main.py").write_text("print('goodbye')\n")
    second = load_shipped(folder, "hello")

    assert (first.cpu_count, first.memory_mb, first.plan.from_template) == (1, 512, "base")
    assert [step.type for step in first.plan.steps] == ["COPY", "RUN"]
    assert first.plan.files != second.plan.files


def test_files_are_packed_alike_whoever_does_it(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.tar.gz", tmp_path / "two.tar.gz"

    pack(folder / "hello", "server", one)
    (folder / "hello" / "server" / "main.py").touch()
    (folder / "hello" / "server" / "main.py").chmod(0o600)
    pack(folder / "hello", "server", two)

    assert one.read_bytes() == two.read_bytes()
    with tarfile.open(one) as tar:
        members = {member.name: member for member in tar}
    assert set(members) == {"server", "server/main.py", "server/run"}
    assert (members["server/main.py"].mode, members["server/run"].mode) == (0o644, 0o755)
    assert (members["server/run"].uid, members["server/run"].mtime) == (0, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[template", "not valid TOML"),
        ("[template]\nfro = 'base'", "fro"),
        ("[template]\n[[step]]\ntype = 'FLY'\nargs = []", "step.0.type"),
        ("[template]\n[[step]]\ntype = 'COPY'\nargs = ['nothing', '/x']", "names nothing"),
        ("[template]\n[[step]]\ntype = 'COPY'\nargs = ['../hello', '/x']", "not a path inside"),
        ("[template]\n[[step]]\ntype = 'ENV'\nargs = ['A']", "names and values"),
    ],
)
def test_a_folder_that_is_wrong_says_where(folder: Path, text: str, sentence: str) -> None:
    (folder / "hello" / "template.toml").write_text(text)

    with pytest.raises(Invalid, match=sentence):
        load_shipped(folder, "hello")


async def test_the_first_create_builds_it_and_the_next_finds_it(world: World) -> None:
    created = await asyncio.gather(*(world.create(templateID="hello") for _ in range(3)))
    later = await world.create(templateID="default/hello:default")
    defaults = (await world.client.get("/default-templates")).json()

    assert len(world.node.builds) == 2
    request = world.node.builds[-1]
    assert len({one["templateID"] for one in [*created, later]}) == 1
    assert request.WhichOneof("source") == "from_build"
    assert (request.cpu_count, request.memory_mb, request.start_command) == (1, 512, "python3 /opt/hello/main.py")
    archive = Path(request.files_dir) / f"{request.steps[0].files_hash}.tar.gz"
    with tarfile.open(archive) as tar:
        assert "server/main.py" in tar.getnames()
    shown = next(one for one in defaults if one["aliases"] == ["hello"])
    assert (shown["isDefault"], shown["public"], shown["description"]) == (True, True, "says hello")


async def test_every_team_can_use_it_and_its_name_is_reserved(world: World) -> None:
    _, key = await world.other_team()
    async with world.client_with(X_API_Key=key) as stranger:
        created = await stranger.post("/v2/sandboxes", json={"templateID": "hello"})
        build = await stranger.post("/shipped-templates/hello/builds")
    registered = await world.client.post("/v3/templates", json={"name": "hello"})

    assert created.status_code == 201
    assert (build.status_code, registered.status_code) == (403, 403)


async def test_a_create_that_would_wait_too_long_says_how_far_the_build_is(folder: Path) -> None:
    async with serving_world(templates_dir=folder, first_build_wait_seconds=0.3) as world:
        world.node.build_hold = asyncio.Event()
        entry = pb.LogEntry(level="info", message="fetching")
        world.node.build_events.insert(0, pb.BuildEvent(log=pb.BuildLog(entry=entry, step="2")))

        answer = await world.client.post("/v2/sandboxes", json={"templateID": "hello"})
        world.node.build_hold.set()

        async def there() -> bool:
            return (await world.client.post("/v2/sandboxes", json={"templateID": "hello"})).status_code == 201

        await eventually(there)
        assert answer.status_code == 503
        assert answer.headers["Should-Retry"] == "false"
        assert "is being built for its first use" in answer.json()["message"]
        assert len(world.node.builds) == 2


async def test_a_failed_first_build_is_told_and_not_repeated_at_once(world: World) -> None:
    world.node.build_events = [pb.BuildEvent(failed=pb.BuildFailed(message="exit code 1", step="2"))]

    answers = [await world.client.post("/v2/sandboxes", json={"templateID": "hello"}) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [500, 500]
    assert "could not be built: exit code 1" in answers[0].json()["message"]
    assert len(world.node.builds) == 2


async def test_it_is_built_when_asked_and_one_build_is_joined(world: World) -> None:
    world.node.build_hold = asyncio.Event()
    names = (await world.client.get("/shipped-templates")).json()

    first = (await world.client.post("/shipped-templates/hello/builds")).json()
    second = (await world.client.post("/shipped-templates/hello/builds?force=true")).json()
    unknown = await world.client.post("/shipped-templates/nothing/builds")
    world.node.build_hold.set()

    async def ready() -> bool:
        path = f"/templates/{first['templateID']}/builds/{first['buildID']}/status"
        return bool((await world.client.get(path)).json()["status"] == "ready")

    await eventually(ready)
    third: dict[str, Any] = (await world.client.post("/shipped-templates/hello/builds?force=true")).json()
    await eventually(lambda: len(world.node.builds) == 3)

    assert names == ["hello"]
    assert first == second
    assert unknown.status_code == 404
    assert (third["templateID"], world.node.builds[-1].force) == (first["templateID"], True)


async def test_rates_of_a_shipped_template_are_asked_for_with_its_build(world: World) -> None:
    made = await world.client.post("/shipped-templates/hello/builds?networkMbitPerSecond=8&force=true")
    refused = await world.client.post("/shipped-templates/hello/builds?networkMbitPerSecond=-1")
    await eventually(lambda: len(world.node.builds) == 2)

    assert made.status_code == 202
    assert refused.status_code == 400
    assert world.node.builds[-1].rates.network_mbit_per_second == 8
    assert world.node.builds[-1].force


async def test_a_build_under_way_is_joined_unless_other_rates_are_asked_for(world: World) -> None:
    world.node.build_hold = asyncio.Event()
    path = "/shipped-templates/hello/builds"

    first = await world.client.post(f"{path}?networkMbitPerSecond=8")
    same = await world.client.post(f"{path}?networkMbitPerSecond=8")
    none = await world.client.post(path)
    others = [
        await world.client.post(f"{path}?networkMbitPerSecond=9"),
        await world.client.post(f"{path}?networkMbitPerSecond=8&diskMBPerSecond=5"),
    ]
    world.node.build_hold.set()

    assert first.status_code == 202
    assert first.json() == same.json() == none.json()
    assert [answer.status_code for answer in others] == [409, 409]
    assert "with other rates is under way; ask again when it has ended" in others[0].json()["message"]
