"""A world for the container runtime's tests: slots, disks and runtime of an instance of its own, on the base image.

`World.machine` starts a machine; `Guest.run` runs a command inside through the agent, the way a client does.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from emberbox.images.base import build_base
from emberbox.images.layers import LayerStore
from emberbox.node.disks import Disks
from emberbox.node.slots import Slots
from emberbox.runtime.base import Limits, MachineSpec, Rates, Slot
from emberbox.runtime.container.machine import Container
from emberbox.runtime.container.runtime import ContainerRuntime
from emberbox.settings import Settings
from tests.support.loops import backing_files
from tests.support.networks import WORLDS, Claim

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces, mounts and cgroups")


@dataclass(frozen=True)
class Output:
    code: int
    text: str
    """What the command wrote to both streams."""


@dataclass
class Guest:
    """A started machine and how to run commands in it."""

    machine: Container
    slot: Slot
    directory: Path

    @property
    def spec(self) -> MachineSpec:
        return self.machine.spec

    @property
    def pid(self) -> int:
        """Host pid of the machine's first process."""
        return int(self.machine.record()["pid"])

    async def run(self, command: str, *, user: str = "root", timeout: float = 180) -> Output:
        """Run a shell command inside."""
        # One stream: what comes by two has no order.
        start = {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", f"exec 2>&1\n{command}"], "envs": {}}}
        body = json.dumps(start).encode()
        headers = {
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
        }
        async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
            answer = await client.post(
                f"http://{self.slot.address}:49983/process.Process/Start",
                content=struct.pack("!BI", 0, len(body)) + body,
                headers=headers,
            )
        assert answer.status_code == 200, answer.text
        return _collect(answer.content)


def _collect(stream: bytes) -> Output:
    text, code, position = b"", -1, 0
    while position < len(stream):
        _, size = struct.unpack_from("!BI", stream, position)
        message = json.loads(stream[position + 5 : position + 5 + size] or b"{}")
        position += 5 + size
        assert "error" not in message, message
        event = message.get("event", {})
        data = event.get("data", {})
        text += b"".join(base64.b64decode(data.get(name, "")) for name in ("stdout", "stderr"))
        if "end" in event:
            code = event["end"].get("exitCode", 0)
    return Output(code, text.decode(errors="replace").strip())


class World:
    """One instance's parts. Enter it, use it, and it removes everything."""

    def __init__(self) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="eb-container-"))
        self._claim = Claim(WORLDS)
        self.settings = Settings(
            data_dir=self.data,
            instance_name="ebt" + secrets.token_hex(2),
            slot_network=self._claim.network,
            slots_ready=0,
            inherit_host_network=True,
            id_range_start=1_200_000_000,
        )
        self.disks = Disks(self.settings)
        self.slots = Slots(self.settings)
        self.runtime = ContainerRuntime(self.settings)
        self.layers: tuple[str, ...] = ()
        self.guests: list[Guest] = []

    async def __aenter__(self) -> World:
        built = await build_base(LayerStore(self.settings.node_dir / "layers").directory, self.settings, _quiet)
        self.layers = built.layers
        await self.slots.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for guest in list(self.guests):
            await self.end(guest)
        await self.runtime.sweep(frozenset())
        await self.runtime.close()
        await self.slots.close()
        self._claim.release()
        shutil.rmtree(self.data)

    async def machine(
        self,
        *,
        upper: Path | None = None,
        layers: tuple[str, ...] = (),
        memory_mb: int = 256,
        disk_mb: int = 1024,
        hostname: str = "sandbox",
        rates: Rates | None = None,
    ) -> Guest:
        """Start a machine and wait for its agent."""
        slot = await self.slots.take()
        rates = rates or Rates()
        if rates.network_mbit_per_second:
            await self.slots.shape(slot, rates.network_mbit_per_second)
        machine_id = "m" + secrets.token_hex(6)
        directory = self.settings.node_dir / "machines" / machine_id
        directory.mkdir(parents=True, mode=0o700)
        disk = directory / "upper.ext4"
        if upper is None:
            await self.disks.new_upper(disk, disk_mb)
        else:
            await self.disks.clone(upper, disk)
        spec = MachineSpec(
            machine_id=machine_id,
            directory=directory,
            layers=tuple(self.disks.layer(digest) for digest in layers or self.layers),
            upper=disk,
            slot=slot,
            limits=Limits(cpu_count=1, memory_mb=memory_mb, disk_size_mb=disk_mb, pids=200, rates=rates),
            hostname=hostname,
            control_hash=hashlib.sha256(b"control").hexdigest(),
            dns_servers=(slot.host_address,),
        )
        machine = await self.runtime.start(spec)
        guest = Guest(machine, slot, directory)
        self.guests.append(guest)
        await _until_reachable(guest)
        return guest

    async def end(self, guest: Guest) -> None:
        await guest.machine.destroy()
        await self.slots.give_back(guest.slot)
        shutil.rmtree(guest.directory, ignore_errors=True)
        if guest in self.guests:
            self.guests.remove(guest)

    def traces(self) -> list[str]:
        """Everything on the host that carries this instance's name."""
        tag = self.settings.instance
        found = [f"netns {path.name}" for path in Path("/run/netns").glob(f"{tag}-*")]
        found += [f"link {path.name}" for path in Path("/sys/class/net").glob(f"{tag}-*")]
        found += [f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if tag in line]
        # Unlike `Path.glob`, this passes over what goes meanwhile, as control groups of other tests do.
        for pattern in (f"/sys/fs/cgroup/{tag}*/**/", f"/sys/fs/cgroup/*/{tag}*/**/"):
            found += [f"cgroup {path}" for path in glob.glob(pattern, recursive=True)]
        found += [f"folder {path}" for path in Path("/run").glob(tag)]
        found += [f"loop {device}" for device, file in backing_files() if str(self.data) in file]
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        found += [f"table {line}" for line in tables.splitlines() if tag in line]
        return sorted(found)


async def _until_reachable(guest: Guest) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            _, writer = await asyncio.open_connection(str(guest.slot.address), 49983)
        except OSError:
            assert time.monotonic() < deadline, "the agent did not answer"
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return


def _quiet(_stage: str, _fraction: float) -> None:
    pass


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with World() as entered:
        yield entered
