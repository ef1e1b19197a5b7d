"""Every route has one scope, or is open to every key on purpose."""

from __future__ import annotations

import pytest

from emberbox.api.app import create_app
from emberbox.api.mcp.protocol import TOOLS
from emberbox.api.scopes import scope_of
from emberbox.control.errors import Invalid
from emberbox.control.scopes import SCOPES, checked_scopes
from emberbox.settings import Settings

# Routes that no key opens: signed links, the administrator's own token, or nothing to protect.
_WITHOUT_KEY = ("/admin/", "/nodes", "/files/", "/health")

_READ = {
    "/default-templates": "templates",
    "/api-keys": "admin",
    "/secrets": "admin",
    "/secrets/{secretID}": "admin",
}
_WRITE = {
    "/access-tokens": "admin",
    "/access-tokens/{accessTokenID}": "admin",
    "/api-keys": "admin",
    "/api-keys/{apiKeyID}": "admin",
    "/secrets": "admin",
    "/secrets/{secretID}": "admin",
}


def _expected(method: str, path: str) -> str:
    if path in (known := _READ if method == "get" else _WRITE):
        return known[path]
    if "templates" in path.split("/"):
        return "templates"
    return "sandboxes:read" if method == "get" else "sandboxes:write"


def test_every_route_needs_the_scope_that_its_resource_has() -> None:
    paths = create_app(Settings()).openapi()["paths"]
    routes = [
        (method, path)
        for path, operations in paths.items()
        for method in operations
        if not path.startswith(_WITHOUT_KEY)
    ]

    assert len(routes) > 50
    found = {route: scope_of(route[0].upper(), route[1]) for route in routes}
    assert found == {route: _expected(*route) for route in routes}


def test_what_is_not_known_needs_admin() -> None:
    assert scope_of("GET", "/v9/something-new") == "admin"
    assert scope_of("GET", "") == "admin"


@pytest.mark.parametrize("path", ["/mcp", "/health"])
def test_every_key_may_ask_for_what_looks_by_itself(path: str) -> None:
    assert scope_of("POST", path) is None


def test_tools_that_work_inside_a_sandbox_need_exec() -> None:
    scopes = {name: tool.scope for name, tool in TOOLS.items()}

    inside = {"run-command", "run-code", "read-file", "write-file", "list-files", "get-url"}
    assert {name for name, scope in scopes.items() if scope == "sandboxes:exec"} == {f"e2b-{name}" for name in inside}
    assert all(scopes[name] == "sandboxes:read" for name, tool in TOOLS.items() if name.startswith("e2b-get-sandbox"))
    assert scopes["e2b-create-sandbox"] == scopes["e2b-fork-sandbox"] == "sandboxes:write"


def test_scopes_are_checked_and_put_in_order() -> None:
    assert checked_scopes(["templates", "sandboxes:read", "templates"]) == ["sandboxes:read", "templates"]
    assert checked_scopes(SCOPES) == list(SCOPES)
    for wrong in (["everything"], []):
        with pytest.raises(Invalid, match="sandboxes:exec"):
            checked_scopes(wrong)
