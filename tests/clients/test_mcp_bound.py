"""With EMBERBOX_MCP_BIND_SANDBOXES, what a session made ends with it, however it ends."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from e2b import Sandbox

from tests.clients.support.host import Host
from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import Api
from tests.clients.support.timing import eventually, seconds, whole_seconds

IDLE_SECONDS = whole_seconds(40)
SETTINGS = {"EMBERBOX_MCP_BIND_SANDBOXES": "true", "EMBERBOX_MCP_SESSION_IDLE_SECONDS": str(IDLE_SECONDS)}

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("mcp_bound")]


class Session:
    """An MCP session by bare messages, so that its end is the test's."""

    def __init__(self, emberbox: Emberbox) -> None:
        headers = {"X-API-Key": emberbox.api_key, "Accept": "application/json, text/event-stream"}
        self._http = httpx.Client(base_url=emberbox.api_url, headers=headers, timeout=seconds(180), trust_env=False)
        self._numbers = itertools.count(1)
        client = {"name": "test", "version": "1"}
        opened = self._send("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client})
        self._http.headers["Mcp-Session-Id"] = opened.headers["mcp-session-id"]
        self._http.headers["MCP-Protocol-Version"] = "2025-06-18"
        self._http.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"})

    def create(self) -> str:
        params = {"name": "e2b-create-sandbox", "arguments": {"templateID": "base", "timeout": 1800}}
        answer = self._send("tools/call", params)
        text = next(line for line in answer.text.splitlines() if '"sandboxID"' in line)
        return text.split('"sandboxID":"')[1].split('"')[0]

    def end(self) -> None:
        assert self._http.delete("/mcp").status_code == 200

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, params: dict[str, Any]) -> httpx.Response:
        body = {"jsonrpc": "2.0", "id": next(self._numbers), "method": method, "params": params}
        answer = self._http.post("/mcp", json=body)
        assert answer.status_code == 200, answer.text
        return answer


@pytest.fixture
def session(own_emberbox: Emberbox) -> Iterator[Session]:
    opened = Session(own_emberbox)
    yield opened
    opened.close()


def _is_gone(emberbox: Emberbox, sandbox_id: str) -> bool:
    with Api(emberbox) as api:
        return api.get(f"/sandboxes/{sandbox_id}").status_code == 404


def test_sandboxes_end_with_the_session_and_others_do_not(own_emberbox: Emberbox, session: Session) -> None:
    bound = [session.create(), session.create()]
    free = Sandbox.create(timeout=1800)
    assert not any(_is_gone(own_emberbox, each) for each in bound)

    session.end()

    eventually(lambda: all(_is_gone(own_emberbox, each) for each in bound), within=90, what="they are gone")
    assert free.commands.run("echo here").stdout == "here\n"
    free.kill()


def test_sandboxes_end_with_an_idle_session(own_emberbox: Emberbox, session: Session) -> None:
    bound = session.create()

    eventually(lambda: _is_gone(own_emberbox, bound), within=240, every=0.5, what="it is gone")


def test_sandboxes_end_with_the_api_that_holds_the_session(breakable: Host, session: Session) -> None:
    bound = session.create()
    before = breakable.pids()["api"]

    breakable.kill(before, signal.SIGTERM)

    def gone_and_back() -> bool:
        try:
            return breakable.pids().get("api") != before and _is_gone(breakable.emberbox, bound)
        except httpx.TransportError:
            return False

    eventually(gone_and_back, within=240, every=0.5, what="it is gone, and the api is back")
