"""Keys that may do less, in the hands of the official clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import e2b
import pytest
from e2b import Sandbox

from tests.clients.support.host import Host
from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import Api
from tests.clients.support.timing import whole_seconds
from tests.clients.test_mcp import called, over_http, over_stdio, refused


@contextmanager
def limited(api: Api, *scopes: str, limit: int | None = None) -> Iterator[str]:
    """A key of these scopes, deleted in the end."""
    body: dict[str, Any] = {"name": "limited", "scopes": list(scopes), "sandboxLimit": limit}
    made = api.post("/api-keys", json=body).raise_for_status().json()
    try:
        yield made["key"]
    finally:
        api.delete(f"/api-keys/{made['id']}").raise_for_status()


def test_a_key_that_may_read_lists_and_does_not_create_or_kill(api, make_sandbox):
    sandbox = make_sandbox()
    with limited(api, "sandboxes:read") as key:
        listed = [each.sandbox_id for each in Sandbox.list(api_key=key).next_items()]
        with pytest.raises(e2b.SandboxException, match="lacks the scope 'sandboxes:write'"):
            Sandbox.create(api_key=key)
        with pytest.raises(e2b.SandboxException, match="sandboxes:write"):
            Sandbox.kill(sandbox.sandbox_id, api_key=key)

    assert sandbox.sandbox_id in listed
    assert sandbox.is_running()


def test_a_key_without_exec_creates_and_kills_but_runs_nothing(api):
    with limited(api, "sandboxes:read", "sandboxes:write") as key:
        sandbox = Sandbox.create(timeout=whole_seconds(600), api_key=key)
        try:
            with pytest.raises((e2b.AuthenticationException, e2b.SandboxException)):
                sandbox.commands.run("true")
            with pytest.raises((e2b.AuthenticationException, e2b.SandboxException)):
                sandbox.files.read("/etc/hostname")
        finally:
            assert Sandbox.kill(sandbox.sandbox_id, api_key=key)


def test_a_keys_limit_is_a_rate_limit_to_clients_and_a_kill_makes_room(api):
    with limited(api, "sandboxes:read", "sandboxes:write", "sandboxes:exec", limit=1) as key:
        first = Sandbox.create(timeout=whole_seconds(600), api_key=key)
        try:
            with pytest.raises(e2b.RateLimitException, match="1 sandbox"):
                Sandbox.create(api_key=key)
            assert first.commands.run("echo mine").stdout == "mine\n"
        finally:
            first.kill(api_key=key)
        Sandbox.create(timeout=whole_seconds(600), api_key=key).kill(api_key=key)


@pytest.mark.parametrize("transport", [over_http, over_stdio])
async def test_tools_refuse_a_key_without_their_scope(emberbox: Emberbox, api, make_sandbox, transport):
    it = {"sandboxID": make_sandbox().sandbox_id}
    with limited(api, "sandboxes:read") as key:
        async with transport(replace(emberbox, api_key=key)) as client:
            assert (await called(client, "e2b-get-sandbox", **it))["state"] == "running"
            assert "'sandboxes:write'" in await refused(client, "e2b-kill-sandbox", **it)
            assert "'sandboxes:exec'" in await refused(client, "e2b-run-command", **it, command="true")


def test_the_command_line_makes_and_shows_limited_keys(host: Host, api):
    made = host.command(
        "key", "create", "agent", "--scope", "sandboxes:read", "--scope", "templates", "--limit", "3", "--json"
    )
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    try:
        shown = host.command("key", "list").stdout
        wrong = host.command("key", "create", "x", "--scope", "everything")
    finally:
        api.delete(f"/api-keys/{key['id']}")

    assert (key["scopes"], key["sandboxLimit"]) == (["sandboxes:read", "templates"], 3)
    line = next(line for line in shown.splitlines() if "agent" in line)
    assert "sandboxes:read templates" in line
    assert wrong.returncode != 0
    assert "there are: sandboxes:read" in wrong.stderr
