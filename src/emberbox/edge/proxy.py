"""The HAProxy process: started, adopted, watched, reloaded and stopped.

It runs in a session of its own and outlives the process that started it, so that a killed edge cuts nobody off. The
next edge finds it by the master's socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
from pathlib import Path

import structlog

from emberbox.edge.admin import Admin
from emberbox.edge.config import Paths
from emberbox.edge.errors import AdminFailed, ProxyFailed

log = structlog.get_logger()

_POLL_SECONDS = 0.02
_STOP_SECONDS = 5.0


class Proxy:
    """One HAProxy, as master and worker."""

    def __init__(self, paths: Paths, admin: Admin, *, binary: str = "haproxy", start_seconds: float = 10.0) -> None:
        self._paths = paths
        self._admin = admin
        self._binary = binary
        self._start_seconds = start_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._exited = asyncio.Event()
        self._exited.set()

    @property
    def pid(self) -> int | None:
        """Of the master."""
        return self._pid

    @property
    def running(self) -> bool:
        return not self._exited.is_set()

    async def wait_exited(self) -> None:
        await self._exited.wait()

    async def adopt(self) -> bool:
        """Take over the HAProxy that an edge before this one left. False when there is none that answers."""
        try:
            master = (await self._admin.workers()).master
            await self._admin.worker_pid()
        except AdminFailed:
            await self._end_leftover()
            return False
        return self._watch(master)

    async def start(self) -> None:
        """Start HAProxy and wait until it serves.

        Raises:
            ProxyFailed: it is not installed, or gave up; its own messages are on standard error.
        """
        command = [
            self._binary,
            "-W",
            "-db",
            "-S",
            f"{self._paths.master_socket},mode,600",
            "-f",
            str(self._paths.config),
        ]
        try:
            self._child = await asyncio.to_thread(
                subprocess.Popen, command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except FileNotFoundError:
            raise ProxyFailed(f"{self._binary} is not installed: install the package haproxy (2.6 or newer)") from None
        except OSError as error:
            raise ProxyFailed(f"{self._binary} cannot be started: {error}") from None
        self._watch(self._child.pid)
        write_text(self._paths.pid, f"{self._child.pid}\n")
        try:
            await self._wait_serving(instead_of=None)
        except ProxyFailed:
            await self.stop()
            raise

    async def reload(self) -> None:
        """Let a new worker take over with the present configuration; the old one finishes what it has.

        Raises:
            ProxyFailed: HAProxy refuses the configuration; the old worker goes on.
        """
        await self.check(self._paths.config)
        before = await self._admin.worker_pid()
        await self._admin.reload()
        await self._wait_serving(instead_of=before)

    async def check(self, config: Path) -> None:
        """Ask HAProxy whether it could load a configuration."""
        process = await asyncio.create_subprocess_exec(
            self._binary, "-c", "-f", str(config), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(self._start_seconds):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ProxyFailed(f"HAProxy did not check its configuration in {self._start_seconds:g} s") from None
        if process.returncode != 0:
            raise ProxyFailed(f"HAProxy refuses its configuration:\n{output.decode(errors='replace')}")

    async def stop(self) -> None:
        """End HAProxy and every connection through it. Nothing happens when it is not running."""
        if self._pid is not None and self.running:
            _signal(self._pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._exited.wait()
            except TimeoutError:
                _signal(self._pid, signal.SIGKILL)  # its workers end with it
                await self._exited.wait()
        for path in (self._paths.pid, self._paths.admin_socket, self._paths.master_socket):
            path.unlink(missing_ok=True)

    def _watch(self, pid: int) -> bool:
        try:
            descriptor = os.pidfd_open(pid)
        except OSError:
            return False
        loop = asyncio.get_running_loop()
        self._pid = pid
        self._exited.clear()

        def on_exit() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            if self._child is not None and self._child.pid == pid:
                self._child.poll()  # takes the zombie away
            self._exited.set()

        loop.add_reader(descriptor, on_exit)
        return True

    async def _wait_serving(self, *, instead_of: int | None) -> None:
        error = "no answer yet"
        try:
            async with asyncio.timeout(self._start_seconds):
                while self.running:
                    try:
                        if (
                            await self._admin.worker_pid() != instead_of
                            and (await self._admin.workers()).master == self._pid
                        ):
                            return
                    except AdminFailed as failed:
                        error = str(failed)
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise ProxyFailed(f"HAProxy does not serve after {self._start_seconds:g} s: {error}") from None
        raise ProxyFailed("HAProxy gave up while starting; its messages above say why")

    async def _end_leftover(self) -> None:
        """End an HAProxy of this edge that runs but does not answer."""
        pid = _leftover(self._paths)
        if pid is not None:
            log.warning("edge.haproxy_does_not_answer", pid=pid)
            if self._watch(pid):
                _signal(pid, signal.SIGKILL)
                await self._exited.wait()


def end_leftover(paths: Paths) -> bool:
    """End the HAProxy that a killed edge left behind, when no other edge will take it over. True when there was one.

    Blocks until it has let go of its ports.
    """
    pid = _leftover(paths)
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(_STOP_SECONDS * 1000)
        finally:
            os.close(descriptor)
    return True


def _leftover(paths: Paths) -> int | None:
    """The process in the pid file, if it still is the HAProxy of this edge."""
    try:
        pid = int(paths.pid.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(paths.config) in words else None


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file in one step."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
    os.replace(fresh, path)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
