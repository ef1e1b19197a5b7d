"""The control plane as one object with a beginning and an end: `async with ControlPlane(settings)`."""

from __future__ import annotations

import asyncio
from types import TracebackType

import structlog

from emberbox.control.accounts import Accounts
from emberbox.control.builds import Builds
from emberbox.control.clock import now_ms
from emberbox.control.edges import Edge, route_of
from emberbox.control.fleet import Fleet
from emberbox.control.lifecycle import Lifecycle
from emberbox.control.limits import RateLimits
from emberbox.control.logs import Logs
from emberbox.control.metrics import Metrics
from emberbox.control.nodes import Node, Nodes
from emberbox.control.plane import Plane
from emberbox.control.reconcile import Reconciler, watch
from emberbox.control.sandboxes import Sandboxes
from emberbox.control.shipped import Shipped
from emberbox.control.snapshots import Snapshots
from emberbox.control.states import State
from emberbox.control.tags import Tags
from emberbox.control.templates import Templates
from emberbox.control.tokens import SandboxTokens
from emberbox.control.uploads import Uploads
from emberbox.settings import Settings
from emberbox.store import metrics as metric_rows
from emberbox.store import sandboxes as sandbox_rows
from emberbox.store.engine import Store
from emberbox.store.migrate import migrate
from emberbox.tls import node_channel_credentials
from emberbox.wire import edge_pb2

log = structlog.get_logger()

_UPKEEP_SECONDS = 30.0


class ControlPlane:
    """Owns the store, the seams and the background tasks of an api process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store_url)
        self._edge = Edge(settings.edge_target, routes=self._routes, time_scale=settings.time_scale)
        self.plane = Plane(
            settings=settings,
            store=self.store,
            nodes=Nodes(
                [
                    Node(
                        settings.node_target,
                        time_scale=settings.time_scale,
                        credentials=node_channel_credentials(settings),
                    )
                ]
            ),
            edge=self._edge,
            tokens=SandboxTokens.load(settings.api_dir / "secret.key"),
        )
        self.accounts = Accounts(self.store, settings)
        self.rates = RateLimits()
        self.templates = Templates(self.plane)
        self.sandboxes = Sandboxes(self.plane, self.templates)
        self.lifecycle = Lifecycle(self.plane, self.sandboxes)
        self.metrics = Metrics(self.plane)
        self.logs = Logs(self.plane)
        self.uploads = Uploads(self.plane)
        self.builds = Builds(self.plane, self.templates, self.uploads)
        self.shipped = Shipped(self.plane, self.templates, self.builds, self.uploads)
        self.builds.reserved |= self.shipped.names
        self.templates.ship = self.shipped.use
        self.templates.leaving = self.builds.cancel_of
        self.snapshots = Snapshots(self.plane, self.templates, self.sandboxes, self.builds)
        self.tags = Tags(self.plane, self.templates)
        self.fleet = Fleet(self.plane)
        self._reconciler = Reconciler(self.plane, self.lifecycle, self.metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> ControlPlane:
        if await migrate(self.store):
            log.info("store.migrated")
        self._tasks = [
            asyncio.create_task(watch(self.plane, self._reconciler), name="watch nodes"),
            asyncio.create_task(self._edge.keep_connected(), name="keep edge"),
            asyncio.create_task(self._keep_up(), name="upkeep"),
            asyncio.create_task(self._start_up(), name="start up"),
        ]
        for task in self._tasks:
            task.add_done_callback(_report_end)
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.builds.close()
        await self._edge.close()
        await self.plane.nodes.close()
        await self.accounts.record_use()
        await self.store.close()

    async def _routes(self) -> list[edge_pb2.Route]:
        """Every route there should be."""
        running = await sandbox_rows.by_state(self.store, [State.RUNNING.value])
        return [route_of(record, self.plane.tokens) for record in running]

    async def _start_up(self) -> None:
        """What is done once a node is there."""
        await self.shipped.base.ensure()
        await self.builds.connected_node()
        await self.snapshots.undo_interrupted()

    async def upkeep(self) -> None:
        """Write down what is kept in memory, see what other processes did, forget what is kept no longer."""
        await self.accounts.record_use()
        await self.fleet.follow()
        await self.builds.tend()
        await self.plane.remove_leftovers()
        now = now_ms()
        await metric_rows.forget(self.store, now - self.settings.metrics_keep_seconds * 1000)
        await sandbox_rows.forget_ended(self.store, now - self.settings.logs_keep_seconds * 1000)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(_UPKEEP_SECONDS)
            try:
                await self.upkeep()
            except Exception:
                log.exception("upkeep.failed")


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("task.ended", task=task.get_name(), exc_info=error)
