"""Plain HTTP beside the clients: what a client would hide is asked here."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import httpx
import websockets.sync.client

from tests.clients.support.instance import Emberbox
from tests.clients.support.timing import seconds


class Api(httpx.Client):
    """The control plane's REST API with the key of the tests."""

    def __init__(self, emberbox: Emberbox, **headers: str) -> None:
        super().__init__(
            base_url=emberbox.api_url,
            headers={"X-API-KEY": emberbox.api_key, **headers},
            timeout=seconds(180),
            trust_env=False,
        )

    def list_all(self, **query: str) -> list[dict[str, Any]]:
        """Every sandbox of the team, running or paused, over all pages."""
        query.setdefault("state", "running,paused")
        found: list[dict[str, Any]] = []
        token = ""
        while True:
            answer = self.get("/v2/sandboxes", params={**query, **({"nextToken": token} if token else {})})
            answer.raise_for_status()
            found += answer.json()
            token = answer.headers.get("x-next-token", "")
            if not token:
                return found


class Agent(httpx.Client):
    """One port of one sandbox, through the edge, addressed by headers as clients do."""

    def __init__(
        self, emberbox: Emberbox, sandbox: Any, port: int = 49983, *, token: bool = True, traffic_token: bool = True
    ) -> None:
        headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": str(port)}
        if token and sandbox._envd_access_token:
            headers["X-Access-Token"] = sandbox._envd_access_token
        if traffic_token and sandbox.traffic_access_token:
            headers["e2b-traffic-access-token"] = sandbox.traffic_access_token
        super().__init__(base_url=emberbox.sandbox_url, headers=headers, timeout=seconds(180), trust_env=False)

    def rpc(self, method: str, body: Any = None, *, user: str | None = None, **options: Any) -> httpx.Response:
        """A unary Connect call in JSON, e.g. `filesystem.Filesystem/Stat`."""
        auth = (user, "") if user else None
        return self.post(f"/{method}", json={} if body is None else body, auth=auth, **options)


def host_request(emberbox: Emberbox, host: str, path: str = "/", **options: Any) -> httpx.Response:
    """A request to the edge whose Host header names the sandbox, as a browser would send it."""
    headers = {**options.pop("headers", {}), "Host": host}
    with httpx.Client(base_url=emberbox.sandbox_url, timeout=seconds(180), trust_env=False) as client:
        return client.request(options.pop("method", "GET"), path, headers=headers, **options)


def websocket(
    emberbox: Emberbox, uri: str
) -> contextlib.AbstractContextManager[websockets.sync.client.ClientConnection]:
    """A WebSocket to a sandbox's host name, whatever that name resolves to here."""
    edge = httpx.URL(emberbox.sandbox_url)
    connection = socket.create_connection((edge.host, edge.port or 80), timeout=seconds(60))
    connection.settimeout(None)
    return websockets.sync.client.connect(
        uri, sock=connection, max_size=2**22, open_timeout=seconds(60), close_timeout=seconds(5)
    )
