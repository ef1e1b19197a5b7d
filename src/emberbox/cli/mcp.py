"""`emberbox mcp`: MCP on standard input and output, passed on to `/mcp` of an Emberbox, here or elsewhere.

Messages go through unread but for what HTTP wants to see of them in headers.
"""

from __future__ import annotations

import os
from typing import Any

import anyio
import httpx
import httpx2
from mcp.client.streamable_http import streamable_http_client
from mcp.server.stdio import stdio_server
from mcp.shared.inbound import (
    MCP_METHOD_HEADER,
    MCP_NAME_HEADER,
    MCP_PROTOCOL_VERSION_HEADER,
    NAME_BEARING_METHODS,
    encode_header_value,
)
from mcp.shared.message import ClientMessageMetadata, SessionMessage
from mcp_types import PROTOCOL_VERSION_META_KEY
from mcp_types.jsonrpc import JSONRPCRequest, JSONRPCResponse

from emberbox.cli.errors import CliError
from emberbox.cli.exports import client_variables
from emberbox.settings import Settings

CONNECT_SECONDS = 30.0
SILENCE_SECONDS = 300.0
"""The server sends something on every open stream much more often."""


def bridge(settings: Settings) -> None:
    """Serve until standard input ends.

    Raises:
        CliError: there is no key, the API does not answer, or it does not know the key.
    """
    url, key = _where(settings)
    _check(url, key)
    anyio.run(_bridge, url, key)


def _where(settings: Settings) -> tuple[str, str]:
    """The environment first: a desktop has no data directory."""
    url, key = os.environ.get("E2B_API_URL"), os.environ.get("E2B_API_KEY")
    if not (url and key):
        local = client_variables(settings)
        url, key = url or local["E2B_API_URL"], key or local["E2B_API_KEY"]
    return f"{url.rstrip('/')}/mcp", key


def _check(url: str, key: str) -> None:
    """A wrong key is better told before the first message than instead of its answer."""
    try:
        response = httpx.get(url, headers={"X-API-Key": key}, timeout=CONNECT_SECONDS)
    except httpx.TransportError as error:
        raise CliError(f"{url} does not answer ({error}): is Emberbox running, and E2B_API_URL its address?") from None
    if response.status_code in (401, 403):
        raise CliError(f"{url} refuses the key (E2B_API_KEY): {response.json().get('message', response.status_code)}")
    if response.status_code == 404:
        raise CliError(f"{url} is not there: this Emberbox does not serve MCP")


async def _bridge(url: str, key: str) -> None:
    timeout = httpx2.Timeout(CONNECT_SECONDS, read=SILENCE_SECONDS)
    async with (
        httpx2.AsyncClient(headers={"X-API-Key": key}, timeout=timeout) as http,
        stdio_server() as (from_client, to_client),
        to_client,  # open, it would keep `stdio_server` from ending
        streamable_http_client(url, http_client=http) as (from_server, to_server),
        anyio.create_task_group() as both,
    ):
        headers = _Headers()

        async def down() -> None:
            async for message in from_server:
                if isinstance(message, SessionMessage):
                    headers.answered(message)
                    await to_client.send(message)
            both.cancel_scope.cancel()

        both.start_soon(down)
        async for message in from_client:
            if isinstance(message, SessionMessage):
                await to_server.send(headers.stamped(message))
        both.cancel_scope.cancel()


class _Headers:
    """What streamable HTTP repeats of a message in its headers."""

    def __init__(self) -> None:
        self._initialize: object = None
        self._version: str | None = None

    def stamped(self, message: SessionMessage) -> SessionMessage:
        told = message.message
        headers: dict[str, str] = {}
        if isinstance(told, JSONRPCRequest):
            params: dict[str, Any] = told.params or {}
            if told.method == "initialize":
                self._initialize = told.id
                return message
            version = (params.get("_meta") or {}).get(PROTOCOL_VERSION_META_KEY)
            if isinstance(version, str):
                headers[MCP_PROTOCOL_VERSION_HEADER] = version
                headers[MCP_METHOD_HEADER] = told.method
                name = params.get(NAME_BEARING_METHODS.get(told.method, ""))
                if isinstance(name, str):
                    headers[MCP_NAME_HEADER] = encode_header_value(name)
        if not headers and self._version is not None:
            headers[MCP_PROTOCOL_VERSION_HEADER] = self._version
        return SessionMessage(told, metadata=ClientMessageMetadata(headers=headers)) if headers else message

    def answered(self, message: SessionMessage) -> None:
        """Learn the version that the handshake agreed on."""
        told = message.message
        if isinstance(told, JSONRPCResponse) and self._initialize is not None and told.id == self._initialize:
            self._version = str(told.result.get("protocolVersion") or "") or None
            self._initialize = None
