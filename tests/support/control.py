"""A control plane on SQLite (or PostgreSQL) with a fake node and a fake edge, served in the test's own process."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from emberbox.api.app import create_app
from emberbox.control.bootstrap import Bootstrapped, bootstrap, create_key
from emberbox.control.service import ControlPlane
from emberbox.logs import configure_logging
from emberbox.settings import Settings
from emberbox.store import teams as team_rows
from emberbox.store.records import TeamRecord
from tests.support.fake_edge import FakeEdge
from tests.support.fake_node import FakeNode

ADMIN_TOKEN = "the-admin"
EDGE_SECRET = "the-edge-secret"


configure_logging("test", Settings(log_format="json"))


@dataclass
class World:
    """Everything a test of the control plane needs. `client` has the first team's key."""

    settings: Settings
    node: FakeNode
    edge: FakeEdge
    key: str
    team_id: str
    app: FastAPI | None = None
    client: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)

    @property
    def control(self) -> ControlPlane:
        assert self.app is not None
        control: ControlPlane = self.app.state.control
        return control

    def client_with(self, **headers: str) -> httpx.AsyncClient:
        assert self.app is not None
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(
            transport=transport,
            base_url="http://api",
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            timeout=30,
        )

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """The api process, from start to stop."""
        self.app = create_app(self.settings)
        async with self.app.router.lifespan_context(self.app):
            self.client = self.client_with(X_API_Key=self.key)
            try:
                yield
            finally:
                await self.client.aclose()

    async def ready(self) -> None:
        """Wait until the node is connected and `base` is there."""
        await eventually(lambda: self.control.shipped.base.startup.status in ("ready", "error"))
        assert self.control.shipped.base.startup.status == "ready", self.control.shipped.base.startup

    async def create(self, **body: Any) -> dict[str, Any]:
        answer = await self.client.post("/v2/sandboxes", json={"templateID": "base", **body})
        assert answer.status_code == 201, answer.text
        created: dict[str, Any] = answer.json()
        return created

    async def other_team(self, **limits: int) -> tuple[TeamRecord, str]:
        """Another team and a key of it."""
        accounts = self.control.accounts
        team = await accounts.add_team("Other", "other")
        made = await accounts.add_credential("api_key", team, "key")
        return team, made.value

    async def state_of(self, sandbox_id: str) -> str:
        from emberbox.store import sandboxes

        record = await sandboxes.get(self.control.store, sandbox_id)
        return record.state if record else "none"


@asynccontextmanager
async def made_world(**settings: Any) -> AsyncIterator[World]:
    """A world whose api is not serving yet."""
    # Sockets' paths must be short.
    home = Path(tempfile.mkdtemp(prefix="eb-"))
    node, edge = FakeNode(), FakeEdge()
    try:
        configured = Settings(data_dir=home, admin_token=ADMIN_TOKEN, **settings)
        configured.run_dir.mkdir()
        configured.edge_secret_path.write_text(EDGE_SECRET + "\n")
        await node.start(configured.node_target)
        await edge.start(configured.edge_target)
        first = await _bootstrapped(configured)
        key = first.api_key or (await create_key(configured, "another")).value
        yield World(configured, node, edge, key, first.team_id)
    finally:
        await node.stop()
        await edge.stop()
        shutil.rmtree(home)


@asynccontextmanager
async def serving_world(**settings: Any) -> AsyncIterator[World]:
    async with made_world(**settings) as world, world.serving():
        await world.ready()
        await eventually(lambda: any(name == "ReplaceRoutes" for name, _ in world.edge.calls))
        yield world


_first_runs: list[tuple[tempfile.TemporaryDirectory[str], Bootstrapped]] = []
"""A first run on SQLite to copy from, made once a test process: migrating takes longer than most tests."""


async def _bootstrapped(settings: Settings) -> Bootstrapped:
    if settings.database_url:
        return await bootstrap(settings)
    if not _first_runs:
        kept = tempfile.TemporaryDirectory(prefix="eb-first-")
        _first_runs.append((kept, await bootstrap(settings)))
        shutil.copytree(settings.api_dir, Path(kept.name) / "api")
    else:
        shutil.copytree(Path(_first_runs[0][0].name) / "api", settings.api_dir)
    return _first_runs[0][1]


async def eventually(true: Callable[[], bool | Awaitable[bool]], *, seconds: float = 90) -> None:
    """Wait until something is true; fails after a time that only a hang reaches."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        found = true()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return
        assert loop.time() < end, "it did not become true"
        await asyncio.sleep(0.01)


async def set_limits(world: World, team_id: str, **limits: int) -> None:
    from sqlalchemy import update

    from emberbox.store.tables import teams

    async with world.control.store.write() as connection:
        await connection.execute(update(teams).where(teams.c.id == team_id).values(**limits))
    world.control.accounts.forget()
    assert await team_rows.get_team(world.control.store, team_id) is not None
