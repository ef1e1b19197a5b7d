"""Which scope each route needs."""

from __future__ import annotations

import re

from emberbox.control.scopes import Scope

_VERSION = re.compile(r"v\d+")

_BY_RESOURCE: dict[str, tuple[Scope, Scope]] = {
    "sandboxes": ("sandboxes:read", "sandboxes:write"),
    "snapshots": ("sandboxes:read", "sandboxes:write"),
    "volumes": ("sandboxes:read", "sandboxes:write"),
    "teams": ("sandboxes:read", "admin"),
    "templates": ("templates", "templates"),
    "default-templates": ("templates", "templates"),
    "shipped-templates": ("templates", "templates"),
    "api-keys": ("admin", "admin"),
    "access-tokens": ("admin", "admin"),
    "secrets": ("admin", "admin"),
}
"""The first segment of a path, without its version -> scopes for reading and for the rest."""

_ANY = frozenset({"health", "mcp"})
"""Every key may: MCP looks at each tool."""


def scope_of(method: str, route: str) -> Scope | None:
    """The scope that a route needs; None for none. What is not known needs `admin`.

    Args:
        route: the path with its parameters' names, e.g. `/sandboxes/{sandboxID}`.
    """
    segments = [segment for segment in route.split("/") if segment and not _VERSION.fullmatch(segment)]
    resource = segments[0] if segments else ""
    if resource in _ANY:
        return None
    reading, writing = _BY_RESOURCE.get(resource, ("admin", "admin"))
    return reading if method in ("GET", "HEAD") else writing
