"""The official MCP client over streamable HTTP and stdio, and plain HTTP, against a running Emberbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import httpx
import httpx2
import pytest
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from emberbox.api.capabilities.catalogue import OPERATIONS
from tests.clients.support.instance import ROOT, Emberbox
from tests.clients.support.timing import eventually_async, seconds, whole_seconds

PUBLISHED = {operation.tool for operation in OPERATIONS}
FURTHER = {
    "e2b-run-command",
    "e2b-read-file",
    "e2b-write-file",
    "e2b-list-files",
    "e2b-get-url",
    "e2b-fork-sandbox",
    "e2b-run-code",
}


@asynccontextmanager
async def over_http(emberbox: Emberbox, *, mode: Any = "auto") -> AsyncIterator[Client]:
    headers = {"X-API-Key": emberbox.api_key}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=seconds(180), trust_env=False) as http,
        Client(streamable_http_client(f"{emberbox.api_url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


def over_stdio(emberbox: Emberbox) -> AbstractAsyncContextManager[Client]:
    command = StdioServerParameters(
        command=sys.executable, args=["-m", "emberbox", "mcp"], env=emberbox.client_env, cwd=str(ROOT)
    )
    return Client(command)


async def called(client: Client, tool: str, **arguments: Any) -> Any:
    """The structured answer of a call that has to succeed."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    return result.structured_content


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """The message of a call that has to fail."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result.structured_content
    return result.content[0].text


@asynccontextmanager
async def a_sandbox(client: Client) -> AsyncIterator[str]:
    made = await called(client, "e2b-create-sandbox", templateID="base", timeout=whole_seconds(600))
    try:
        yield made["sandboxID"]
    finally:
        await called(client, "e2b-kill-sandbox", sandboxID=made["sandboxID"])


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_every_tool_is_listed_with_schemas_and_hints(emberbox, mode):
    async with over_http(emberbox, mode=mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}

    assert set(tools) == PUBLISHED | FURTHER
    for operation in OPERATIONS:
        hints = tools[operation.tool].annotations
        assert (hints.read_only_hint, hints.destructive_hint, hints.idempotent_hint) == (
            operation.read_only,
            operation.destructive,
            operation.idempotent,
        )
    assert all(tool.input_schema["type"] == "object" and tool.output_schema for tool in tools.values())


@pytest.mark.parametrize("transport", [over_http, over_stdio])
async def test_every_tool_does_what_it_says(emberbox, transport):
    async with transport(emberbox) as client:
        untried = {tool.name for tool in (await client.list_tools()).tools}

        async def use(tool: str, **arguments: Any) -> Any:
            untried.discard(tool)
            return await called(client, tool, **arguments)

        made = await use("e2b-create-sandbox", templateID="base", timeout=whole_seconds(300), metadata={"by": "mcp"})
        it = {"sandboxID": made["sandboxID"]}
        try:
            assert (await use("e2b-get-sandbox", **it))["metadata"] == {"by": "mcp"}
            listed = await use("e2b-list-sandboxes", metadata="by=mcp")
            assert it["sandboxID"] in [one["sandboxID"] for one in listed["sandboxes"]]

            ran = await use("e2b-run-command", **it, command="echo $WHO; echo oh >&2; exit 3", envVars={"WHO": "me"})
            assert (ran["stdout"], ran["stderr"], ran["exitCode"]) == ("me\n", "oh\n", 3)
            await use("e2b-write-file", **it, path="/tmp/deep/note.txt", content="grüße")
            assert (await use("e2b-read-file", **it, path="/tmp/deep/note.txt"))["content"] == "grüße"
            entries = (await use("e2b-list-files", **it, path="/tmp/deep"))["entries"]
            assert [(one["name"], one["type"], one["size"]) for one in entries] == [("note.txt", "file", 7)]
            url = await use("e2b-get-url", **it, port=8000)
            assert url["host"].startswith(f"8000-{it['sandboxID']}.")

            for fork in (await use("e2b-fork-sandbox", **it, timeout=whole_seconds(600)))["forks"]:
                await use("e2b-kill-sandbox", sandboxID=fork["sandbox"]["sandboxID"])
            assert (await use("e2b-snapshot-sandbox", **it))["snapshotID"]

            # What it does is shown in test_code_interpreter.py: this template has no interpreter.
            assert "code-interpreter-v1" in await refused(client, "e2b-run-code", **it, code="1")
            untried.discard("e2b-run-code")

            await use("e2b-pause-sandbox", **it)
            assert "e2b-connect-sandbox" in await refused(client, "e2b-run-command", **it, command="true")
            await use("e2b-resume-sandbox", **it, timeout=whole_seconds(300))
            await use("e2b-connect-sandbox", **it, timeout=whole_seconds(300))
            assert (await use("e2b-run-command", **it, command="cat /tmp/deep/note.txt"))["stdout"] == "grüße"

            await use("e2b-set-sandbox-timeout", **it, timeout=whole_seconds(200))
            await use("e2b-refresh-sandbox", **it, duration=whole_seconds(100))
            await use("e2b-get-sandbox-metrics", **it)
            await use("e2b-get-sandbox-logs", **it)
            await use("e2b-get-fleet-metrics", sandbox_ids=it["sandboxID"])
        finally:
            await use("e2b-kill-sandbox", **it)

    assert untried == set()


async def test_resources_are_listed_and_read(emberbox):
    async with over_http(emberbox) as client, a_sandbox(client) as sandbox_id:
        listed = {str(one.uri) for one in (await client.list_resources()).resources}
        templates = (await client.list_resource_templates()).resource_templates
        sandboxes = await client.read_resource("emberbox://sandboxes")
        logs = await client.read_resource(f"emberbox://sandboxes/{sandbox_id}/logs")

        with pytest.raises(MCPError, match="was not found"):
            await client.read_resource("emberbox://sandboxes/inone/logs")

    assert listed == {"emberbox://sandboxes", "emberbox://templates"}
    assert [one.uri_template for one in templates] == ["emberbox://sandboxes/{sandboxID}/logs"]
    assert sandbox_id in sandboxes.contents[0].text
    assert logs.contents[0].text.startswith("[")


async def test_wrong_arguments_name_the_field_and_an_unknown_sandbox_is_the_apis_error(emberbox, api):
    async with over_http(emberbox) as client:
        misspelt = await refused(client, "e2b-create-sandbox", template="base")
        mistyped = await refused(client, "e2b-set-sandbox-timeout", sandboxID="inone", timeout="soon")
        unknown = await refused(client, "e2b-get-sandbox", sandboxID="inone")
        unreachable = await refused(client, "e2b-run-command", sandboxID="inone", command="true")

        with pytest.raises(MCPError, match="there is no tool"):
            await client.call_tool("e2b-nothing", {})

    assert "templateID: Field required" in misspelt
    assert "template: Extra inputs are not permitted" in misspelt
    assert "timeout: Input should be a valid integer" in mistyped
    assert unknown == unreachable == api.get("/sandboxes/inone").json()["message"]


async def test_the_published_form_with_a_body_is_understood(emberbox):
    async with over_http(emberbox) as client:
        made = await called(client, "e2b-create-sandbox", body={"templateID": "base", "timeout": whole_seconds(60)})
        await called(client, "e2b-kill-sandbox", sandboxID=made["sandboxID"])


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "e2b_" + "0" * 40}, {"Authorization": "Bearer nonsense"}])
def test_without_a_key_nothing_of_the_message_is_looked_at(emberbox, headers):
    answer = httpx.post(f"{emberbox.api_url}/mcp", content=b"not JSON", headers=headers, trust_env=False, timeout=60)

    assert answer.status_code == 401
    assert set(answer.json()) == {"code", "message"}
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_ten_megabytes_of_output_are_shortened_and_the_rest_can_be_read(emberbox):
    async with over_http(emberbox) as client, a_sandbox(client) as sandbox_id:
        command = "head -c 10000000 /dev/zero | tr '\\0' 'x'; echo END"
        shown = await called(client, "e2b-run-command", sandboxID=sandbox_id, command=command)
        await called(client, "e2b-run-command", sandboxID=sandbox_id, command=f"({command}) > /tmp/out 2>&1")
        last = await called(client, "e2b-read-file", sandboxID=sandbox_id, path="/tmp/out", offset=9_999_990)
        first = await called(client, "e2b-read-file", sandboxID=sandbox_id, path="/tmp/out", length=100)

    assert shown["truncated"]
    assert len(shown["stdout"]) < 40_000
    assert shown["stdout"].endswith("xEND\n")
    assert "e2b-read-file" in shown["note"]
    assert (last["content"], last["size"]) == ("x" * 10 + "END\n", 10_000_004)
    assert (first["content"], first["nextOffset"]) == ("x" * 100, 100)


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_cancelled_command_ends(emberbox, mode):
    async with over_http(emberbox, mode=mode) as client, a_sandbox(client) as sandbox_id:
        started = asyncio.Event()

        async def heard(*_: Any) -> None:
            started.set()

        async def run() -> None:
            arguments = {"sandboxID": sandbox_id, "command": "sleep 4321 & sleep 4321"}
            await client.call_tool("e2b-run-command", arguments, progress_callback=heard)

        async def sleeping() -> str:
            counted = await called(
                client, "e2b-run-command", sandboxID=sandbox_id, command="pgrep -c -x -f 'sleep 4321' || true"
            )
            return counted["stdout"].strip()

        async def both_sleep() -> bool:
            return await sleeping() == "2"

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await asyncio.wait_for(started.wait(), seconds(120))
            await eventually_async(both_sleep, what="the command runs")
            tasks.cancel_scope.cancel()

        async def gone() -> bool:
            return await sleeping() == "0"

        await eventually_async(gone, within=90)


async def test_a_command_is_killed_at_its_timeout_and_one_in_the_background_goes_on(emberbox):
    async with over_http(emberbox) as client, a_sandbox(client) as sandbox_id:
        it = {"sandboxID": sandbox_id}
        late = await called(client, "e2b-run-command", **it, command="echo early; sleep 99", timeout=seconds(20))
        going = await called(client, "e2b-run-command", **it, command="sleep 1; echo done > /tmp/it", background=True)

        async def written() -> bool:
            return (await client.call_tool("e2b-read-file", {**it, "path": "/tmp/it"})).is_error is False

        await eventually_async(written, within=90)

    assert (late["stdout"], late["timedOut"]) == ("early\n", True)
    assert "exitCode" not in late
    assert going["pid"] > 0


async def test_fifty_sessions_at_once(emberbox):
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(over_http(emberbox))
        sandbox_id = await stack.enter_async_context(a_sandbox(client))

        async def one(number: int) -> str:
            async with over_http(emberbox, mode="legacy") as own:
                ran = await called(own, "e2b-run-command", sandboxID=sandbox_id, command=f"echo {number}")
                return ran["stdout"]

        heard = await asyncio.gather(*(one(number) for number in range(50)))

    assert heard == [f"{number}\n" for number in range(50)]


async def stdio_process(emberbox: Emberbox, **streams: int) -> asyncio.subprocess.Process:
    """`emberbox mcp`, with its streams by hand."""
    argv = (sys.executable, "-m", "emberbox", "mcp")
    return await asyncio.create_subprocess_exec(*argv, env=emberbox.client_env, cwd=ROOT, **streams)


async def test_stdio_ends_with_its_input(emberbox):
    process = await stdio_process(emberbox, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        client = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        initialize = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": client}
        process.stdin.write(json.dumps(initialize).encode() + b"\n")
        answered = json.loads(await asyncio.wait_for(process.stdout.readline(), seconds(240)))

        process.stdin.close()
        await asyncio.wait_for(process.wait(), seconds(60))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    assert answered["id"] == 1
    assert process.returncode == 0


async def test_stdio_says_what_is_wrong_with_a_key(emberbox):
    wrong = Emberbox(emberbox.api_url, emberbox.sandbox_url, "e2b_" + "0" * 40)
    pipe = asyncio.subprocess.PIPE
    process = await stdio_process(wrong, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), seconds(240))

    assert process.returncode == 1
    assert out == b""
    assert b"refuses the key" in err
