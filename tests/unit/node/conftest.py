"""A node whose machines are small HTTP servers on loopback addresses: everything real but isolation."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from emberbox.node.errors import DiskFull, LayerMissing, NetworkFailure, NodeFull
from emberbox.node.machines import Seed
from emberbox.node.model import Image, Network, NewSandbox, TimeoutAction, now_ms
from emberbox.node.node import Node
from emberbox.runtime.base import Capabilities, Limits, MachineSpec, Rates, Saved, Slot, Stats
from emberbox.runtime.errors import RuntimeFailure
from emberbox.settings import Settings

LIMITS = Limits(cpu_count=1, memory_mb=128, disk_size_mb=512)
IMAGE = Image(build_id="build1", layers=("aa",), env_vars={"FROM": "template"})


async def until(check: Any, seconds: float = 60.0) -> None:
    """Return as soon as `check` is true; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not check():
            await asyncio.sleep(0.005)


class FakeAgent:
    """Answers the control routes on port 49983 of one loopback address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.inits: list[dict[str, Any]] = []
        self.commands: list[str] = []
        self.told: list[str] = []
        """Routes in order, and what the machine's disk was set to in between."""
        self.refuse_init = False
        self.refuse_freeze = False
        self.refuse_thaws = 0
        self.busy_freeze = False
        """It does not say that it was done, and may do it yet."""
        self.refuse_commands = False
        self.stall_init = asyncio.Event()
        self.stall_init.set()
        self.init_reached = asyncio.Event()
        self.runs = asyncio.Event()
        """Cleared while its machine stands still: who connects waits."""
        self.runs.set()
        self.waiting = 0
        self.entries: list[dict[str, Any]] = []
        self.longest_page = 1000
        self.repeats = False
        """Its log begins anew with every page."""
        self.ready_after = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.address, 49983)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            stood_still = not self.runs.is_set()
            self.waiting += 1
            await self.runs.wait()
            self.waiting -= 1
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            request, *lines = head.split("\r\n")
            method, target, _ = request.split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            if stood_still and reader.at_eof():  # who asked has left meanwhile, and such a machine never hears it
                return
            status, answer = await self._answer(method, target, body)
            writer.write(
                f"HTTP/1.1 {status} X\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n".encode() + answer
            )
            await writer.drain()
        finally:
            writer.close()

    async def _answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        route, _, query = target.partition("?")
        self.told.append(route)
        if route in ("/freeze", "/fsfreeze") and self.refuse_freeze:
            return 500, b"no"
        if route == "/unfreeze" and self.refuse_thaws:
            self.refuse_thaws -= 1
            return 500, b"no"
        if route == "/fsfreeze" and self.busy_freeze:
            return 503, b"not yet"
        if route == "/init":
            self.init_reached.set()
            await self.stall_init.wait()
            if self.refuse_init:
                return 500, b"no"
            self.inits.append(json.loads(body))
            return 204, b""
        if route == "/logs":
            asked = parse_qs(query)
            cursor, limit = int(asked["cursor"][0]), int(asked["limit"][0])
            if limit > self.longest_page:
                return 200, b" " * 300_000
            page = [e for e in self.entries if e["seq"] > cursor or self.repeats][:limit]
            return 200, json.dumps({"entries": page}).encode()
        if route == "/process.Process/Start":
            if self.refuse_commands:
                return 503, b"no processes here"
            command = json.loads(body[5:])["process"]["args"][-1]
            self.commands.append(command)
            code = 0
            if command == "ready" and self.ready_after > 0:
                self.ready_after -= 1
                code = 1
            events = [{"event": {"start": {"pid": 7}}}, {"event": {"end": {"exitCode": code, "exited": True}}}]
            frames = [(0, event) for event in events] + [(2, {})]
            return 200, b"".join(
                bytes([flags]) + len(data := json.dumps(event).encode()).to_bytes(4, "big") + data
                for flags, event in frames
            )
        return 204, b""


