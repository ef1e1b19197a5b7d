"""A world for the edge's tests: an edge of its own, machines and a control plane on loopback addresses of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from emberbox.settings import Settings
from emberbox.wire import edge_pb2 as pb
from emberbox.wire import edge_pb2_grpc

DOMAIN = "sandboxes.test"
EDGE_PORT, TLS_PORT, API_PORT = 3002, 3443, 3000
START_SECONDS = 180.0


def loopback_addresses() -> Iterator[str]:
    """Addresses that nobody else is likely to use: tests run side by side."""
    block = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
    for last in range(1, 255):
        yield f"{block}.{last}"


@dataclass
class Exchange:
    """One request that arrived at a machine, and the way to answer it."""

    method: str
    target: str
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def body(self) -> bytes:
        if "content-length" in self.headers:
            return await self.reader.readexactly(int(self.headers["content-length"]))
        if "chunked" in self.headers.get("transfer-encoding", ""):
            return b"".join([chunk async for chunk in self.chunks()])
        return b""

    async def chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readline(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()

    async def answer(self, body: bytes, status: str = "200 OK", headers: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        self.writer.write(head.encode() + body)
        await self.writer.drain()

    async def begin_chunks(self) -> None:
        self.writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        self.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self.writer.drain()


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass
class Machine:
    """Something that answers HTTP on one address; by default with what it was asked, as JSON."""

    address: str
    seen: list[str] = field(default_factory=list)
    connections: int = 0
    _servers: list[asyncio.Server] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def listen(self, port: int, handler: Handler | None = None, **options: object) -> None:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer, handler or self._describe)
            writer.close()
            self._tasks.discard(task)

        server = await asyncio.start_server(on_connection, self.address, port, limit=1 << 20, **options)  # type: ignore[arg-type]
        self._servers.append(server)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            first, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = first.split(" ", 2)
            headers = {}
            for line in lines:
                name, _, value = line.partition(": ")
                headers[name.lower()] = value
            self.seen.append(f"{method} {target}")
            await handler(Exchange(method, target, headers, reader, writer))

    async def _describe(self, exchange: Exchange) -> None:
        body = await exchange.body()
        said = {
            "machine": self.address,
            "method": exchange.method,
            "target": exchange.target,
            "headers": exchange.headers,
            "body": body.decode("latin-1"),
        }
        await exchange.answer(json.dumps(said).encode())


Answer = Callable[[dict[str, object]], Awaitable[tuple[str, object]]]


class ControlPlane(Machine):
    """A control plane that knows how to answer `POST /edge/wake`; everything else it describes."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.questions: list[dict[str, object]] = []
        self.secrets: list[str] = []
        self.answer: Answer = self.not_found

    async def start(self) -> None:
        await self.listen(API_PORT, self._handle)

    @staticmethod
    async def not_found(question: dict[str, object]) -> tuple[str, object]:
        sandbox_id = question["sandboxID"]
        return "502 Bad Gateway", {"sandboxId": sandbox_id, "message": "The sandbox was not found", "code": 502}

    async def _handle(self, exchange: Exchange) -> None:
        if exchange.target != "/edge/wake":
            await self._describe(exchange)
            return
        question = json.loads(await exchange.body())
        self.questions.append(question)
        self.secrets.append(exchange.headers.get("x-edge-secret", ""))
        status, body = await self.answer(question)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        await exchange.answer(data, status, "content-type: application/json\r\n")


