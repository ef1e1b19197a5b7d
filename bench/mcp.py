"""What a tool call costs over the same REST call: `e2b-get-sandbox` and GET /sandboxes/{id}, taken in turn.

MCP is measured as bare HTTP messages of a session, so that the client library's own work is in neither figure; a row
beside it shows the call through the official client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from common import Result, Row, an_emberbox, main, percentile, spread

# This file has the name of the library that it uses, and Python looks beside a script first.
sys.path.remove(str(Path(__file__).resolve().parent))

TARGET_MS = 5.0
VERSION = "2025-06-18"


def measure(arguments: argparse.Namespace) -> Result:
    from e2b import Sandbox

    # A fast machine asks more often than a team may.
    with an_emberbox(EMBERBOX_RATE_PER_SECOND="100000", EMBERBOX_RATE_BURST="100000") as emberbox:
        sandbox = Sandbox.create(timeout=600)
        try:
            rest, mcp = _by_hand(emberbox, sandbox.sandbox_id, arguments.count)
            library = asyncio.run(_by_library(emberbox, sandbox.sandbox_id, arguments.count))
        finally:
            sandbox.kill()
    over = (percentile(mcp, 0.5) - percentile(rest, 0.5)) * 1000
    return Result(
        "An MCP tool call over the same REST call",
        [
            Row("overhead of a tool call, p50", over, "ms", target=TARGET_MS),
            Row("tool call, by hand", percentile(mcp, 0.5) * 1000, "ms", details=spread(mcp)),
            Row("REST call, by hand", percentile(rest, 0.5) * 1000, "ms", details=spread(rest)),
            Row("tool call, official client", percentile(library, 0.5) * 1000, "ms", details=spread(library)),
        ],
    )


def _by_hand(emberbox: Any, sandbox_id: str, count: int) -> tuple[list[float], list[float]]:
    import httpx

    numbers = itertools.count(1)
    accept = {"Accept": "application/json, text/event-stream"}
    with httpx.Client(
        base_url=emberbox.api_url, headers={"X-API-Key": emberbox.api_key}, timeout=30, trust_env=False
    ) as http:

        def message(method: str, params: dict[str, Any]) -> httpx.Response:
            body = {"jsonrpc": "2.0", "id": next(numbers), "method": method, "params": params}
            answer = http.post("/mcp", json=body, headers=accept)
            assert answer.status_code == 200, answer.text
            return answer

        about = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
        opened = message("initialize", about)
        http.headers["Mcp-Session-Id"] = opened.headers["mcp-session-id"]
        http.headers["Mcp-Protocol-Version"] = VERSION
        http.post("/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"}, headers=accept)

        def tool() -> None:
            answer = message("tools/call", {"name": "e2b-get-sandbox", "arguments": {"sandboxID": sandbox_id}})
            assert sandbox_id in answer.text, answer.text

        def rest() -> None:
            assert http.get(f"/sandboxes/{sandbox_id}").json()["sandboxID"] == sandbox_id

        plain: list[float] = []
        tools: list[float] = []
        for turn in range(-20, count):
            for what, samples in ((rest, plain), (tool, tools)):
                started = time.perf_counter()
                what()
                if turn >= 0:
                    samples.append(time.perf_counter() - started)
        http.delete("/mcp")
    return plain, tools


async def _by_library(emberbox: Any, sandbox_id: str, count: int) -> list[float]:
    import httpx2
    from mcp import Client
    from mcp.client.streamable_http import streamable_http_client

    samples: list[float] = []
    async with (
        httpx2.AsyncClient(headers={"X-API-Key": emberbox.api_key}, timeout=30, trust_env=False) as http,
        Client(streamable_http_client(f"{emberbox.api_url}/mcp", http_client=http)) as client,
    ):
        for turn in range(-20, count):
            started = time.perf_counter()
            result = await client.call_tool("e2b-get-sandbox", {"sandboxID": sandbox_id})
            assert not result.is_error, result.content
            if turn >= 0:
                samples.append(time.perf_counter() - started)
    return samples


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300, help="calls of each kind")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