class FakeMachine:
    def __init__(self, spec: MachineSpec, runtime: FakeRuntime) -> None:
        self.spec = spec
        self.address = spec.slot.address
        self.agent = FakeAgent(str(spec.slot.address))
        self.frozen = False
        self.ended = asyncio.Event()
        self.reason = ""
        self.destroyed = False
        self.refuse_destroy = False
        self.has_answered = False
        self.lasting: list[bool] = []
        """Of each save."""
        self._runtime = runtime

    def record(self) -> dict[str, Any]:
        return {"id": self.spec.machine_id}

    async def alive(self) -> bool:
        return not self.ended.is_set()

    async def wait(self) -> str:
        await self.ended.wait()
        return self.reason

    def answered(self) -> None:
        self.has_answered = True

    async def set_limits(self, limits: Limits) -> None: ...

    async def set_rates(self, rates: Rates) -> None:
        self.agent.told.append(f"rates {rates.disk_mb_per_second}")
        await self._runtime.passes("rates")

    async def pause(self) -> None:
        await self._runtime.passes("pause")
        self.frozen = True
        self.agent.runs.clear()

    async def resume(self) -> None:
        await self._runtime.passes("resume")
        if self._runtime.fail_resume:
            raise RuntimeFailure(self._runtime.fail_resume)
        self.frozen = False
        self.agent.runs.set()

    async def save(
        self,
        into: Path,
        *,
        memory: bool,
        final: bool = False,
        lasting: bool = True,
        resuming: Callable[[], None] = lambda: None,
    ) -> Saved:
        self.lasting.append(lasting)
        await self._runtime.passes("save")
        if self._runtime.fail_save:
            raise RuntimeFailure(self._runtime.fail_save)
        self.agent.told.append("saved")
        if not self.frozen:
            self.agent.runs.clear()
            resuming()
            await self.resume()
        (into / "upper").write_bytes(self.spec.upper.read_bytes())
        return Saved("fake", into, into / "upper", memory, {"from": self.spec.machine_id})

    async def stats(self) -> Stats:
        return Stats(1.5, 10, 20, 5, 1, 2, 0)

    async def destroy(self) -> None:
        if self.refuse_destroy:
            raise RuntimeFailure("cannot")
        self.destroyed = True
        self._runtime.machines.pop(self.spec.machine_id, None)
        await self.agent.stop()

    def die(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()


class FakeRuntime:
    name = "fake"
    parts = "1"

    def __init__(self, *, memory: bool) -> None:
        self.capabilities = Capabilities(memory_snapshots=memory, live_limits=True, isolation="none")
        self.machines: dict[str, FakeMachine] = {}
        """Survive the node, as real machines do."""
        self.made: list[FakeMachine] = []
        """Every one, in order."""
        self.fail_start = ""
        self.fail_save = ""
        self.fail_adopt = ""
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}
        self.swept: list[str] = []
        self.restored: list[Saved] = []
        self.starts = 0
        self.fail_resume = ""
        self.stall_init = False
        self.refuse_init = False
        self.refuse_commands = False
        self.forgot_layers = False

    def hold(self, point: str) -> asyncio.Event:
        """Make calls stop at `point`; returns the event that says one is there."""
        self.gates[point] = asyncio.Event()
        self.reached[point] = asyncio.Event()
        return self.reached[point]

    async def passes(self, point: str) -> None:
        if point in self.gates:
            self.reached[point].set()
            await self.gates[point].wait()

    async def start(self, spec: MachineSpec) -> FakeMachine:
        await self.passes("start")
        if self.fail_start:
            raise RuntimeFailure(self.fail_start)
        machine = FakeMachine(spec, self)
        if self.stall_init:
            machine.agent.stall_init.clear()
        machine.agent.refuse_init = self.refuse_init
        machine.agent.refuse_commands = self.refuse_commands
        await machine.agent.start()
        self.machines[spec.machine_id] = machine
        self.made.append(machine)
        self.starts += 1
        return machine

    async def restore(self, spec: MachineSpec, saved: Saved) -> FakeMachine:
        assert spec.upper.exists()
        machine = await self.start(spec)
        self.restored.append(saved)
        return machine

    async def adopt(self, spec: MachineSpec, record: dict[str, Any]) -> FakeMachine | None:
        if self.fail_adopt:
            raise RuntimeFailure(self.fail_adopt)
        return self.machines.get(record["id"])

    async def sweep(self, keep: frozenset[str]) -> list[str]:
        gone = [machine_id for machine_id in self.machines if machine_id not in keep]
        for machine_id in gone:
            await self.machines[machine_id].destroy()
        self.swept += gone
        return gone

    async def forget_layers(self) -> None:
        self.forgot_layers = True

    async def close(self) -> None: ...

    def of(self, upper_of: Node, sandbox_id: str) -> FakeMachine:
        hosted = upper_of.machines.sandboxes[sandbox_id].hosted
        assert hosted is not None
        return self.machines[hosted.spec.machine_id]


