"""One request and its answer, against a small server that says exactly what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from emberbox.runtime.firecracker.api import Deadlines, Drive, Firecracker, NetworkInterface, RateLimit
from emberbox.runtime.firecracker.errors import ApiError, ApiUnreachable
from emberbox.runtime.firecracker.transport import Transport

NAME = "api.sock"


class Server:
    """Answers every request with `answer` and keeps what was asked. The socket's folder may be deep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.asked: list[tuple[str, object]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
            body = await reader.readexactly(length)
            self.asked.append((head.partition(" HTTP")[0], json.loads(body) if body else None))
            writer.write(self.answer)
            await writer.drain()
        writer.close()


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    made = Server(tmp_path)
    monkeypatch.chdir(tmp_path)
    async with await asyncio.start_unix_server(made.serve, NAME):
        yield made


def answer(status: str, body: object) -> bytes:
    content = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


async def ask(server: Server, deadline_seconds: float = 60) -> object:
    return await Transport(server.folder, NAME).request("GET", "/vm", deadline_seconds=deadline_seconds)


async def test_an_empty_answer_is_none(server: Server) -> None:
    assert await ask(server) is None


async def test_an_answer_is_read_as_json(server: Server) -> None:
    server.answer = answer("200 OK", {"state": "Running"})

    assert await ask(server) == {"state": "Running"}


async def test_a_refusal_carries_firecrackers_words(server: Server) -> None:
    server.answer = answer("400 Bad Request", {"fault_message": "no such drive"})

    with pytest.raises(ApiError, match=r"GET /vm \(400\): no such drive") as caught:
        await ask(server)

    assert (caught.value.status, caught.value.fault) == (400, "no such drive")


@pytest.mark.parametrize(
    "broken",
    [b"", b"HTTP/1.1 200 OK\r\n", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"],
    ids=["nothing", "no-end", "nonsense", "too-short"],
)
async def test_a_broken_answer_is_unreachable_not_a_hang(server: Server, broken: bytes) -> None:
    server.answer = broken

    with pytest.raises(ApiUnreachable):
        await ask(server)


async def test_an_answer_that_is_too_long_is_not_read(server: Server) -> None:
    server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"

    with pytest.raises(ApiUnreachable, match="99999999999"):
        await ask(server)


async def test_a_missing_socket_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(ApiUnreachable):
        await Transport(tmp_path, NAME).request("GET", "/", deadline_seconds=60)
    with pytest.raises(ApiUnreachable, match=r"within 0\.05 s"):
        await Transport(tmp_path, NAME).wait_until_ready(0.05)


async def test_a_silent_server_is_given_up_after_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.chdir(tmp_path)
    async with await asyncio.start_unix_server(silent, NAME):
        with pytest.raises(ApiUnreachable, match=r"no answer to GET /vm within 0\.05 s"):
            await Transport(tmp_path, NAME).request("GET", "/vm", deadline_seconds=0.05)


async def test_a_socket_deeper_than_a_unix_path_may_be_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    server = Server(deep)
    async with await asyncio.start_unix_server(server.serve, NAME):
        assert await ask(server) is None


async def test_requests_say_what_the_specification_says(server: Server) -> None:
    api = Firecracker(server.folder, NAME, Deadlines())
    limit = RateLimit(size=1000, refill_ms=100)

    await api.set_machine(cpu_count=2, memory_mb=512)
    await api.add_drive(Drive("upper", "/upper", read_only=False, bandwidth=limit))
    await api.add_network(NetworkInterface("eth0", "tap0", "06:00:00:00:00:01"))
    await api.limit_drive("upper", None, limit)
    await api.create_snapshot("Diff", state="/out/state", memory="/out/memory.1")
    await api.load_snapshot(state="/state", memory="/memory", resume=True)

    bucket = {"size": 1000, "refill_time": 100}
    assert server.asked == [
        (
            "PUT /machine-config",
            {"vcpu_count": 2, "mem_size_mib": 512, "smt": False, "track_dirty_pages": True},
        ),
        (
            "PUT /drives/upper",
            {
                "drive_id": "upper",
                "path_on_host": "/upper",
                "is_root_device": False,
                "is_read_only": False,
                "rate_limiter": {"bandwidth": bucket},
            },
        ),
        (
            "PUT /network-interfaces/eth0",
            {
                "iface_id": "eth0",
                "host_dev_name": "tap0",
                "guest_mac": "06:00:00:00:00:01",
            },
        ),
        (
            "PATCH /drives/upper",
            {"drive_id": "upper", "rate_limiter": {"bandwidth": {"size": 0, "refill_time": 0}, "ops": bucket}},
        ),
        (
            "PUT /snapshot/create",
            {"snapshot_type": "Diff", "snapshot_path": "/out/state", "mem_file_path": "/out/memory.1"},
        ),
        (
            "PUT /snapshot/load",
            {
                "snapshot_path": "/state",
                "mem_backend": {"backend_type": "File", "backend_path": "/memory"},
                "enable_diff_snapshots": True,
                "resume_vm": True,
            },
        ),
    ]
