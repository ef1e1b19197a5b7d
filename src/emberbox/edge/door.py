"""The door: HAProxy and the route table, kept in step.

The map file is the truth. A change is written there first and then told to HAProxy; whatever dies in between, the file
is what HAProxy reads when it starts, and what a running one is compared with.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable

import structlog

from emberbox.edge import config
from emberbox.edge.admin import Admin
from emberbox.edge.config import Paths
from emberbox.edge.errors import AdminFailed, BadConfiguration, ProxyFailed
from emberbox.edge.proxy import Proxy, write_text
from emberbox.edge.routes import Lane, Placed, Route, RouteTable
from emberbox.settings import Settings

log = structlog.get_logger()

_ADMIN_SECONDS = 3.0
_FIRST_BACKOFF_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 5.0
_CERTIFICATE_SECONDS = 30.0


class Door:
    """The running edge. Changes of routes are made one after the other."""

    def __init__(self, settings: Settings, *, lanes: int = config.LANES, tls_lanes: int = config.TLS_LANES) -> None:
        self._settings = settings
        self.paths = Paths(settings.edge_dir)
        self.table = RouteTable(self.paths.routes, lanes=lanes, tls_lanes=tls_lanes)
        self._admin = Admin(
            self.paths.admin_socket, self.paths.master_socket, seconds=_ADMIN_SECONDS * settings.time_scale
        )
        self.proxy = Proxy(self.paths, self._admin, start_seconds=10.0 * settings.time_scale)
        self._lock = asyncio.Lock()
        self._rendered_for = self.table.capacity
        self._has_old_workers = False
        self._stopping = False
        self._certificate: tuple[int, ...] = ()

    async def open(self) -> None:
        """Serve: take over the HAProxy that is there, or start one.

        Raises:
            ProxyFailed, BadConfiguration: the edge cannot serve, and why.
        """
        async with self._lock:
            self.paths.home.mkdir(parents=True, exist_ok=True)
            for sentence in self.table.load():
                log.warning("edge.route_unreadable", reason=sentence)
            await asyncio.to_thread(self.table.save)
            self._copy_certificate()
            changed = self._write_config()
            if await self.proxy.adopt():
                self._has_old_workers = True
                if changed:
                    await self.proxy.reload()
                await self._compare()
                log.info("edge.adopted", pid=self.proxy.pid, routes=len(self.table), reloaded=changed)
            else:
                await self.proxy.start()
                log.info("edge.serving", pid=self.proxy.pid, routes=len(self.table), url=self._settings.edge_url)

    async def keep(self) -> None:
        """Start HAProxy again whenever it dies, and reload it for a renewed certificate. Ends only by cancellation."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_running())
            tasks.create_task(self._keep_certificate())

    async def close(self) -> None:
        """Stop serving. The routes stay in the map file."""
        async with self._lock:
            self._stopping = True
            await self.proxy.stop()

    async def reload(self) -> None:
        """Take up changed files (certificate, configuration) without cutting a connection."""
        async with self._lock:
            await self._reload()
        log.info("edge.reloaded", pid=self.proxy.pid)

    async def set_route(self, route: Route) -> None:
        """Add or change a route; the next request follows it. Sessions to an address it had before are ended."""
        async with self._lock:
            is_new = self.table.get(route.sandbox_id) is None
            placed, before = self.table.put(route)
            await asyncio.to_thread(self.table.save)
            if self.table.capacity != self._rendered_for:
                await self._reload()
            else:
                await self._tell(placed, is_new=is_new)
            if before is not None:
                await self._end_sessions(before.lanes)

    async def drop_route(self, sandbox_id: str) -> None:
        """Take a route away and end the sandbox's sessions. Nothing happens when there is none."""
        async with self._lock:
            placed = self.table.drop(sandbox_id)
            if placed is None:
                return
            await asyncio.to_thread(self.table.save)
            try:
                await self._admin.del_map(self.paths.routes, sandbox_id)
            except AdminFailed as error:
                await self._recover(error)
            await self._end_sessions(placed.lanes)

    async def replace_routes(self, routes: Iterable[Route]) -> None:
        """Make these the only routes. What stays as it was is not touched."""
        async with self._lock:
            wanted = {route.sandbox_id: route for route in routes}
            freed: list[Lane] = []
            for sandbox_id in [placed.route.sandbox_id for placed in self.table]:
                if sandbox_id not in wanted and (dropped := self.table.drop(sandbox_id)) is not None:
                    freed += dropped.lanes
            for route in wanted.values():
                _, before = self.table.put(route)
                if before is not None:
                    freed += before.lanes
            await asyncio.to_thread(self.table.save)
            if self.table.capacity != self._rendered_for:
                await self._reload()
            else:
                await self._compare()
            await self._end_sessions(freed)

    async def _tell(self, placed: Placed, *, is_new: bool) -> None:
        change = self._admin.add_map if is_new else self._admin.set_map
        try:
            await change(self.paths.routes, placed.route.sandbox_id, placed.value)
        except AdminFailed as error:
            await self._recover(error)

    async def _compare(self) -> None:
        """Make the running map the table's."""
        wanted = {placed.route.sandbox_id: placed.value for placed in self.table}
        try:
            if await self._admin.show_map(self.paths.routes) != wanted:
                await self._admin.replace_map(self.paths.routes, wanted.items())
        except AdminFailed as error:
            await self._recover(error)

    async def _recover(self, error: AdminFailed) -> None:
        """After a failed command: HAProxy is dying, and the next one reads the file; or it must be told everything.

        Raises:
            AdminFailed, ProxyFailed: neither helped.
        """
        log.warning("edge.admin_failed", error=str(error))
        try:
            async with asyncio.timeout(1.0):
                await self.proxy.wait_exited()
        except TimeoutError:
            await self._admin.replace_map(self.paths.routes, [(p.route.sandbox_id, p.value) for p in self.table])
            return
        await self._start_again()

    async def _end_sessions(self, lanes: Iterable[Lane]) -> None:
        lanes = tuple(lanes)
        try:
            for lane in lanes:
                await self._admin.end_sessions(lane.backend, lane.server)
            if lanes and self._has_old_workers:
                old = (await self._admin.workers()).old
                self._has_old_workers = bool(old)
                for worker in old:
                    await self._admin.end_old_sessions(worker, frozenset(lane.server for lane in lanes))
        except AdminFailed as error:
            # A HAProxy that is gone has no sessions; one that stays and does not answer is worth a line.
            log.warning("edge.sessions_not_ended", error=str(error))

    async def _reload(self) -> None:
        self._copy_certificate()
        self._write_config()
        self._has_old_workers = True
        try:
            await self.proxy.reload()
        except AdminFailed as error:
            await self._recover(error)

    async def _keep_running(self) -> None:
        backoff = _FIRST_BACKOFF_SECONDS
        while True:
            await self.proxy.wait_exited()
            async with self._lock:
                if self._stopping:
                    return
                if self.proxy.running:
                    continue
                log.error("edge.haproxy_died")
                try:
                    await self._start_again()
                    backoff = _FIRST_BACKOFF_SECONDS
                    continue
                except ProxyFailed as error:
                    log.error("edge.haproxy_not_started", error=str(error), again_in_seconds=backoff)
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _LONGEST_BACKOFF_SECONDS)

    async def _start_again(self) -> None:
        self._has_old_workers = False
        await self.proxy.start()
        log.info("edge.serving", pid=self.proxy.pid, routes=len(self.table), url=self._settings.edge_url)

    async def _keep_certificate(self) -> None:
        while self._settings.tls_cert is not None:
            await asyncio.sleep(_CERTIFICATE_SECONDS)
            if self._certificate_state() != self._certificate:
                try:
                    await self.reload()
                except (ProxyFailed, AdminFailed, BadConfiguration) as error:
                    log.error("edge.certificate_not_taken", error=str(error))

    def _write_config(self) -> bool:
        """Write the configuration and the Lua code; True when the configuration is another than before."""
        lanes, tls_lanes = self.table.capacity
        text = config.render(self._settings, self.paths, lanes=lanes, tls_lanes=tls_lanes)
        config.write_lua(self.paths)
        self._rendered_for = self.table.capacity
        try:
            if self.paths.config.read_text() == text:
                return False
        except FileNotFoundError:
            pass
        write_text(self.paths.config, text)
        return True

    def _copy_certificate(self) -> None:
        """Put the certificate and its key together, where HAProxy can read them after it was taken over, too.

        Raises:
            BadConfiguration: one of them is not set or cannot be read.
        """
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if (cert is None) != (key is None):
            raise BadConfiguration("TLS needs both a certificate and its key (tls_cert and tls_key)")
        if cert is None or key is None:
            self.paths.certificate.unlink(missing_ok=True)
            return
        state = self._certificate_state()
        try:
            text = f"{cert.read_text().rstrip()}\n{key.read_text().rstrip()}\n"
        except (OSError, UnicodeDecodeError) as error:
            raise BadConfiguration(f"the edge cannot read the TLS certificate or its key: {error}") from None
        write_text(self.paths.certificate, text, mode=0o600)
        self._certificate = state

    def _certificate_state(self) -> tuple[int, ...]:
        state = []
        for path in (self._settings.tls_cert, self._settings.tls_key):
            try:
                found = os.stat(path) if path is not None else None
            except OSError:
                found = None
            state += [found.st_ino, found.st_mtime_ns] if found else [0, 0]
        return tuple(state)
