"""MCP itself, by the official library. Imported at the first request: the library takes about 35 MB."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import mcp_types as types
import structlog
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from mcp.server.auth.provider import AccessToken
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from mcp.shared.exceptions import MCPError
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from emberbox import __version__
from emberbox.api.agent_client import AgentClient
from emberbox.api.mcp import resources
from emberbox.api.mcp.bound import BoundSandboxes
from emberbox.api.mcp.code import RUN_CODE
from emberbox.api.mcp.tool import Call, Tool
from emberbox.api.mcp.tools import PUBLISHED
from emberbox.api.mcp.work import WORK
from emberbox.control.accounts import Principal
from emberbox.control.errors import ControlError
from emberbox.control.service import ControlPlane

log = structlog.get_logger()

LARGEST_REQUEST = 8 * 1024 * 1024
"""Bytes of a message. `e2b-write-file` has to fit."""
PRINCIPAL = "emberbox.principal"
"""Where the endpoint leaves the caller in the ASGI scope."""

INSTRUCTIONS = """\
Isolated Linux sandboxes. Create one with e2b-create-sandbox, keep its sandboxID, and pass it to every other tool.
A sandbox ends when its timeout is over; extend it with e2b-set-sandbox-timeout, and end it with e2b-kill-sandbox when
you are done. Run commands with e2b-run-command; move files with e2b-read-file and e2b-write-file; reach a server that
listens in the sandbox at the address that e2b-get-url tells."""

TOOLS: dict[str, Tool] = {tool.name: tool for tool in (*PUBLISHED, *WORK, RUN_CODE)}

_Context = ServerRequestContext[Any, Any]


class Protocol:
    """The MCP server of an api process and its sessions. Owns the connections to sandboxes."""

    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane
        self._agent = AgentClient(plane.settings.edge_url)
        self._bound = BoundSandboxes(plane) if plane.settings.mcp_bind_sandboxes else None
        self._tools = [_described(tool) for tool in TOOLS.values()]
        server: Server[Any] = Server(
            "emberbox",
            version=__version__,
            title="Emberbox",
            instructions=INSTRUCTIONS,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            on_list_resources=self._list_resources,
            on_list_resource_templates=self._list_resource_templates,
            on_read_resource=self._read_resource,
        )
        self._manager = StreamableHTTPSessionManager(
            app=server,
            # Any Host that the API answers to will do: a page that rebinds a name still lacks the key.
            security_settings=TransportSecuritySettings(enable_dns_rebinding_protection=False),
            max_request_body_size=LARGEST_REQUEST,
            session_idle_timeout=plane.settings.mcp_session_idle_seconds,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Enter and leave in the same task."""
        try:
            async with self._agent, self._manager.run():
                yield
        finally:
            if self._bound is not None:
                await self._bound.close()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request whose caller is known: a session belongs to the team that opened it."""
        who: Principal = scope[PRINCIPAL]
        # The library compares this with whom the session was opened for. The token itself is of no use to it.
        scope["user"] = AuthenticatedUser(AccessToken(token="", client_id=who.team.id, scopes=[]))
        await self._manager.handle_request(scope, receive, send)

    # ---- tools

    async def _list_tools(
        self, _context: _Context, _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=self._tools)

    async def _call_tool(self, context: _Context, params: types.CallToolRequestParams) -> types.CallToolResult:
        tool = TOOLS.get(params.name)
        if tool is None:
            raise MCPError(types.INVALID_PARAMS, f"there is no tool {params.name[:100]!r}; list them with tools/list")
        call = self._call(context)
        try:
            answer = await tool.call(call, params.arguments or {})
        except ControlError as error:
            return _failed(error.message)
        except ValidationError as error:
            return _failed(_sentence(error))
        except Exception as error:
            log.error("tool.failed", tool=tool.name, exc_info=error)
            return _failed("internal error; the server's log says more")
        if self._bound is not None:
            # The library gives handlers no other way to what lives as long as the session.
            self._bound.note(context.session._connection, call.team, tool.name, answer)
        text = json.dumps(answer, ensure_ascii=False)
        return types.CallToolResult(content=[types.TextContent(text=text)], structured_content=answer)

    def _call(self, context: _Context) -> Call:
        assert context.request is not None
        who: Principal = context.request.scope[PRINCIPAL]

        async def progress(seconds: float, message: str) -> None:
            await context.session.report_progress(seconds, None, message)

        return Call(self._plane, who, self._agent, progress)

    # ---- resources

    async def _list_resources(
        self, _context: _Context, _params: types.PaginatedRequestParams | None
    ) -> types.ListResourcesResult:
        return types.ListResourcesResult(
            resources=[
                types.Resource(uri=uri, name=name, description=description, mime_type=resources.JSON)
                for uri, name, description in resources.LISTED
            ]
        )

    async def _list_resource_templates(
        self, _context: _Context, _params: types.PaginatedRequestParams | None
    ) -> types.ListResourceTemplatesResult:
        uri, name, description = resources.LOGS
        template = types.ResourceTemplate(
            uri_template=uri, name=name, description=description, mime_type=resources.JSON
        )
        return types.ListResourceTemplatesResult(resource_templates=[template])

    async def _read_resource(
        self, context: _Context, params: types.ReadResourceRequestParams
    ) -> types.ReadResourceResult:
        uri = str(params.uri)
        try:
            text = await resources.read(self._call(context), uri)
        except ControlError as error:
            raise MCPError(types.INVALID_PARAMS, error.message) from None
        return types.ReadResourceResult(
            contents=[types.TextResourceContents(uri=uri, mime_type=resources.JSON, text=text)]
        )


def _described(tool: Tool) -> types.Tool:
    return types.Tool(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=tool.input_schema(),
        output_schema=tool.output_schema(),
        annotations=types.ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.read_only,
            destructive_hint=tool.destructive,
            idempotent_hint=tool.idempotent,
            open_world_hint=False,
        ),
    )


def _failed(message: str) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(text=message)], is_error=True)


def _sentence(error: ValidationError) -> str:
    """The first few problems as `timeout: Input should be ...`."""
    parts = (f"{'.'.join(map(str, each['loc']))[:200]}: {each['msg']}" for each in error.errors()[:5])
    return "wrong arguments: " + "; ".join(parts)
