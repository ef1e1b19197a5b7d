"""`/mcp` of a control plane with a fake node: who may use a session, and what its end leaves behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import httpx
import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from tests.support.control import serving_world
from tests.support.live import live_world

VERSION = "2025-06-18"
ACCEPT = {"Accept": "application/json, text/event-stream"}
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}},
}
LIST = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}


@asynccontextmanager
async def connected(url: str, key: str, mode: Any = "legacy") -> AsyncIterator[Client]:
    async with (
        httpx2.AsyncClient(headers={"X-API-Key": key}, timeout=120, trust_env=False) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


def post(url: str, message: dict[str, Any], **headers: str) -> httpx.Response:
    sent = {**ACCEPT, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return httpx.post(f"{url}/mcp", json=message, headers=sent, timeout=120, trust_env=False)


def test_the_library_is_not_loaded_before_the_first_request():
    program = "import sys, emberbox.api.main; print('mcp' in sys.modules, 'mcp_types' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["False", "False"]


async def test_a_session_belongs_to_the_team_that_opened_it():
    async with serving_world() as world:
        _, key = await world.other_team()
        opened = await world.client.post("/mcp", json=INITIALIZE, headers=ACCEPT)
        session = {**ACCEPT, "Mcp-Session-Id": opened.headers["mcp-session-id"]}

        mine = await world.client.post("/mcp", json=LIST, headers=session)
        async with world.client_with(X_API_Key=key) as other, world.client_with() as nobody:
            theirs = await other.post("/mcp", json=LIST, headers=session)
            nobodys = await nobody.post("/mcp", json=LIST, headers=session)

    assert (mine.status_code, theirs.status_code, nobodys.status_code) == (200, 404, 401)


async def test_a_key_that_is_deleted_opens_its_session_no_longer():
    async with serving_world() as world:
        made = (await world.client.post("/api-keys", json={"name": "short"})).json()
        async with world.client_with(X_API_Key=made["key"]) as client:
            opened = await client.post("/mcp", json=INITIALIZE, headers=ACCEPT)
            await world.client.delete(f"/api-keys/{made['id']}")
            session = {**ACCEPT, "Mcp-Session-Id": opened.headers["mcp-session-id"]}
            after = await client.post("/mcp", json=LIST, headers=session)

    assert (opened.status_code, after.status_code) == (200, 401)


async def test_an_open_stream_does_not_hold_up_the_end():
    stack = ExitStack()
    world, url = stack.enter_context(live_world())
    async with asyncio.timeout(120):
        async with connected(url, world.key) as client:
            await client.list_tools()

            # Without an end of its streams, the server waits for its client.
            await asyncio.to_thread(stack.close)


async def test_pages_of_other_origins_are_let_in_by_the_key_alone():
    with live_world() as (world, url):
        page = {"Origin": "https://elsewhere.test", "Host": "anything.test"}
        without = post(url, INITIALIZE, **page)
        with_key = post(url, INITIALIZE, X_API_Key=world.key, **page)

    assert (without.status_code, with_key.status_code) == (401, 200)
    assert with_key.headers["access-control-allow-origin"] == "*"
    assert "mcp-session-id" in with_key.headers["access-control-expose-headers"].lower()