class EdgeProcess:
    """`emberbox.edge.main:serve` in a process of its own, on a data directory of its own."""

    def __init__(self, **settings: object) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="eb-edge-"))
        self._addresses = loopback_addresses()
        self.address = next(self._addresses)
        self.settings = Settings(
            data_dir=self.home,
            edge_host=self.address,
            edge_port=EDGE_PORT,
            edge_tls_port=TLS_PORT,
            api_host=next(self._addresses),
            api_port=API_PORT,
            domain=DOMAIN,
            **settings,  # type: ignore[arg-type]
        )
        self.settings.run_dir.mkdir()
        self.settings.edge_secret_path.write_text("the-secret\n")
        self.log = self.home / "edge.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.address}:{EDGE_PORT}"

    @property
    def tls_url(self) -> str:
        return f"https://{self.address}:{TLS_PORT}"

    @property
    def api_address(self) -> str:
        return str(self.settings.api_host)

    def new_address(self) -> str:
        return next(self._addresses)

    def start(self) -> None:
        """Start the role and wait until its door and its gRPC service answer."""
        self.launch()
        assert self.process is not None
        # By itself a channel would wait longer and longer before it tries again.
        options = [("grpc.max_reconnect_backoff_ms", 1000)]
        with grpc.insecure_channel(self.settings.edge_target, options) as channel:
            ready = grpc.channel_ready_future(channel)
            for _ in range(int(START_SECONDS / 0.05)):
                if self.process.poll() is not None:
                    raise RuntimeError(f"the edge gave up:\n{self.log.read_text()}")
                with contextlib.suppress(grpc.FutureTimeoutError):
                    ready.result(timeout=0.05)
                    return
        raise RuntimeError(f"the edge is not ready:\n{self.log.read_text()}")

    def launch(self) -> None:
        """Start the role, and wait for nothing."""
        code = "import sys; from emberbox.settings import Settings; from emberbox.edge.main import serve; "
        code += "serve(Settings.model_validate_json(sys.argv[1]))"
        command = [sys.executable, "-c", code, self.settings.model_dump_json()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def haproxies(self) -> dict[int, int]:
        """The HAProxy processes of this edge, as pid -> parent's pid."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.settings.edge_dir / "haproxy.cfg") in words:
                    stat = (entry / "stat").read_text()
                    state, parent = stat.rpartition(")")[2].split()[:2]
                    if state != "Z":
                        found[int(entry.name)] = int(parent)
        return found

    def master(self) -> int:
        return int((self.settings.edge_dir / "haproxy.pid").read_text())

    def workers(self) -> list[int]:
        master = self.master()
        return [pid for pid, parent in self.haproxies().items() if parent == master]

    def remove(self) -> None:
        """End everything that is left, whatever a test did."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.haproxies():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.remove_home()

    def remove_home(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)


class Routes:
    """What the control plane tells an edge."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target)
        self._stub = edge_pb2_grpc.EdgeStub(self._channel)

    async def set(self, sandbox_id: str, address: str, **fields: object) -> None:
        await self._stub.SetRoute(pb.Route(sandbox_id=sandbox_id, address=address, **fields), timeout=60)  # type: ignore[arg-type]

    async def drop(self, sandbox_id: str) -> None:
        await self._stub.DropRoute(pb.DropRouteRequest(sandbox_id=sandbox_id), timeout=60)

    async def replace(self, routes: dict[str, str]) -> None:
        wanted = [pb.Route(sandbox_id=sandbox_id, address=address) for sandbox_id, address in routes.items()]
        await self._stub.ReplaceRoutes(pb.ReplaceRoutesRequest(routes=wanted), timeout=120)

    async def close(self) -> None:
        await self._channel.close(grace=None)


def headers_for(sandbox_id: str, port: int | str = 8080, **more: str) -> dict[str, str]:
    return {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(port), **more}


async def eventually(is_true: Callable[[], bool], *, seconds: float = 90.0) -> None:
    """Wait for something that happens by itself."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            raise AssertionError("it did not happen")
        await asyncio.sleep(0.02)


async def raw_request(address: str, port: int, text: str) -> bytes:
    """Send bytes as they are and read what comes until the other side closes, or has answered with a length."""
    reader, writer = await asyncio.open_connection(address, port)
    try:
        writer.write(text.encode("latin-1"))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return head + await reader.readexactly(int(line.split(b":")[1]))
        return head
    finally:
        writer.close()


def make_certificate(folder: Path, *names: str) -> tuple[Path, Path]:
    """A self-signed certificate for some names, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject_names = ",".join(f"IP:{name}" if _is_ip(name) else f"DNS:{name}" for name in names)
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={names[0]}", "-addext", f"subjectAltName={subject_names}"]
    command += ["-addext", "basicConstraints=critical,CA:FALSE"]  # some clients take no authority for a server
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def _is_ip(name: str) -> bool:
    with contextlib.suppress(OSError):
        socket.inet_aton(name)
        return True
    return False
