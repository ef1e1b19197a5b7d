"""The container runtime: where KVM is not, every machine is an OCI container in its own user namespace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from emberbox.linux import processes
from emberbox.linux.processes import ProcessId
from emberbox.runtime.base import Capabilities, MachineSpec, Saved
from emberbox.runtime.container import bundle, cgroups
from emberbox.runtime.container.machine import NAME, Container, end_container
from emberbox.runtime.container.oci import OciRuntime
from emberbox.runtime.container.root import IdMaps, Layers, Root
from emberbox.runtime.errors import RuntimeFailure, SavedDamaged
from emberbox.settings import Settings
from emberbox.threads import to_thread_whole

log = structlog.get_logger("emberbox.runtime")

_RANGES = 0x4000
"""Id ranges above `settings.id_range_start`, one a slot of a /16."""


class ContainerRuntime:
    """Starts and finds containers. Everything it makes on the host is named by `settings.instance`.

    /run/<instance>/layers/<digest>     a layer, mounted
    /run/<instance>/machines/<id>       a machine's mounts (root.py)
    /run/<instance>/oci                 the OCI runtime's records
    <every cgroup hierarchy>/<instance>/<id>
    """

    name = NAME
    parts = ""
    capabilities = Capabilities(
        memory_snapshots=False,
        live_limits=True,
        isolation="container in its own user namespace, sharing the host's kernel",
    )

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._directory = Path("/run") / settings.instance
        self._machines = self._directory / "machines"
        self._layers = Layers(self._directory / "layers")
        self._id_maps = IdMaps()
        self._oci = OciRuntime(settings.runc, self._directory / "oci", time_scale=settings.time_scale)

    # ---- the protocol

    async def start(self, spec: MachineSpec) -> Container:
        root, cgroup = self._root(spec.machine_id), self._cgroup(spec.machine_id)
        process: ProcessId | None = None
        try:
            first_id = self._first_id(spec)
            places = await to_thread_whole(self._make_root, root, spec, first_id)
            config = bundle.configuration(spec, places, first_id, swap_accounting=cgroup.swap_accounting)
            await to_thread_whole(bundle.write, spec.directory, config)
            with _closing(root.open_log()) as output:
                pid = await self._oci.start(spec.machine_id, spec.directory, output)
            process = processes.identify(pid)
            if process is None:
                raise RuntimeFailure(f"the machine's first process ended at once: {_tail(root.upper / 'agent.log')}")
            await to_thread_whole(root.let_go)
            machine = Container(spec, process, root, cgroup, self._oci)
            if spec.limits.rates.limit_disk:
                await machine.set_rates(spec.limits.rates)
        except BaseException as error:
            await asyncio.shield(end_container(spec.machine_id, process, root, cgroup, self._oci))
            if isinstance(error, OSError):
                raise RuntimeFailure(f"the container could not be prepared: {error}") from error
            raise
        return machine

    async def restore(self, spec: MachineSpec, saved: Saved) -> Container:
        """A cold start from the saved files: containers have no saved memory."""
        if saved.runtime != NAME:
            raise SavedDamaged(f"a machine saved by the '{saved.runtime}' runtime cannot be started as a container")
        return await self.start(spec)

    async def adopt(self, spec: MachineSpec, record: dict[str, Any]) -> Container | None:
        root, cgroup = self._root(spec.machine_id), self._cgroup(spec.machine_id)
        process = ProcessId(int(record["pid"]), int(record["started"]))
        if not processes.is_alive(process):
            await end_container(spec.machine_id, None, root, cgroup, self._oci)
            return None
        machine = Container(spec, process, root, cgroup, self._oci)
        await machine.recover()
        return machine

    async def sweep(self, keep: frozenset[str]) -> list[str]:
        found = await asyncio.to_thread(self._left_behind)
        removed = []
        for machine_id in sorted(found - keep):
            try:
                await end_container(machine_id, None, self._root(machine_id), self._cgroup(machine_id), self._oci)
            except (RuntimeFailure, OSError) as error:  # one that hangs in the kernel; the others work without it
                log.error("container.not_removed", machine_id=machine_id, reason=str(error))
            else:
                removed.append(f"container {machine_id}")
        await asyncio.to_thread(self._layers.forget_unused)
        return removed

    async def forget_layers(self) -> None:
        await asyncio.to_thread(self._layers.forget_unused)

    async def close(self) -> None:
        """Let go of what machines do not need: mounted layers, id maps. Machines go on."""
        await asyncio.to_thread(self._close)

    # ---- parts

    def _root(self, machine_id: str) -> Root:
        return Root(self._machines / machine_id)

    def _cgroup(self, machine_id: str) -> cgroups.Cgroup:
        return cgroups.cgroup(f"/{self._settings.instance}/{machine_id}")

    def _first_id(self, spec: MachineSpec) -> int:
        """Host id of root inside. A slot belongs to one machine at a time, and so does the range of its address."""
        number = (int(spec.slot.address) >> 2) % _RANGES
        return self._settings.id_range_start + number * bundle.ID_COUNT

    def _make_root(self, root: Root, spec: MachineSpec, first_id: int) -> bundle.Places:
        # Looked up through by the container's first process, which is not root; listed by root alone.
        for directory in (self._directory, self._machines):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        layers = [self._layers.mount(layer) for layer in spec.layers]
        agent = agent_path(self._settings)
        root.make(spec.upper, layers, agent, first_id, self._id_maps.of(first_id))
        etc = root.write_etc(spec.hostname, spec.dns_servers or (spec.slot.host_address,))
        return bundle.Places(
            rootfs=root.rootfs,
            agent=root.agent,
            etc=etc,
            cgroup=f"/{self._settings.instance}/{spec.machine_id}",
        )

    def _left_behind(self) -> set[str]:
        found = set(self._oci.known()) | set(cgroups.children(f"/{self._settings.instance}"))
        if self._machines.is_dir():
            found.update(path.name for path in self._machines.iterdir())
        return found

    def _close(self) -> None:
        self._layers.close()
        self._id_maps.close()
        if self._left_behind():
            return
        shutil.rmtree(self._directory, ignore_errors=True)
        cgroups.cgroup(f"/{self._settings.instance}").remove()


def agent_path(settings: Settings) -> Path:
    """emberd: the configured one, the package's, or the one built in a checkout.

    Raises:
        RuntimeFailure: there is none.
    """
    package = Path(__file__).resolve().parents[2]
    candidates = (package / "bin" / "emberd", package.parents[1] / "agent" / "build" / "emberd")
    for path in (settings.agent_path,) if settings.agent_path else candidates:
        if path.is_file():
            return path
    raise RuntimeFailure(f"the agent is missing: {settings.agent_path or candidates[1]}; build it with `make agent`")


@contextlib.contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:  # root inside may have made it large
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            return file.read(2000).decode(errors="replace").strip()[-500:] or "it wrote nothing"
    except OSError:
        return "its output is gone"
