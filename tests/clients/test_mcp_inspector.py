"""The MCP Inspector's command line, as a second client that we did not write: every tool is listed and called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients.support import node
from tests.clients.support.instance import Emberbox
from tests.clients.support.timing import seconds, whole_seconds

HERE = Path(__file__).parent / "inspector"
COMMAND = HERE / "node_modules" / "@modelcontextprotocol" / "inspector" / "cli" / "build" / "cli.js"


def inspect(emberbox: Emberbox, home: Path, *arguments: str) -> dict[str, Any]:
    """What the inspector prints of `emberbox mcp`."""
    node.install(HERE)
    given = [part for name, value in emberbox.client_env.items() for part in ("-e", f"{name}={value}")]
    done = subprocess.run(
        ["node", str(COMMAND), "--cli", *given, sys.executable, "-m", "emberbox", "mcp", *arguments],
        cwd=HERE, env=node.environment(emberbox, home), capture_output=True, text=True, timeout=seconds(120),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.timeout(seconds(1800))
def test_the_inspector_lists_and_calls_every_tool(emberbox, tmp_path):
    untried = {tool["name"] for tool in inspect(emberbox, tmp_path, "--method", "tools/list")["tools"]}

    def use(tool: str, **arguments: Any) -> dict[str, Any]:
        untried.discard(tool)
        given = [part for name, value in arguments.items() for part in ("--tool-arg", f"{name}={value}")]
        answer = inspect(emberbox, tmp_path, "--method", "tools/call", "--tool-name", tool, *given)
        assert not answer.get("isError"), answer
        assert json.loads(answer["content"][0]["text"]) == answer["structuredContent"]
        return answer["structuredContent"]

    it = {"sandboxID": use("e2b-create-sandbox", templateID="base", timeout=whole_seconds(600))["sandboxID"]}
    try:
        assert use("e2b-run-command", **it, command="echo inspected")["stdout"] == "inspected\n"
        use("e2b-write-file", **it, path="/tmp/note", content="written")
        assert use("e2b-read-file", **it, path="/tmp/note")["content"] == "written"
        assert "note" in [entry["name"] for entry in use("e2b-list-files", **it, path="/tmp")["entries"]]
        assert use("e2b-get-url", **it, port=8000)["host"].startswith("8000-")
        (fork,) = use("e2b-fork-sandbox", **it, timeout=whole_seconds(300))["forks"]
        use("e2b-kill-sandbox", sandboxID=fork["sandbox"]["sandboxID"])
        use("e2b-snapshot-sandbox", **it)
        use("e2b-pause-sandbox", **it)
        use("e2b-resume-sandbox", **it, timeout=whole_seconds(600))
        use("e2b-connect-sandbox", **it, timeout=whole_seconds(600))
        use("e2b-set-sandbox-timeout", **it, timeout=whole_seconds(600))
        use("e2b-refresh-sandbox", **it, duration=whole_seconds(60))
        assert use("e2b-get-sandbox", **it)["state"] == "running"
        assert it["sandboxID"] in [one["sandboxID"] for one in use("e2b-list-sandboxes")["sandboxes"]]
        use("e2b-get-sandbox-metrics", **it)
        use("e2b-get-sandbox-logs", **it)
        use("e2b-get-fleet-metrics", sandbox_ids=it["sandboxID"])
    finally:
        use("e2b-kill-sandbox", **it)

    # It needs a template of its own: test_code_interpreter.py.
    assert untried == {"e2b-run-code"}
