"""Template builds: registered, their files uploaded, started, queued, followed, cancelled."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from sqlalchemy import update
from structlog.testing import capture_logs

from emberbox.store import templates as rows
from emberbox.store.tables import template_builds
from emberbox.wire import node_pb2 as pb
from tests.support.control import ADMIN_TOKEN, World, eventually, made_world, serving_world
from tests.support.fake_node import Refuse

HASH = "ab" * 32


def line(message: str, step: str = "1", level: str = "info") -> pb.BuildEvent:
    return pb.BuildEvent(log=pb.BuildLog(entry=pb.LogEntry(level=level, message=message), step=step))


def done(*layers: str) -> pb.BuildEvent:
    image = pb.Image(layers=layers or ["ab" * 32, "cd" * 32], env_vars={"A": "1"}, default_user="user")
    return pb.BuildEvent(done=pb.BuildDone(image=image, size_bytes=1, agent_version="0.1"))


def failed(message: str, step: str = "") -> pb.BuildEvent:
    return pb.BuildEvent(failed=pb.BuildFailed(message=message, step=step))


def archive(name: str = "app/main.py", content: bytes = b"print(1)\n") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return gzip.compress(made.getvalue(), mtime=0)  # the same bytes in every second


async def register(world: World, name: str = "mine", **body: Any) -> dict[str, Any]:
    answer = await world.client.post("/v3/templates", json={"name": name, **body})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    return made


async def start(world: World, made: dict[str, Any], **body: Any) -> Any:
    body = body or {"fromImage": "debian:12", "steps": [{"type": "RUN", "args": ["true"]}]}
    return await world.client.post(f"/v2/templates/{made['templateID']}/builds/{made['buildID']}", json=body)


async def status(world: World, made: dict[str, Any], **query: Any) -> dict[str, Any]:
    answer = await world.client.get(f"/templates/{made['templateID']}/builds/{made['buildID']}/status", params=query)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def ended(world: World, made: dict[str, Any]) -> dict[str, Any]:
    async def over() -> bool:
        return (await status(world, made))["status"] in ("ready", "error")

    await eventually(over)
    return await status(world, made)


async def built(world: World, name: str = "mine", **body: Any) -> dict[str, Any]:
    """A template with a ready build."""
    world.node.build_events = [line("one"), done()]
    made = await register(world, name, **body)
    assert (await start(world, made)).status_code == 202
    assert (await ended(world, made))["status"] == "ready"
    return made


# ---- registering


@pytest.mark.parametrize("disk", ["minFreeDiskMb", "minFreeDiskMB"])
async def test_a_template_is_registered_built_and_used(world: World, disk: str) -> None:
    world.node.build_events = [line("hello"), done("ab" * 32, "ef" * 32)]

    made = await register(world, cpuCount=1, memoryMB=256, **{disk: 20000})
    before = await status(world, made)
    started = await start(world, made)
    told = await ended(world, made)
    created = await world.create(templateID="mine")

    assert (made["names"], made["aliases"], made["tags"], made["public"]) == (
        ["default/mine"],
        ["mine"],
        ["default"],
        False,
    )
    assert before["status"] == "waiting"
    assert started.status_code == 202
    assert told["status"] == "ready"
    assert [(entry["message"], entry["step"]) for entry in told["logEntries"]] == [("hello", "1")]
    request = world.node.builds[-1]
    assert (request.from_image, request.cpu_count, request.memory_mb, request.disk_size_mb) == (
        "debian:12", 1, 256, 20000,
    )  # fmt: skip
    machine = world.node.machines[created["sandboxID"]].request
    assert (machine.cpu_count, list(machine.image.layers)) == (1, ["ab" * 32, "ef" * 32])


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "name is missing"),
        ({"name": "Not A Name"}, "not a template name"),
        ({"name": "a/b/c"}, "not a template name"),
        ({"name": "mine:"}, "not a template name"),
        ({"name": "mine", "tags": ["no spaces"]}, "not a tag"),
        ({"name": "mine", "cpuCount": 0}, "cpuCount"),
        ({"name": "mine", "cpuCount": 64}, "EMBERBOX_MAX_CPU_COUNT"),
        ({"name": "mine", "diskMBPerSecond": -1}, "diskMBPerSecond"),
        ({"name": "mine", "diskOperationsPerSecond": "fast"}, "diskOperationsPerSecond"),
        ({"name": "mine", "networkMbitPerSecond": 40_000}, "networkMbitPerSecond"),
        ({"name": "mine", "memoryMB": 100_000}, "EMBERBOX_MAX_MEMORY_MB"),
        ({"name": "mine", "minFreeDiskMB": 1_000_000}, "EMBERBOX_MAX_DISK_SIZE_MB"),
    ],
)
async def test_what_cannot_be_registered_is_refused(world: World, body: dict[str, Any], sentence: str) -> None:
    answer = await world.client.post("/v3/templates", json=body)

    assert answer.status_code == 400
    assert sentence in answer.json()["message"]
    assert len((await world.client.get("/v2/templates")).json()) == 1


async def test_tags_come_from_the_name_and_the_list(world: World) -> None:
    tagged = await built(world, "mine:V1", tags=["stable", "v1"])

    tags = (await world.client.get("/templates/mine/tags")).json()
    untagged = await world.client.post("/v2/sandboxes", json={"templateID": "mine"})

    assert tagged["tags"] == ["v1", "stable"]
    assert {tag["tag"] for tag in tags} == {"v1", "stable"}
    assert untagged.status_code == 400
    assert (await world.create(templateID="mine:stable"))["templateID"] == tagged["templateID"]


async def test_another_build_of_a_name_belongs_to_the_same_template(world: World) -> None:
    first = await built(world)

    second = await register(world, "default/mine")
    by_id = await register(world, first["templateID"])
    earlier_client = await world.client.post("/v2/templates", json={"alias": "mine"})

    assert {first["templateID"]} == {second["templateID"], by_id["templateID"], earlier_client.json()["templateID"]}
    assert earlier_client.json()["buildCount"] == 4
    assert len({first["buildID"], second["buildID"], by_id["buildID"], earlier_client.json()["buildID"]}) == 4


async def test_one_name_registered_many_times_at_once_is_one_template(world: World) -> None:
    made = await asyncio.gather(*(register(world, "same") for _ in range(8)))

    assert len({one["templateID"] for one in made}) == 1
    assert len({one["buildID"] for one in made}) == 8


async def test_names_are_a_teams_own(world: World) -> None:
    mine = await built(world)
    _, key = await world.other_team()
    async with world.client_with(X_API_Key=key) as stranger:
        same_alias = await stranger.post("/v3/templates", json={"name": "mine"})
        in_my_namespace = await stranger.post("/v3/templates", json={"name": "default/mine"})
        my_id = await stranger.post("/v3/templates", json={"name": mine["templateID"]})
        own_base = await stranger.post("/v3/templates", json={"name": "base"})
    shipped = await world.client.post("/v3/templates", json={"name": "base"})

    assert same_alias.json()["names"] == ["other/mine"]
    assert same_alias.json()["templateID"] != mine["templateID"]
    assert my_id.json()["templateID"] != mine["templateID"]
    assert own_base.status_code == 202
    assert (in_my_namespace.status_code, shipped.status_code) == (403, 403)


async def test_a_snapshots_name_is_not_a_templates(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "saved"})

    answer = await world.client.post("/v3/templates", json={"name": "saved"})

    assert answer.status_code == 409


async def test_the_first_generation_of_builds_says_what_to_use(world: World) -> None:
    answers = [
        await world.client.post("/templates", json={"dockerfile": "FROM debian"}),
        await world.client.post("/templates/base", json={"dockerfile": "FROM debian"}),
        await world.client.post("/templates/base/builds/some"),
    ]

    assert [answer.status_code for answer in answers] == [410, 410, 410]
    assert all(
        "/v3/templates" in answer.json()["message"] or "/v2/templates" in answer.json()["message"] for answer in answers
    )


# ---- files


async def link(world: World, template: str, files_hash: str = HASH) -> dict[str, Any]:
    answer = await world.client.get(f"/templates/{template}/files/{files_hash}")
    assert answer.status_code == 201, answer.text
    told: dict[str, Any] = answer.json()
    return told


def files_left(world: World) -> list[str]:
    root = world.settings.api_dir / "files"
    return sorted(path.name for path in root.rglob("*") if path.is_file()) if root.exists() else []


@pytest.mark.parametrize("compressed", [True, False])
async def test_files_are_uploaded_through_a_link_without_a_key(world: World, compressed: bool) -> None:
    made = await register(world)
    data = archive() if compressed else gzip.decompress(archive())
    before = await link(world, "mine")

    async with world.client_with() as nobody:
        put = await nobody.put(before["url"], content=data)
    after = await link(world, made["templateID"])

    assert before["url"].startswith("http://api/")
    assert (before["present"], put.status_code, after["present"]) == (False, 200, True)
    stored = next((world.settings.api_dir / "files").rglob(f"{HASH}.tar.gz"))
    assert stored.read_bytes() == data


async def test_a_link_behind_a_proxy_leads_through_it(world: World) -> None:
    await register(world)

    answer = await world.client.get(
        f"/templates/mine/files/{HASH}", headers={"X-Forwarded-Proto": "https", "X-Forwarded-Host": "api.example.com"}
    )

    assert answer.json()["url"].startswith("https://api.example.com/files/")


async def test_a_link_is_good_for_its_hash_and_time_only(world: World) -> None:
    await register(world)
    url = (await link(world, "mine"))["url"]
    expires = url.split("expires=")[1].split("&")[0]

    other_hash = await world.client.put(url.replace(HASH, "cd" * 32), content=archive())
    longer = await world.client.put(url.replace(expires, str(int(expires) + 60)), content=archive())
    forged = await world.client.put(url[:-4] + "beef", content=archive())
    team, _, signed = url.partition("/files/")[2].partition("/")
    past = "1000000000"
    signature = world.control.plane.tokens.sign("upload", f"{team}/{HASH}/{past}")
    expired = await world.client.put(f"/files/{team}/{HASH}?expires={past}&signature={signature}", content=archive())

    assert signed.startswith(HASH)
    assert [one.status_code for one in (other_hash, longer, forged, expired)] == [403, 403, 403, 403]
    assert "expired" in expired.json()["message"]
    assert files_left(world) == []


@pytest.mark.parametrize("files_hash", ["xyz", "..%2f..%2fetc", "AB" * 32, "a" * 63, "a" * 65])
async def test_what_is_not_a_hash_gets_no_link(world: World, files_hash: str) -> None:
    await register(world)

    answer = await world.client.get(f"/templates/mine/files/{files_hash}")

    assert answer.status_code == 400


async def test_only_the_own_templates_get_links(world: World) -> None:
    made = await register(world)
    _, key = await world.other_team()
    async with world.client_with(X_API_Key=key) as stranger:
        others = await stranger.get(f"/templates/{made['templateID']}/files/{HASH}")
        public = await stranger.get(f"/templates/base/files/{HASH}")

    assert (others.status_code, public.status_code) == (404, 403)


async def cut(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize(
    ("data", "length", "sentence"),
    [
        (archive()[:40], 200, "ended after 40 of 200 bytes"),
        (archive() + b"more", len(archive()), "bytes"),
        (b"no archive at all", None, "not a tar archive"),
        (archive()[:-6], None, "damaged"),
        (archive("../outside"), None, "lies outside"),
        (archive("/etc/passwd"), None, "lies outside"),
        (gzip.compress(b""), None, "empty"),
        (gzip.compress(b"\0" * (9 * 1024 * 1024)), None, "unpacks to more than"),
    ],
    # Names that are the same in every worker: compressed bytes hold the time.
    ids=["cut off", "longer", "no archive", "damaged", "parent", "absolute", "empty", "too large"],
)
async def test_an_upload_that_is_not_right_leaves_nothing(data: bytes, length: int | None, sentence: str) -> None:
    async with serving_world(max_upload_mb=1) as world:
        await register(world)
        url = (await link(world, "mine"))["url"]

        answer = await world.client.put(
            url, content=cut(data), headers={"Content-Length": str(len(data) if length is None else length)}
        )

        assert answer.status_code == 400
        assert sentence in answer.json()["message"]
        assert files_left(world) == []
        assert not (await link(world, "mine"))["present"]


async def test_an_upload_needs_a_length_below_the_limit() -> None:
    async with serving_world(max_upload_mb=1) as world:
        await register(world)
        url = (await link(world, "mine"))["url"]

        unknown = await world.client.put(url, content=cut(archive()))
        large = await world.client.put(url, content=cut(b""), headers={"Content-Length": str(2 * 1024 * 1024)})

        assert (unknown.status_code, large.status_code) == (400, 413)
        assert "Content-Length" in unknown.json()["message"]


async def test_archives_go_when_they_are_old_but_not_while_a_build_needs_them() -> None:
    async with serving_world(builds_at_once=1) as world:
        world.node.build_hold = asyncio.Event()
        made = await register(world)
        for files_hash in (HASH, "cd" * 32, "ef" * 32):
            await world.client.put((await link(world, "mine", files_hash))["url"], content=archive())
        steps = [{"type": "COPY", "args": [".", "/app"], "filesHash": HASH}]
        assert (await start(world, made, fromImage="debian", steps=steps)).status_code == 202

        await world.control.builds.tend()
        fresh = files_left(world)
        for path in (world.settings.api_dir / "files").rglob("*.tar.gz"):
            _age(path, 2 * 3600 if "ef" in path.name else 8 * 24 * 3600)
        await world.control.builds.tend()
        world.node.build_hold.set()

        assert len(fresh) == 3
        assert files_left(world) == [f"{HASH}.tar.gz", f"{'ef' * 32}.tar.gz"]


def _age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


# ---- starting


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"steps": []}, "exactly one of them"),
        ({"fromImage": "debian", "fromTemplate": "base"}, "exactly one of them"),
        ({"fromImage": "--help"}, "not an image reference"),
        ({"fromImage": "a b"}, "not an image reference"),
        ({"fromImage": "debian", "steps": [{"type": "FLY", "args": ["away"]}]}, "step 1 (FLY): unknown type"),
        ({"fromImage": "debian", "steps": [{"type": "USER", "args": ["a"]}, {"type": "RUN"}]}, "step 2 (RUN)"),
        ({"fromImage": "debian", "steps": [{"type": "ENV", "args": ["A"]}]}, "names and values"),
        ({"fromImage": "debian", "steps": [{"type": "ENV", "args": ["A B", "1"]}]}, "name of an environment variable"),
        ({"fromImage": "debian", "steps": [{"type": "COPY", "args": ["a", "b"]}]}, "filesHash"),
        (
            {"fromImage": "debian", "steps": [{"type": "COPY", "args": ["a", "b", "", "rwx"], "filesHash": HASH}]},
            "octal",
        ),
        ({"fromImage": "debian", "steps": [{"type": "COPY", "args": ["a", "b"], "filesHash": HASH}]}, "not uploaded"),
        ({"fromTemplate": "nothing"}, "not found"),
        (
            {
                "fromTemplate": "base",
                "fromImageRegistry": {"type": "registry", "username": "u", "password": "p"},
            },
            "fromImageRegistry",
        ),
        ({"fromImage": "debian", "fromImageRegistry": {"type": "ftp"}}, "fromImageRegistry"),
    ],
)
async def test_what_cannot_be_built_is_refused_at_the_start(world: World, body: dict[str, Any], sentence: str) -> None:
    made = await register(world)

    answer = await start(world, made, **body)

    assert answer.status_code in (400, 404)
    assert sentence in answer.json()["message"]
    assert (await status(world, made))["status"] == "waiting"
    assert len(world.node.builds) == 1


async def test_a_build_is_started_once(world: World) -> None:
    made = await register(world)

    answers = await asyncio.gather(*(start(world, made) for _ in range(4)))
    await ended(world, made)
    late = await start(world, made)
    other = await world.client.post(f"/v2/templates/base/builds/{made['buildID']}", json={"fromImage": "debian"})

    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    assert late.status_code == 409
    assert other.status_code == 404
    assert len(world.node.builds) == 2


async def test_the_node_is_told_all_of_the_plan(world: World) -> None:
    made = await register(world)
    await world.client.put((await link(world, "mine"))["url"], content=archive())
    steps = [
        {"type": "COPY", "args": ["app", "/app", "user:user", "0755"], "filesHash": HASH, "force": True},
        {"type": "RUN", "args": ["make", "root"]},
    ]

    await start(world, made, fromImage="debian", steps=steps, startCmd="serve", readyCmd="curl x", force=True)
    await ended(world, made)

    request = world.node.builds[-1]
    assert [(step.type, list(step.args), step.files_hash, step.force) for step in request.steps] == [
        ("COPY", ["app", "/app", "user:user", "0755"], HASH, True),
        ("RUN", ["make", "root"], "", False),
    ]
    assert (request.start_command, request.ready_command, request.force) == ("serve", "curl x", True)
    assert (world.settings.api_dir / "files").as_posix() in request.files_dir
    assert Path(request.files_dir, f"{HASH}.tar.gz").read_bytes() == archive()


@pytest.mark.parametrize(
    ("registry", "kind"),
    [
        ({"type": "registry", "username": "me", "password": "s3cr3t-word"}, "registry"),
        (
            {"type": "aws", "awsAccessKeyId": "AK-s3cr3t-word", "awsSecretAccessKey": "s3cr3t-word", "awsRegion": "eu"},
            "aws",
        ),
        ({"type": "gcp", "serviceAccountJson": '{"key": "s3cr3t-word"}'}, "gcp"),
    ],
)
async def test_credentials_reach_the_node_and_nothing_else(world: World, registry: dict[str, str], kind: str) -> None:
    world.node.build_events = [failed("no", "base")]
    made = await register(world)

    with capture_logs() as logged:
        await start(world, made, fromImage="ghcr.io/me/app:v1", fromImageRegistry=registry)
        await ended(world, made)

    assert "s3cr3t-word" in str(world.node.builds[-1].credentials)
    assert world.node.builds[-1].credentials.kind == kind
    written = b"".join(path.read_bytes() for path in world.settings.data_dir.rglob("*") if path.is_file())
    assert b"s3cr3t-word" not in written
    assert "build.failed" in str(logged)
    assert "s3cr3t-word" not in str(logged)


async def test_a_build_from_a_template_stands_on_its_ready_build(world: World) -> None:
    base = (await world.client.get("/templates/base")).json()["builds"][0]["buildID"]
    by_name, by_image = await register(world, "one"), await register(world, "two")

    await start(world, by_name, fromTemplate="base")
    await start(world, by_image, fromImage="docker.io/e2bdev/base:latest")
    await ended(world, by_name)
    await ended(world, by_image)

    assert [request.from_build.build_id for request in world.node.builds[-2:]] == [base, base]


async def test_a_template_of_another_team_is_a_source_when_it_is_public(world: World) -> None:
    mine = await built(world)
    _, key = await world.other_team()
    async with world.client_with(X_API_Key=key) as stranger:
        made = (await stranger.post("/v3/templates", json={"name": "theirs"})).json()
        path = f"/v2/templates/theirs/builds/{made['buildID']}"
        private = await stranger.post(path, json={"fromTemplate": "default/mine"})
        by_id = await stranger.post(path, json={"fromTemplate": mine["templateID"]})
        await world.client.patch("/v2/templates/mine", json={"public": True})
        public = await stranger.post(path, json={"fromTemplate": "default/mine"})
        their_log = await stranger.get(f"/templates/{mine['templateID']}/builds/{mine['buildID']}/status")

    assert [private.status_code, by_id.status_code, public.status_code] == [404, 404, 202]
    assert their_log.status_code == 403


async def test_a_snapshot_is_not_built_upon(world: World) -> None:
    sandbox_id = (await world.create())["sandboxID"]
    await world.client.post(f"/sandboxes/{sandbox_id}/snapshots", json={"name": "saved"})
    made = await register(world)

    answer = await start(world, made, fromTemplate="saved")

    assert answer.status_code == 400
    assert "snapshot" in answer.json()["message"]


# ---- following


async def test_the_log_pages_exactly(world: World) -> None:
    levels = ("debug", "info", "warn", "error")
    world.node.build_events = [*(line(str(n), level=levels[n % 4]) for n in range(250)), done()]
    made = await register(world)
    await start(world, made)
    await ended(world, made)

    async def read(**query: Any) -> list[str]:
        found: list[str] = []
        while entries := (await status(world, made, logsOffset=len(found), **query))["logEntries"]:
            found += [entry["message"] for entry in entries]
        return found

    assert await read() == [str(n) for n in range(250)]
    assert await read(limit=7) == [str(n) for n in range(250)]
    assert await read(level="warn") == [str(n) for n in range(250) if n % 4 >= 2]
    assert len((await status(world, made))["logEntries"]) == 100
    assert (await status(world, made, limit=0))["logEntries"] == []


async def test_the_log_is_there_while_the_build_runs(world: World) -> None:
    world.node.build_hold = asyncio.Event()
    world.node.build_events = [line("first"), done()]
    made = await register(world)
    await start(world, made)

    async def shown() -> bool:
        return bool((await status(world, made))["logEntries"])

    await eventually(shown)
    meanwhile = await status(world, made)
    world.node.build_hold.set()

    assert meanwhile["status"] == "building"
    assert (await ended(world, made))["status"] == "ready"


async def test_a_failed_build_says_where_and_leaves_the_ready_one_in_use(world: World) -> None:
    first = await built(world)
    world.node.build_events = [line("fine", "1"), line("bad thing", "2", "error"), failed("exit code 2", "2")]
    second = await register(world)

    await start(world, second)
    told = await ended(world, second)
    created = await world.create(templateID="mine")
    listed = next(one for one in (await world.client.get("/v2/templates")).json() if one["aliases"] == ["mine"])

    assert told["status"] == "error"
    assert (told["reason"]["message"], told["reason"]["step"]) == ("exit code 2", "2")
    assert [entry["message"] for entry in told["reason"]["logEntries"]] == ["bad thing"]
    assert created["templateID"] == first["templateID"]
    assert (listed["buildID"], listed["buildStatus"]) == (first["buildID"], "ready")


async def test_a_build_ends_also_when_what_it_says_cannot_be_stored(world: World) -> None:
    with_nul = pb.Image(layers=["ef" * 32], env_vars={"A": "one\0two"})
    with_long = pb.Image(layers=["ef" * 32], default_user="u" * 65)
    told = []
    for end in (
        failed("exit\0 code 2"),
        pb.BuildEvent(done=pb.BuildDone(image=with_nul, size_bytes=1)),
        pb.BuildEvent(done=pb.BuildDone(image=with_long, size_bytes=1)),
    ):
        world.node.build_events = [line("a\0b"), end]
        made = await register(world)
        await start(world, made)
        told.append(await ended(world, made))

    assert [one["status"] for one in told] == ["error"] * 3
    assert [one["logs"] for one in told] == [["ab"]] * 3
    assert told[0]["reason"]["message"] == "exit code 2"
    assert "with a NUL" in told[1]["reason"]["message"]
    assert "longer than 64 characters" in told[2]["reason"]["message"]
    await eventually(
        lambda: [list(request.layers) for request in world.node.deleted_builds].count(["ef" * 32]) == 2,
    )


async def test_a_template_without_a_ready_build_says_so(world: World) -> None:
    await register(world)

    answer = await world.client.post("/v2/sandboxes", json={"templateID": "mine"})

    assert answer.status_code == 400
    assert "no ready build" in answer.json()["message"]


async def test_builds_wait_for_their_turn_and_no_team_waits_for_another() -> None:
    async with serving_world(builds_at_once=2, builds_per_team=1, builds_waiting_per_team=2) as world:
        hold = world.node.build_hold = asyncio.Event()
        _, key = await world.other_team()
        made = [await register(world, f"t{n}") for n in range(4)]

        answers = [await start(world, one) for one in made]
        async with world.client_with(X_API_Key=key) as stranger:
            theirs = (await stranger.post("/v3/templates", json={"name": "t"})).json()
            await stranger.post(f"/v2/templates/t/builds/{theirs['buildID']}", json={"fromImage": "debian"})
        await eventually(lambda: len(world.node.builds) == 3)
        states = [(await status(world, one))["status"] for one in made]
        hold.set()

        assert [answer.status_code for answer in answers] == [202, 202, 202, 429]
        assert states == ["building", "waiting", "waiting", "waiting"]
        assert [(await ended(world, one))["status"] for one in made[:3]] == ["ready"] * 3


async def test_a_build_that_takes_too_long_is_given_up() -> None:
    async with made_world() as world:
        async with world.serving():
            await world.ready()  # `base` is built, which may itself take more than a second
        world.settings = world.settings.model_copy(update={"build_seconds": 1})
        async with world.serving():
            await world.ready()
            world.node.build_hold = asyncio.Event()
            made = await register(world)

            await start(world, made)
            told = await ended(world, made)

        assert "took longer" in told["reason"]["message"]
        assert world.node.cancelled_builds == [made["buildID"]]


async def test_a_refusal_of_the_node_is_the_reason(world: World) -> None:
    async def refuse(_: Any) -> None:
        raise Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "the node's disk is full")

    world.node.before["Build"] = refuse
    made = await register(world)

    await start(world, made)
    told = await ended(world, made)

    assert told["reason"]["message"] == "the node's disk is full"


# ---- cancelling


async def test_the_administrator_cancels_a_teams_builds() -> None:
    async with serving_world(builds_at_once=1) as world:
        world.node.build_hold = asyncio.Event()
        running, waiting = await register(world, "a"), await register(world, "b")
        await start(world, running)
        await start(world, waiting)
        await eventually(lambda: len(world.node.builds) == 2)

        async with world.client_with(X_Admin_Token=ADMIN_TOKEN) as admin:
            answer = await admin.post(f"/admin/teams/{world.team_id}/builds/cancel")
            again = await admin.post(f"/admin/teams/{world.team_id}/builds/cancel")

        assert (answer.json()["cancelledCount"], again.json()["cancelledCount"]) == (2, 0)
        assert world.node.cancelled_builds == [running["buildID"]]
        for one in (running, waiting):
            assert "cancelled" in (await status(world, one))["reason"]["message"]


async def test_deleting_a_template_ends_its_builds_and_leaves_its_sandboxes(world: World) -> None:
    made = await built(world)
    sandbox_id = (await world.create(templateID="mine"))["sandboxID"]
    world.node.build_hold = asyncio.Event()
    second = await register(world)
    await start(world, second)
    await eventually(lambda: second["buildID"] in world.node.journals)

    deleted = await world.client.delete("/templates/mine")
    gone = await world.client.post("/v2/sandboxes", json={"templateID": "mine"})

    assert deleted.status_code == 204
    assert gone.status_code == 404
    assert world.node.cancelled_builds == [second["buildID"]]
    assert [request.build_id for request in world.node.deleted_builds if request.layers] == [made["buildID"]]
    assert await world.state_of(sandbox_id) == "running"
    assert await rows.get_build(world.control.store, second["buildID"]) is None


async def test_layers_that_a_build_stands_on_stay_while_it_runs(world: World) -> None:
    await built(world, "below")
    world.node.build_hold = asyncio.Event()
    world.node.build_events = [failed("no", "1")]
    made = await register(world, "above")
    await start(world, made, fromTemplate="below")
    await eventually(lambda: made["buildID"] in world.node.journals)

    await world.client.delete("/templates/below")
    during = [list(request.layers) for request in world.node.deleted_builds]
    world.node.build_hold.set()
    await ended(world, made)

    assert during == [[]]
    await eventually(lambda: [list(request.layers) for request in world.node.deleted_builds] == [[], ["cd" * 32]])


async def test_old_builds_that_no_tag_means_go_where_only_some_are_kept() -> None:
    async with serving_world(builds_kept_per_template=1) as world:
        layers = iter(f"{number:064x}" for number in range(10))
        world.node.build_script = lambda _: [done("ab" * 32, next(layers))]
        made = []
        for name in ("mine:v1", "mine", "mine", "mine", "mine"):
            made.append(await register(world, name))
            await start(world, made[-1])
            await ended(world, made[-1])

        await world.control.builds.tend()
        left = (await world.client.get("/templates/mine")).json()["builds"]

        # v1 and default are meant by tags; of the others the newest is kept.
        assert {build["buildID"] for build in left} == {made[0]["buildID"], made[3]["buildID"], made[4]["buildID"]}
        removed = {request.build_id: list(request.layers) for request in world.node.deleted_builds}
        assert removed == {made[1]["buildID"]: [f"{1:064x}"], made[2]["buildID"]: [f"{2:064x}"]}


# ---- over restarts


async def test_a_build_outlives_a_restart_of_the_api() -> None:
    async with made_world() as world:
        async with world.serving():
            await world.ready()
            world.node.build_hold = asyncio.Event()
            world.node.build_events = [*(line(str(n)) for n in range(5)), done()]
            made = await register(world)
            await start(world, made)

            async def logged() -> bool:
                return len((await status(world, made))["logEntries"]) == 5

            await eventually(logged)
        async with world.serving():
            await world.ready()
            world.node.build_hold.set()
            told = await ended(world, made)

        assert told["status"] == "ready"
        assert [entry["message"] for entry in told["logEntries"]] == [str(n) for n in range(5)]
        assert [request.from_position for name, request in world.node.calls if name == "FollowBuild"] == [5]


async def test_a_queued_build_outlives_a_restart_unless_its_credentials_are_gone() -> None:
    async with made_world(builds_at_once=1) as world:
        async with world.serving():
            await world.ready()
            world.node.build_hold = asyncio.Event()
            first, second, third = [await register(world, name) for name in ("a", "b", "c")]
            registry = {"type": "registry", "username": "u", "password": "p"}
            await start(world, first)
            await start(world, second)
            await start(world, third, fromImage="debian", fromImageRegistry=registry)
            await eventually(lambda: first["buildID"] in world.node.journals)
        async with world.serving():
            await world.ready()
            world.node.build_hold.set()
            told = [await ended(world, one) for one in (first, second, third)]

        assert [one["status"] for one in told] == ["ready", "ready", "error"]
        assert "credentials are not kept" in told[2]["reason"]["message"]


async def test_a_build_whose_node_forgot_it_fails_clearly() -> None:
    async with made_world() as world:
        async with world.serving():
            await world.ready()
            world.node.build_hold = asyncio.Event()
            made = await register(world)
            await start(world, made)
            await eventually(lambda: made["buildID"] in world.node.journals)
        world.node.forget_builds()
        async with world.serving():
            await world.ready()
            told = await ended(world, made)

        assert told["status"] == "error"
        assert "the node restarted during the build" in told["reason"]["message"]


async def test_a_node_that_restarts_during_a_build_fails_it_clearly(world: World) -> None:
    world.node.build_hold = asyncio.Event()
    made = await register(world)
    await start(world, made)

    async def logged() -> bool:
        return bool((await status(world, made))["logEntries"])

    await eventually(logged)
    await world.node.stop()
    await world.node.start(world.settings.node_target)
    told = await ended(world, made)

    assert told["status"] == "error"
    assert "the node restarted during the build" in told["reason"]["message"]


async def test_a_stream_that_breaks_is_taken_up_where_it_was(world: World) -> None:
    async def lose(_: Any) -> None:
        if len([name for name, _ in world.node.calls if name == "Build"]) == 2:
            raise Refuse(grpc.StatusCode.UNAVAILABLE, "shutting down")

    world.node.before["Build"] = lose
    made = await register(world)

    await start(world, made)
    told = await ended(world, made)

    assert told["status"] == "ready"
    assert len(world.node.builds) == 2


async def test_what_was_registered_long_ago_and_never_started_is_given_up(world: World) -> None:
    made = await register(world)
    async with world.control.store.write() as connection:
        await connection.execute(
            update(template_builds).where(template_builds.c.id == made["buildID"]).values(created_at=0)
        )

    await world.control.builds.tend()

    assert "never started" in (await status(world, made))["reason"]["message"]


# ---- rates


def rates(request: Any) -> tuple[int, int, int]:
    given = request.rates
    return given.disk_mb_per_second, given.disk_operations_per_second, given.network_mbit_per_second


async def test_rates_go_with_a_template_to_its_sandboxes_snapshots_and_forks(world: World) -> None:
    await built(world, diskMBPerSecond=5, diskOperationsPerSecond=100, networkMbitPerSecond=8)
    source = (await world.create(templateID="mine"))["sandboxID"]
    shot = (await world.client.post(f"/sandboxes/{source}/snapshots", json={})).json()
    copy = (await world.create(templateID=shot["snapshotID"]))["sandboxID"]
    (fork,) = (await world.client.post(f"/sandboxes/{source}/fork", json={"count": 1, "timeout": 60})).json()

    shown = (await world.client.get("/templates/mine")).json()["builds"][0]

    assert rates(world.node.builds[-1]) == (5, 100, 8)
    for sandbox_id in (source, copy, fork["sandbox"]["sandboxID"]):
        assert rates(world.node.machines[sandbox_id].request) == (5, 100, 8)
    assert (shown["diskMBPerSecond"], shown["diskOperationsPerSecond"], shown["networkMbitPerSecond"]) == (5, 100, 8)


async def test_earlier_clients_ask_for_rates_too(world: World) -> None:
    made = await world.client.post("/v2/templates", json={"alias": "mine", "networkMbitPerSecond": 8})

    shown = (await world.client.get("/templates/mine")).json()["builds"][0]

    assert made.status_code == 202
    assert shown["networkMbitPerSecond"] == 8
    assert "diskMBPerSecond" not in shown


async def test_what_a_template_leaves_out_is_the_installations_at_each_create() -> None:
    async with serving_world(default_disk_mb_per_second=50, default_network_mbit_per_second=100) as world:
        await built(world, networkMbitPerSecond=0)

        base = (await world.create(templateID="base"))["sandboxID"]
        mine = (await world.create(templateID="mine"))["sandboxID"]
        shown = (await world.client.get("/templates/base")).json()["builds"][0]

        assert rates(world.node.machines[base].request) == (50, 0, 100)
        assert rates(world.node.machines[mine].request) == (50, 0, 0)
        assert rates(world.node.builds[-1]) == (50, 0, 0)
        assert "diskMBPerSecond" not in shown
