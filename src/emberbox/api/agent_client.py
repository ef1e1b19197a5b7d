"""A client of the agent in a sandbox, through the edge: commands and files, as E2B's clients reach them.

The agent speaks Connect with JSON: a stream is a sequence of envelopes, one byte of flags and four of length before
each message; flag 2 marks the last, which holds an error or nothing.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx

from emberbox.control.errors import ControlError

AGENT_PORT = 49983
END_STREAM = 2

_CALL_SECONDS = 30.0
_SILENCE_SECONDS = 60.0
"""A stream that is silent for this long is broken: keepalives come more often."""


class AgentError(ControlError):
    """The sandbox could not do what was asked, or was not reached. The message is the agent's or the edge's own."""

    status = 502


class StreamError(Exception):
    """A Connect stream ended with this error."""


@dataclass(frozen=True, slots=True)
class Target:
    """A sandbox, and what opens it."""

    sandbox_id: str
    access_token: str | None = None
    traffic_token: str | None = None
    user: str | None = None

    def headers(self, port: int = AGENT_PORT) -> dict[str, str]:
        sent = {"E2b-Sandbox-Id": self.sandbox_id, "E2b-Sandbox-Port": str(port), "Connect-Protocol-Version": "1"}
        if self.access_token is not None:
            sent["X-Access-Token"] = self.access_token
        if self.traffic_token is not None:
            sent["e2b-traffic-access-token"] = self.traffic_token
        if self.user is not None:
            sent["Authorization"] = "Basic " + base64.b64encode(f"{self.user}:".encode()).decode()
        return sent


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes of a file from an offset on. `size` is that of the whole file, None where the sandbox does not tell."""

    data: bytes
    size: int | None


class AgentClient:
    """Owns the connections to the edge. Use it as a context manager."""

    def __init__(self, edge_url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=edge_url,
            timeout=_CALL_SECONDS,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            trust_env=False,
        )

    async def __aenter__(self) -> AgentClient:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    @asynccontextmanager
    async def start(
        self, target: Target, process: dict[str, Any], *, tag: str, keepalive_seconds: int
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """Start a process; the context's value are its events: `start`, `data`, `keepalive` and `end`.

        Leaving the context does not end the process. See `kill`.

        Raises:
            AgentError: the process cannot be started, or the connection broke.
        """
        headers = {
            **target.headers(),
            "Content-Type": "application/connect+json",
            "Keepalive-Ping-Interval": str(keepalive_seconds),
        }
        with _told():
            async with self._http.stream(
                "POST",
                "/process.Process/Start",
                content=envelope({"process": process, "tag": tag, "stdin": False}),
                headers=headers,
                timeout=httpx.Timeout(_CALL_SECONDS, read=_SILENCE_SECONDS),
            ) as response:
                await _check(response)
                yield _events(response.aiter_raw())

    async def kill(self, target: Target, tag: str) -> None:
        """End the process with this tag and its children. One that has ended is no error."""
        body = {"process": {"tag": tag}, "signal": "SIGNAL_SIGKILL"}
        try:
            await self._http.post("/process.Process/SendSignal", json=body, headers=target.headers(), timeout=5)
        except httpx.TransportError as error:
            raise _broken(error) from None

    async def read(self, target: Target, path: str, *, offset: int, length: int) -> FilePart:
        """At most `length` bytes of a file, from `offset` on.

        Raises:
            AgentError: there is no such file, or the user may not read it.
        """
        headers = {**target.headers(), "Accept-Encoding": "identity", "Range": f"bytes={offset}-{offset + length - 1}"}
        with _told():
            async with self._http.stream("GET", "/files", params={"path": path}, headers=headers) as response:
                if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return FilePart(b"", _whole_size(response))
                await _check(response, ok=(200, 206))
                if response.status_code == httpx.codes.PARTIAL_CONTENT:
                    return FilePart(await _at_most(response, length), _whole_size(response))
                # No ranges for this file (those of /proc): skip by hand.
                return FilePart((await _at_most(response, offset + length))[offset:], None)

    async def write(self, target: Target, path: str, data: bytes) -> None:
        """Create or replace a file; missing directories are made."""
        headers = {**target.headers(), "Content-Type": "application/octet-stream"}
        with _told():
            response = await self._http.post("/files", params={"path": path}, content=data, headers=headers)
            await _check(response)

    async def list_directory(self, target: Target, path: str, *, depth: int) -> list[dict[str, Any]]:
        """Entries of a directory as the agent describes them."""
        with _told():
            response = await self._http.post(
                "/filesystem.Filesystem/ListDir", json={"path": path, "depth": depth}, headers=target.headers()
            )
            await _check(response)
        entries: list[dict[str, Any]] = response.json().get("entries", [])
        return entries

    @asynccontextmanager
    async def json_lines(
        self, target: Target, port: int, path: str, body: dict[str, Any]
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """POST to another server of the sandbox; the context's value are the objects of its answer, one a line.

        There is no limit on how long the answer takes.

        Raises:
            AgentError: nothing listens there, the server refused, or the connection broke.
        """
        with _told():
            async with self._http.stream(
                "POST", path, json=body, headers=target.headers(port), timeout=httpx.Timeout(_CALL_SECONDS, read=None)
            ) as response:
                await _check(response)
                yield _objects(response.aiter_lines())


async def _objects(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        yield json.loads(line)


async def messages(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Split a Connect stream into its messages.

    Raises:
        StreamError: the stream ended with an error.
    """
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= 5:
            flags, length = struct.unpack_from(">BI", buffer)
            if len(buffer) < 5 + length:
                break
            message = json.loads(buffer[5 : 5 + length] or b"{}")
            del buffer[: 5 + length]
            if flags & END_STREAM:
                if "error" in message:
                    raise StreamError(str(message["error"].get("message") or message["error"].get("code")))
                return
            yield message


def envelope(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 0, len(data)) + data


def error_text(response: httpx.Response) -> str:
    """The message of an error answer that has been read."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        plain = response.headers.get("content-type", "").startswith("text/plain")
        return response.text[:1000] if plain else f"the sandbox answered {response.status_code}"


class _told:
    """Turn what can go wrong between here and the agent into `AgentError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.TransportError):
            raise _broken(error) from None
        if isinstance(error, StreamError):
            raise AgentError(str(error)) from None


def _broken(error: httpx.TransportError) -> AgentError:
    return AgentError(f"the connection to the sandbox broke: {error or type(error).__name__}")


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    async for message in messages(chunks):
        yield message.get("event", {})


async def _check(response: httpx.Response, *, ok: tuple[int, ...] = (200,)) -> None:
    if response.status_code not in ok:
        await response.aread()
        raise AgentError(error_text(response))


async def _at_most(response: httpx.Response, length: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) >= length:
            break
    return bytes(data[:length])


def _whole_size(response: httpx.Response) -> int | None:
    """Of `Content-Range: bytes 0-9/100`, the 100."""
    size = response.headers.get("content-range", "").rpartition("/")[2]
    return int(size) if size.isdigit() else None
