"""A real node process with the container runtime, on an instance of its own.

`NodeProcess` can be killed and started again; `Sandbox.run` runs a command inside through the agent.
"""

from __future__ import annotations

import asyncio
import base64
import glob
import json
import os
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from emberbox.images.base import build_base
from emberbox.settings import Settings
from emberbox.wire import node_pb2 as wire
from emberbox.wire import node_pb2_grpc
from tests.support.loops import backing_files
from tests.support.networks import NODES, Claim
from tests.support.scale import TIME_SCALE

TOKEN = "token-of-the-tests"


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Output:
    code: int
    text: str


async def run(address: str, command: str, *, user: str = "user", token: str = TOKEN, timeout: float = 180) -> Output:
    """Run a shell command inside, the way a client does."""
    body = json.dumps({"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command]}, "stdin": False}).encode()
    headers = {
        "Content-Type": "application/connect+json",
        "Connect-Protocol-Version": "1",
        "X-Access-Token": token,
        "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
    }
    async with httpx.AsyncClient(timeout=timeout, trust_env=False) as client:
        url = f"http://{address}:49983/process.Process/Start"
        answer = await client.post(url, content=struct.pack("!BI", 0, len(body)) + body, headers=headers)
    assert answer.status_code == 200, answer.text
    text, code, position = b"", -1, 0
    while position < len(answer.content):
        _, size = struct.unpack_from("!BI", answer.content, position)
        message = json.loads(answer.content[position + 5 : position + 5 + size] or b"{}")
        position += 5 + size
        assert "error" not in message, message
        event = message.get("event", {})
        data = event.get("data", {})
        text += b"".join(base64.b64decode(data.get(name, "")) for name in ("stdout", "stderr"))
        if "end" in event:
            code = event["end"].get("exitCode", 0)
    return Output(code, text.decode(errors="replace").strip())


class NodeProcess:
    """`python -m emberbox node` in a directory of its own. Enter it, use it, and it removes everything."""

    def __init__(self, **changes: Any) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="eb-node-"))
        self._claim = Claim(NODES)
        self.settings = Settings(
            data_dir=self.data,
            instance_name="ebn" + secrets.token_hex(2),
            slot_network=self._claim.network,
            runtime="container",
            inherit_host_network=True,
            id_range_start=1_400_000_000,
            slots_ready=2,
            time_scale=TIME_SCALE,
            log_format="json",
            **changes,
        )
        self.image = wire.Image()
        self.log = self.data / "node.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.aio.Channel | None = None
        self.stub: Any = None

    async def __aenter__(self) -> NodeProcess:
        built = await build_base(self.settings.node_dir / "layers", self.settings, lambda _stage, _fraction: None)
        self.image = wire.Image(
            build_id="base", layers=built.layers, env_vars=built.env, default_user="user", default_workdir="/home/user"
        )
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        state = await self.state()
        for machine in state:
            if machine.state != wire.MACHINE_STATE_ENDED:
                await self.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id))
        await self.stop()
        self._claim.release()
        shutil.rmtree(self.data)

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a node process in this directory, its output in `log`."""
        environment = {
            **os.environ,
            "EMBERBOX_DATA_DIR": str(self.data),
            "EMBERBOX_INSTANCE_NAME": self.settings.instance,
            "EMBERBOX_SLOT_NETWORK": str(self.settings.slot_network),
            "EMBERBOX_RUNTIME": "container",
            "EMBERBOX_INHERIT_HOST_NETWORK": "true",
            "EMBERBOX_ID_RANGE_START": str(self.settings.id_range_start),
            "EMBERBOX_SLOTS_READY": str(self.settings.slots_ready),
            "EMBERBOX_WARM_MIN": str(self.settings.warm_min),
            "EMBERBOX_WARM_MAX": str(self.settings.warm_max),
            "EMBERBOX_INSECURE_REGISTRIES": json.dumps(self.settings.insecure_registries),
            "EMBERBOX_REGISTRY_MIRRORS": json.dumps(self.settings.registry_mirrors),
            "EMBERBOX_IMAGE_MAX_MB": str(self.settings.image_max_mb),
            "EMBERBOX_IMAGE_MAX_COMPRESSED_MB": str(self.settings.image_max_compressed_mb),
            "EMBERBOX_BUILD_CACHE_MAX_MB": str(self.settings.build_cache_max_mb),
            "EMBERBOX_BUILD_SECONDS": str(self.settings.build_seconds),
            "EMBERBOX_READY_SECONDS": str(self.settings.ready_seconds),
            "EMBERBOX_TIME_SCALE": str(self.settings.time_scale),
            "EMBERBOX_LOG_FORMAT": "json",
            "EMBERBOX_LOG_LEVEL": "debug",
        }
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "emberbox", "node"], env=environment, stdout=log, stderr=log
            )

    async def start(self) -> None:
        self._process = self.spawn()
        self._channel = grpc.aio.insecure_channel(self.settings.node_target)
        self.stub = node_pb2_grpc.NodeStub(self._channel)
        deadline = time.monotonic() + 180
        while True:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                await self.stub.Describe(wire.DescribeRequest(), timeout=2)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)
            else:
                return

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def kill_process(self) -> None:
        """kill -9: the process gets no chance to clean up."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        assert await self._end(signal.SIGTERM) == 0, self.log.read_text()[-4000:]

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        assert self._channel is not None
        await self._channel.close()
        self._process.send_signal(number)
        return await asyncio.to_thread(self._process.wait, 180)

    async def create(self, **changes: Any) -> wire.MachineStatus:
        """Start a sandbox of the base template."""
        values: dict[str, Any] = {
            "sandbox_id": "i" + secrets.token_hex(9),
            "template_id": "base",
            "team_id": "team",
            "image": self.image,
            "cpu_count": 1,
            "memory_mb": 256,
            "disk_size_mb": 1024,
            "access_token": TOKEN,
            "network": wire.Network(allow_internet=True),
            "deadline_unix_ms": now_ms() + 1_800_000,
            "on_timeout": wire.TIMEOUT_ACTION_KILL,
        }
        return await self.stub.Create(wire.CreateRequest(**(values | changes)), timeout=300)

    async def state(self) -> list[wire.MachineStatus]:
        watch = self.stub.Watch(wire.WatchRequest(), timeout=120)
        event = await watch.read()
        watch.cancel()
        return list(event.state.machines)

    async def event(self, watch: Any, sandbox_id: str) -> wire.MachineStatus:
        """The next change of a sandbox that a stream tells."""
        while True:
            event = await watch.read()
            if event.WhichOneof("event") == "changed" and event.changed.sandbox_id == sandbox_id:
                return event.changed

    async def until(self, check: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline, "it did not become true in time"
            await asyncio.sleep(0.02)

    def container_pid(self, address: str) -> int:
        """Host pid of the first process of the machine at an address, from the node's record."""
        for path in (self.settings.node_dir / "records").glob("*.json"):
            record = json.loads(path.read_text())
            facts = record["machine"]
            if facts and str(self.settings.slot_network[4 * facts["slot_index"] + 2]) == address:
                return int(facts["facts"]["pid"])
        raise AssertionError(f"no machine at {address}")

    def traces(self) -> list[str]:
        """Everything on the host that belongs to machines of this instance, waiting ones included."""
        tag = self.settings.instance
        found = [f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if tag in line]
        shared = (f"/run/{tag}/layers", "/run/netns/")
        found = [line for line in found if not any(part in line for part in shared)]
        # One hierarchy on v2, one for each controller on v1. Unlike `Path.glob`, this passes over what goes meanwhile.
        for pattern in (f"/sys/fs/cgroup/*/{tag}/*/", f"/sys/fs/cgroup/{tag}/*/"):
            found += [f"cgroup {path}" for path in glob.glob(pattern)]
        for name in ("machines", "uppers", "saved", "records", "snapshots"):
            found += [f"{name}/{path.name}" for path in (self.settings.node_dir / name).glob("*")]
        found += [f"loop {device}" for device, file in backing_files() if str(self.data / "node" / "uppers") in file]
        return sorted(found)

    def host_traces(self) -> list[str]:
        """What is left on the host once the node stopped and nothing runs."""
        tag = self.settings.instance
        found = self.traces()
        found += [f"netns {path.name}" for path in Path("/run/netns").glob(f"{tag}-*")]
        found += [f"link {path.name}" for path in Path("/sys/class/net").glob(f"{tag}-*")]
        found += [f"folder {path}" for path in Path("/run").glob(tag)]
        found += [f"cgroup {path}" for where in ("*/", "") for path in glob.glob(f"/sys/fs/cgroup/{where}{tag}")]
        tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True).stdout
        found += [f"table {line}" for line in tables.splitlines() if tag in line]
        return found
