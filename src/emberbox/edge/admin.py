"""HAProxy's admin sockets: one command, one answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from emberbox.edge.errors import AdminFailed

# HAProxy reads a command with its payload into one buffer (tune.bufsize, 16 KiB at least).
_PAYLOAD_BYTES = 12_000
_NO_KEY = "Key not found."


@dataclass(frozen=True)
class Workers:
    """The processes of one HAProxy: the master's children."""

    master: int
    current: int
    old: tuple[int, ...]
    """Workers from before a reload that still have open connections."""


class Admin:
    """Speaks to the admin socket of the current worker, and to the master's.

    Every method raises `AdminFailed` when there is no answer within `seconds`, or another answer than expected.
    """

    def __init__(self, worker_socket: Path, master_socket: Path, *, seconds: float) -> None:
        self._worker_socket = worker_socket
        self._master_socket = master_socket
        self._seconds = seconds

    async def worker_pid(self) -> int:
        return int(_field(await self._ask(self._worker_socket, "show info"), "Pid"))

    async def workers(self) -> Workers:
        answer = await self._ask(self._master_socket, "show proc")
        found: dict[str, list[int]] = {"master": [], "current": [], "old": []}
        section = "current"
        for line in answer.splitlines():
            if line.startswith("# "):
                section = {"# workers": "current", "# old workers": "old"}.get(line.strip(), "")
            elif (words := line.split())[1:2] == ["master"]:
                found["master"].append(int(words[0]))
            elif words[1:2] == ["worker"] and section:
                found[section].append(int(words[0]))
        if len(found["master"]) != 1 or len(found["current"]) != 1:
            raise AdminFailed(f"HAProxy's master answered 'show proc' with {answer[:500]!r}")
        return Workers(found["master"][0], found["current"][0], tuple(found["old"]))

    async def reload(self) -> None:
        """Start the reload. In newer HAProxy the answer comes when it is done, so it may take long."""
        await self._ask(self._master_socket, "reload")

    async def add_map(self, path: Path, key: str, value: str) -> None:
        """Add an entry that is new."""
        # Taken away first, as `add map` of a key that is there would have it twice.
        answer = await self._ask(self._worker_socket, f"del map {path} {key};add map {path} {key} {value}")
        if answer.strip() not in ("", _NO_KEY):
            raise AdminFailed(f"HAProxy answered 'add map' with {answer.strip()[:200]!r}")

    async def set_map(self, path: Path, key: str, value: str) -> None:
        """Change an entry in place."""
        await self._expect_nothing(f"set map {path} {key} {value}")

    async def del_map(self, path: Path, key: str) -> None:
        """Take an entry away. It may be missing."""
        answer = await self._ask(self._worker_socket, f"del map {path} {key}")
        if answer.strip() not in ("", _NO_KEY):
            raise AdminFailed(f"HAProxy answered 'del map' with {answer.strip()[:200]!r}")

    async def show_map(self, path: Path) -> dict[str, str]:
        entries = {}
        for line in (await self._ask(self._worker_socket, f"show map {path}")).splitlines():
            if len(parts := line.split(" ", 2)) == 3:
                entries[parts[1]] = parts[2]
        return entries

    async def replace_map(self, path: Path, entries: Iterable[tuple[str, str]]) -> None:
        """Replace a whole map in one step."""
        answer = await self._ask(self._worker_socket, f"prepare map {path}")
        if (version := re.search(r"New version created: (\d+)", answer)) is None:
            raise AdminFailed(f"HAProxy answered 'prepare map' with {answer[:200]!r}")
        for payload in _payloads(entries):
            # The payload's last line is followed by an empty one, which ends it.
            await self._expect_nothing(f"add map @{version[1]} {path} <<\n{payload}")
        await self._expect_nothing(f"commit map @{version[1]} {path}")

    async def end_sessions(self, backend: str, server: str) -> None:
        """End every session on one server entry of the current worker."""
        await self._expect_nothing(f"shutdown sessions server {backend}/{server}")

    async def end_old_sessions(self, worker: int, servers: frozenset[str]) -> None:
        """End every session on some server entries of a worker from before a reload.

        Its proxies are disabled, and HAProxy refuses to name their servers, so its sessions are looked through.
        """
        answer = await self._ask(self._master_socket, f"@!{worker} show sess")
        for line in answer.splitlines():
            match = re.match(r"(0x[0-9a-f]+): .* srv=(\S+) ", line)
            if match and match[2] in servers:
                await self._ask(self._master_socket, f"@!{worker} shutdown session {match[1]}")

    async def _expect_nothing(self, command: str) -> None:
        if answer := (await self._ask(self._worker_socket, command)).strip():
            raise AdminFailed(f"HAProxy answered '{command.splitlines()[0]}' with {answer[:200]!r}")

    async def _ask(self, socket: Path, command: str) -> str:
        try:
            async with asyncio.timeout(self._seconds):
                reader, writer = await asyncio.open_unix_connection(socket)
                try:
                    writer.write(command.encode() + b"\n")
                    writer.write_eof()
                    return (await reader.read()).decode(errors="replace")
                finally:
                    writer.close()
        except TimeoutError:
            raise AdminFailed(f"HAProxy did not answer '{command.split(' <<')[0]}' in {self._seconds:g} s") from None
        except OSError as error:
            raise AdminFailed(f"HAProxy's socket {socket} cannot be used: {error}") from None


def _payloads(entries: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Lines of `key value`, cut into pieces that HAProxy can read at once."""
    lines: list[str] = []
    size = 0
    for key, value in entries:
        line = f"{key} {value}\n"
        if size + len(line) > _PAYLOAD_BYTES:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)


def _field(answer: str, name: str) -> str:
    match = re.search(rf"^{name}: (.*)$", answer, re.MULTILINE)
    if match is None:
        raise AdminFailed(f"HAProxy's answer has no field {name}: {answer[:200]!r}")
    return match[1]