class FakeSlots:
    """Addresses of 127.0.0.0/8 that only this test uses."""

    def __init__(self, size: int = 200) -> None:
        self._base = (127 << 24) | (random.Random(os.urandom(8)).randrange(1 << 15, 1 << 16) << 8)
        self.size = size
        self.used: set[int] = set()
        self.taken: set[int] = set()
        """Those in use by the node process of now; the sweep leaves them alone, as the real one does."""
        self.policies: dict[int, Network] = {}
        self.applied: list[Network] = []
        self.shaped: dict[int, int] = {}
        self.refuse_policies = False

    async def start(self) -> None:
        self.taken.clear()

    async def take(self) -> Slot:
        for index in range(self.size):
            if index not in self.used:
                return await self.adopt(index)
        raise NodeFull("no slot left")

    def _slot(self, index: int) -> Slot:
        return Slot(index, f"ns{index}", IPv4Address("127.0.0.1"), IPv4Address(self._base + 1 + index))

    async def give_back(self, slot: Slot) -> None:
        self.used.discard(slot.index)
        self.taken.discard(slot.index)
        self.policies.pop(slot.index, None)
        self.shaped.pop(slot.index, None)

    async def adopt(self, index: int) -> Slot:
        self.used.add(index)
        self.taken.add(index)
        return self._slot(index)

    async def apply(self, slot: Slot, policy: Network) -> None:
        if self.refuse_policies:
            raise NetworkFailure("the rules were refused")
        self.policies[slot.index] = policy
        self.applied.append(policy)

    async def shape(self, slot: Slot, mbit_per_second: int) -> None:
        self.shaped[slot.index] = mbit_per_second

    async def sweep(self, keep: frozenset[int]) -> list[str]:
        gone = self.used - keep - self.taken
        self.used -= gone
        return [f"slot {index}" for index in gone]

    async def close(self) -> None: ...


class FakeDisks:
    full = False

    def layer(self, digest: str) -> Path:
        if digest == "missing":
            raise LayerMissing(digest)
        return Path("/layers") / digest

    async def new_upper(self, path: Path, size_mb: int) -> None:
        path.write_bytes(b"blank")

    async def clone(self, source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())

    async def clone_cheaply(self, source: Path, target: Path) -> bool:
        if self.full:
            raise DiskFull("full")
        await self.clone(source, target)
        return True

    async def used_bytes(self, path: Path) -> int:
        return path.stat().st_size

    async def ensure_free(self, bytes: int) -> None: ...


@dataclass
class World:
    """A node process that can be killed and started again; runtime and slots survive it, as the kernel does."""

    directory: Path
    runtime: FakeRuntime
    slots: FakeSlots = field(default_factory=FakeSlots)
    warm_max: int = 0
    max_machines: int = 50
    spares: int = 0
    boot_id: str = "boot1"
    node: Node = field(init=False)
    disks: FakeDisks = field(default_factory=FakeDisks)

    async def start(self) -> Node:
        settings = Settings(
            data_dir=self.directory,
            warm_min=1,
            warm_max=self.warm_max,
            max_machines=self.max_machines,
            spares=self.spares,
        )
        self.node = Node(settings, self.runtime, self.slots, self.disks, boot_id=self.boot_id)  # type: ignore[arg-type]
        await self.node.start()
        return self.node

    async def kill_process(self) -> None:
        """As kill -9 does: nothing is told, nothing is cleaned up."""
        node = self.node
        await node._tasks.close()
        await node.machines.tasks.close()
        await node.pool._tasks.close()
        await node.preparing._tasks.close()
        assert node._lock is not None
        node._lock.release()

    async def create(self, sandbox_id: str = "s1", **changes: Any) -> Any:
        new = self.new(sandbox_id, **changes)
        status = await self.node.machines.create(new, Seed(new.image or IMAGE, new.limits))
        await asyncio.gather(*self.node.preparing._making.values())  # the template's memory, saved in the background
        return status

    def new(self, sandbox_id: str = "s1", **changes: Any) -> NewSandbox:
        values: dict[str, Any] = {
            "sandbox_id": sandbox_id,
            "template_id": "t1",
            "team_id": "team",
            "image": IMAGE,
            "snapshot_id": "",
            "limits": LIMITS,
            "env_vars": {"OWN": "1"},
            "access_token": "token",
            "network": Network(),
            "deadline_ms": now_ms() + 3_600_000,
            "on_timeout": TimeoutAction.KILL,
            "metadata": {},
        }
        return NewSandbox(**(values | changes))

    def left(self) -> dict[str, list[str]]:
        """Everything that belongs to machines and is still there."""
        node = self.node
        files = {
            name: sorted(path.name for path in (node.directory / name).iterdir())
            for name in ("machines", "uppers", "saved", "records", "snapshots")
            if (node.directory / name).exists()
        }
        return {
            name: found
            for name, found in {
                **files,
                "slots": sorted(map(str, self.slots.used)),
                "running": sorted(self.runtime.machines),
                "sandboxes": sorted(node.machines.sandboxes),
            }.items()
            if found
        }


@pytest.fixture(params=[False, True], ids=["no-memory", "memory"])
def any_runtime(request: pytest.FixtureRequest) -> FakeRuntime:
    return FakeRuntime(memory=request.param)


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Makes and starts worlds; ends them, with whatever still runs."""
    worlds: list[World] = []

    async def make(*, memory: bool = False, runtime: FakeRuntime | None = None, **changes: Any) -> World:
        world = World(tmp_path / f"w{len(worlds)}", runtime or FakeRuntime(memory=memory), **changes)
        worlds.append(world)
        await world.start()
        return world

    yield make
    for world in worlds:
        world.runtime.gates.clear()
        await world.node.close()
        for machine in list(world.runtime.machines.values()):
            await machine.destroy()
