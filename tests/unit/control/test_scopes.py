"""Every route has one scope, asks for the administrator's token, or is open on purpose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import iter_route_contexts

from emberbox.api.app import create_app
from emberbox.api.auth import admin, principal
from emberbox.api.mcp.protocol import TOOLS
from emberbox.api.scopes import scope_of
from emberbox.control.errors import Invalid
from emberbox.control.scopes import SCOPES, checked_scopes
from emberbox.settings import Settings

_DESCRIBES = "describes the API and holds nothing of any team"

_OPEN = {
    ("GET", "/health"): "says that the process answers, nothing more",
    ("GET", "/startup"): "how far `base` is; `emberbox up` asks for it",
    ("GET", "/metrics"): "numbers of the whole installation, for Prometheus; of no team and no sandbox",
    ("POST", "/edge/wake"): "asks for the edge's own secret",
    ("PUT", "/files/{teamID}/{hash}"): "the link is signed",
    ("*", "/mcp"): "looks at the key by itself, and at the scope of each tool",
    ("GET", "/openapi.json"): _DESCRIBES,
    ("GET", "/openapi.yml"): _DESCRIBES,
    ("GET", "/docs"): _DESCRIBES,
    ("GET", "/schemas/{name}"): _DESCRIBES,
    ("GET", "/context.jsonld"): _DESCRIBES,
    ("GET", "/capabilities/{name}"): _DESCRIBES,
    ("GET", "/skill.zip"): _DESCRIBES,
    ("GET", "/.well-known/api-catalog"): _DESCRIBES,
    ("GET", "/llms.txt"): _DESCRIBES,
}
"""Routes that no API key and no admin token opens -> why."""

_READ = {
    "/default-templates": "templates",
    "/shipped-templates": "templates",
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
    "/shipped-templates/{name}/builds": "templates",
}


def _routes() -> dict[tuple[str, str], str]:
    """Method and path of every route of the application, in its OpenAPI document or not -> what opens it."""
    found: dict[tuple[str, str], str] = {}
    for route in iter_route_contexts(create_app(Settings()).routes):
        asked = set(_asked(getattr(route, "dependant", None)))
        opened = "key" if principal in asked else "admin token" if admin in asked else "nothing"
        for method in (route.methods or {"*"}) - {"HEAD"}:
            assert (method, str(route.path)) not in found
            found[method, str(route.path)] = opened
    return found


def _asked(dependant: Dependant | None) -> Iterator[Any]:
    """Every function that is called before the route's own, and that."""
    if dependant is not None:
        yield dependant.call
        for before in dependant.dependencies:
            yield from _asked(before)


def _opened_by(what: str) -> set[tuple[str, str]]:
    return {route for route, opened in _routes().items() if opened == what}


def _expected(method: str, path: str) -> str:
    if path in (known := _READ if method == "GET" else _WRITE):
        return known[path]
    if "templates" in path.split("/"):
        return "templates"
    return "sandboxes:read" if method == "GET" else "sandboxes:write"


def test_every_route_that_a_key_opens_needs_the_scope_that_its_resource_has() -> None:
    routes = _opened_by("key")

    assert len(routes) > 50
    assert {route: scope_of(*route) for route in routes} == {route: _expected(*route) for route in routes}


def test_the_admin_token_opens_what_is_the_administrators() -> None:
    routes = _opened_by("admin token")

    assert routes == {route for route in _routes() if route[1].startswith(("/admin/", "/nodes"))}
    assert len(routes) > 5


def test_every_other_route_is_open_for_a_reason() -> None:
    assert _opened_by("nothing") == set(_OPEN)


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
