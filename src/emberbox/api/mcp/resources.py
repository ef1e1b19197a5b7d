"""What agents may read without calling a tool, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from pydantic import BaseModel

from emberbox.api import sandboxes, templates
from emberbox.api.mcp.tool import Call
from emberbox.control.errors import NotFound

JSON = "application/json"
SANDBOXES = "emberbox://sandboxes"
TEMPLATES = "emberbox://templates"

LISTED = (
    (SANDBOXES, "sandboxes", "The running sandboxes of the team, newest first"),
    (TEMPLATES, "templates", "The templates that sandboxes can be created from"),
)
LOGS = (f"{SANDBOXES}/{{sandboxID}}/logs", "sandbox-logs", "The newest 1000 log entries of a sandbox, newest first")

_LOGS_URI = re.compile(re.escape(SANDBOXES) + r"/([A-Za-z0-9_-]{1,64})/logs")


async def read(call: Call, uri: str) -> str:
    """The resource as JSON.

    Raises:
        Forbidden: the caller's key lacks the scope.
        NotFound: there is no such resource, or no such sandbox.
    """
    if uri == SANDBOXES:
        call.who.check("sandboxes:read")
        return _json(await sandboxes.list_running(call.plane, call.team))
    if uri == TEMPLATES:
        call.who.check("templates")
        return _json(await templates.list_all(call.plane, call.team))
    if found := _LOGS_URI.fullmatch(uri):
        call.who.check("sandboxes:read")
        logs = await sandboxes.logs_v2(found[1], call.plane, call.team, direction="backward")
        return _json(logs.logs)
    raise NotFound(f"there is no resource {uri[:200]!r}; there are {SANDBOXES}, {TEMPLATES} and {LOGS[0]}")


def _json(items: Iterable[BaseModel]) -> str:
    return json.dumps([item.model_dump(mode="json", exclude_unset=True) for item in items], ensure_ascii=False)
