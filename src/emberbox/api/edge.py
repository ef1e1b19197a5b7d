"""What the edge asks when it knows no route: `POST /edge/wake`. Nobody else: without the secret it is not there."""

from __future__ import annotations

import hmac
from pathlib import Path

import structlog
from fastapi import Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from emberbox.api.auth import Control
from emberbox.api.router import Router
from emberbox.control.edges import route_of
from emberbox.control.errors import ControlError, NotFound

log = structlog.get_logger()

router = Router(include_in_schema=False)


class WakeRequest(BaseModel):
    sandboxID: str
    port: int = 0


@router.post("/edge/wake")
async def wake(request: Request, plane: Control) -> JSONResponse:
    """Where a sandbox is, after resuming it when it is paused and traffic may wake it."""
    if not _is_edge(request, plane.settings.edge_secret_path):
        raise HTTPException(404)
    try:
        asked = WakeRequest.model_validate_json(await request.body())
    except ValueError:
        return _refusal("", 400, "the body is not {sandboxID, port}")
    try:
        record = await plane.lifecycle.wake(asked.sandboxID)
    except NotFound as error:
        # To traffic, a sandbox that is not there is a gateway without a back end; clients know the words.
        return _refusal(asked.sandboxID, 502, error.message)
    except ControlError as error:
        return _refusal(asked.sandboxID, error.status, error.message)
    route = route_of(record, plane.plane.tokens)
    return JSONResponse(
        {
            "sandboxId": record.id,
            "address": route.address,
            "trafficTokenSha256": route.traffic_token_sha256,
            "maskRequestHost": route.mask_request_host,
            "httpsPorts": list(route.https_ports),
        }
    )


def _refusal(sandbox_id: str, status: int, message: str) -> JSONResponse:
    return JSONResponse({"sandboxId": sandbox_id, "message": message, "code": status}, status_code=status)


def _is_edge(request: Request, path: Path) -> bool:
    try:
        # Read each time: `emberbox up` may write a new one, and the file is small and cached by the kernel.
        secret = path.read_text().strip()
    except OSError as error:
        log.warning("edge.secret_unreadable", path=str(path), reason=str(error))
        return False
    sent = request.headers.get("x-edge-secret", "")
    return bool(secret) and hmac.compare_digest(
        sent.encode("utf-8", "surrogateescape"), secret.encode("utf-8", "surrogateescape")
    )
