"""Routes, and the table of them that outlives every process.

The table is one map file, a line a sandbox, that HAProxy reads when it starts:

    i0abc 198.18.0.2|lanes_3|l35
    i1def 198.18.0.6|lanes_4|l36|<sha256 of the traffic token>|t0|443,8443|app.local:${PORT}|

All of a route is one value, so that it changes in one step: no request sees a new address with an old token.

A **lane** is a HAProxy server entry that one sandbox has for itself as long as its route lives. Sessions and idle
connections belong to a server entry, so ending a sandbox's sessions is one command, whatever else the edge is doing,
and no connection that was opened for one sandbox is used for another.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from emberbox.edge.errors import BadRoute

GROUPS = 32
"""Backends that the lanes are spread over: HAProxy finds a server by walking its backend's list."""

_SANDBOX_ID = re.compile(r"[a-z0-9]{1,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MASK = re.compile(r"[A-Za-z0-9.$(){}\[\]:_-]{1,255}")


@dataclass(frozen=True)
class Route:
    """Where a sandbox is, and what the edge must know to let requests through.

    Raises:
        BadRoute: a field does not have its form.
    """

    sandbox_id: str
    address: IPv4Address
    traffic_token_sha256: str = ""
    """Hex. Empty: public traffic is allowed."""
    mask_request_host: str = ""
    """The Host that the machine sees; `${PORT}` stands for the port. Empty: the Host goes through as it came."""
    https_ports: tuple[int, ...] = ()
    """Ports that speak TLS inside the machine."""

    def __post_init__(self) -> None:
        if not _SANDBOX_ID.fullmatch(self.sandbox_id):
            raise BadRoute(f"sandbox id {self.sandbox_id!r} is not 1 to 64 characters of [a-z0-9]")
        if self.traffic_token_sha256 and not _SHA256.fullmatch(self.traffic_token_sha256):
            raise BadRoute(f"{self.sandbox_id}: traffic_token_sha256 is not 64 hex digits")
        if self.mask_request_host and not _MASK.fullmatch(self.mask_request_host):
            raise BadRoute(f"{self.sandbox_id}: mask_request_host {self.mask_request_host!r} is not a host name")
        for port in self.https_ports:
            if not 1 <= port <= 65535:
                raise BadRoute(f"{self.sandbox_id}: https port {port} is not between 1 and 65535")

    @classmethod
    def parse(
        cls, sandbox_id: str, address: str, token_sha256: str = "", mask: str = "", https_ports: Iterable[int] = ()
    ) -> Route:
        """Make a route of values that came over a wire."""
        try:
            parsed = IPv4Address(address)
        except AddressValueError as error:
            raise BadRoute(f"{sandbox_id}: address {address!r} is not an IPv4 address: {error}") from None
        return cls(sandbox_id, parsed, token_sha256.lower(), mask, tuple(https_ports))


@dataclass(frozen=True)
class Lane:
    """A HAProxy server entry, by number. `tls` lanes speak TLS to the machine."""

    number: int
    tls: bool = False

    @property
    def backend(self) -> str:
        return "tls_lanes" if self.tls else f"lanes_{self.number % GROUPS}"

    @property
    def server(self) -> str:
        return f"{'t' if self.tls else 'l'}{self.number}"

    @classmethod
    def named(cls, server: str) -> Lane:
        return cls(int(server[1:]), tls=server.startswith("t"))


@dataclass(frozen=True)
class Placed:
    """A route and the lanes it has."""

    route: Route
    lane: Lane
    tls_lane: Lane | None = None

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return (self.lane,) if self.tls_lane is None else (self.lane, self.tls_lane)

    @property
    def value(self) -> str:
        """The value in the map; the configuration and the Lua code read its fields.

        What most routes do not have is left away, so that their requests need not look for it.
        """
        route = self.route
        first = f"{route.address}|{self.lane.backend}|{self.lane.server}"
        more = (
            route.traffic_token_sha256,
            self.tls_lane.server if self.tls_lane else "",
            ",".join(map(str, route.https_ports)),
            route.mask_request_host,
        )
        return "|".join((first, *more, "")) if any(more) else first

    @classmethod
    def parse(cls, sandbox_id: str, value: str) -> Placed:
        """Read a line of the map back.

        Raises:
            BadRoute: the line was not written by this version of the table.
        """
        try:
            address, _, server, token, tls_server, ports, mask, *_ = (*value.split("|"), "", "", "", "")
            return cls(
                Route.parse(sandbox_id, address, token, mask, [int(port) for port in ports.split(",") if port]),
                Lane.named(server),
                Lane.named(tls_server) if tls_server else None,
            )
        except ValueError as error:
            raise BadRoute(f"{sandbox_id}: cannot read {value!r}: {error}") from None


class LanePool:
    """Numbers of lanes. The one that has been free for longest is taken first.

    A lane that has just been given back may still have idle connections; they are gone long before its turn comes.
    """

    def __init__(self, capacity: int, *, tls: bool = False) -> None:
        self.tls = tls
        self.capacity = capacity
        self._free: deque[int] = deque(range(capacity))
        self._taken: set[int] = set()

    def take(self) -> Lane:
        """Take a lane. When none is free the pool doubles: `capacity` grows, and HAProxy must be reloaded."""
        if not self._free:
            self._free.extend(range(self.capacity, self.capacity * 2))
            self.capacity *= 2
        number = self._free.popleft()
        self._taken.add(number)
        return Lane(number, self.tls)

    def claim(self, lane: Lane) -> bool:
        """Take a given lane, as recorded before a restart. False when it is taken already."""
        while lane.number >= self.capacity:
            self._free.extend(range(self.capacity, self.capacity * 2))
            self.capacity *= 2
        if lane.number in self._taken:
            return False
        self._taken.add(lane.number)
        self._free.remove(lane.number)
        return True

    def give_back(self, lane: Lane) -> None:
        self._taken.remove(lane.number)
        self._free.append(lane.number)


class RouteTable:
    """Every route, in memory and in the map file."""

    def __init__(self, path: Path, *, lanes: int, tls_lanes: int) -> None:
        self.path = path
        self._placed: dict[str, Placed] = {}
        self._lines: dict[str, str] = {}
        self._lanes = LanePool(lanes)
        self._tls_lanes = LanePool(tls_lanes, tls=True)

    def __len__(self) -> int:
        return len(self._placed)

    def __iter__(self) -> Iterator[Placed]:
        return iter(self._placed.values())

    def get(self, sandbox_id: str) -> Placed | None:
        return self._placed.get(sandbox_id)

    @property
    def capacity(self) -> tuple[int, int]:
        """How many lanes and TLS lanes HAProxy must have."""
        return self._lanes.capacity, self._tls_lanes.capacity

    def load(self) -> list[str]:
        """Read the map file, where there is one. Returns what could not be read, a sentence a line."""
        refused = []
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            text = ""
        for line in text.splitlines():
            sandbox_id, _, value = line.partition(" ")
            try:
                placed = Placed.parse(sandbox_id, value)
            except BadRoute as error:
                refused.append(str(error))
                continue
            if sandbox_id in self._placed or not self._claim(placed):
                refused.append(f"{sandbox_id}: the line or its lane is there twice")
                continue
            self._keep(placed)
        return refused

    def put(self, route: Route) -> tuple[Placed, Placed | None]:
        """Add or change a route. Returns it, and the one before where its lanes are now free.

        A route that moves to another address gets other lanes, so that what still runs on the old ones can be ended
        without touching what starts on the new ones.
        """
        before = self._placed.get(route.sandbox_id)
        if before is not None and before.route.address == route.address:
            keeps_tls = bool(before.tls_lane) == bool(route.https_ports)
            if keeps_tls:
                placed = Placed(route, before.lane, before.tls_lane)
                self._keep(placed)
                return placed, None
        placed = Placed(route, self._lanes.take(), self._tls_lanes.take() if route.https_ports else None)
        self._keep(placed)
        if before is not None:
            self._give_back(before)
        return placed, before

    def drop(self, sandbox_id: str) -> Placed | None:
        """Take a route away. Returns it, or None when there was none."""
        placed = self._placed.pop(sandbox_id, None)
        if placed is not None:
            del self._lines[sandbox_id]
            self._give_back(placed)
        return placed

    def save(self) -> None:
        """Write the map file in one step: a reader finds the table before or after, never half of one.

        Not synced to the disk: after a power cut there are no machines to route to.
        """
        fresh = self.path.with_suffix(".new")
        fresh.write_text("".join(self._lines.values()))
        os.replace(fresh, self.path)

    def _keep(self, placed: Placed) -> None:
        self._placed[placed.route.sandbox_id] = placed
        self._lines[placed.route.sandbox_id] = f"{placed.route.sandbox_id} {placed.value}\n"

    def _claim(self, placed: Placed) -> bool:
        if not self._lanes.claim(placed.lane):
            return False
        if placed.tls_lane is not None and not self._tls_lanes.claim(placed.tls_lane):
            self._lanes.give_back(placed.lane)
            return False
        return True

    def _give_back(self, placed: Placed) -> None:
        self._lanes.give_back(placed.lane)
        if placed.tls_lane is not None:
            self._tls_lanes.give_back(placed.tls_lane)
