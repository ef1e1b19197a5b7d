"""Every error answer of the API is made here: `{"code", "message", "error_code"?}` and an explicit `Should-Retry`."""

from __future__ import annotations

from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from emberbox.control.errors import ControlError
from emberbox.store.errors import rows_collide

log = structlog.get_logger()


class Error(BaseModel):
    """The shape of every error answer."""

    code: int
    message: str
    error_code: str | None = None


def answer(error: ControlError) -> JSONResponse:
    """The answer to a failed request."""
    return _answer(
        error.status,
        error.message,
        error_code=error.error_code,
        should_retry=error.should_retry,
        retry_after=error.retry_after,
    )


def error_body(error: ControlError) -> Error:
    """The error inside an answer that reports several outcomes."""
    return Error(code=error.status, message=error.message)


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers that a route declares."""
    return {status: {"model": Error, "description": _DESCRIPTIONS[status]} for status in (*statuses, 429)}


def install(app: FastAPI) -> None:
    """Have every exception answered in the one shape."""
    app.add_exception_handler(ControlError, _on_control_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(SQLAlchemyError, _on_store_error)
    app.add_exception_handler(Exception, _on_fault)


_DESCRIPTIONS = {
    400: "Bad request",
    401: "Authentication error",
    403: "Forbidden",
    404: "Not found",
    409: "Conflict",
    410: "Gone",
    413: "Request body too large",
    422: "Idempotency key used with another body",
    429: "Too many requests",
    500: "Server error",
    501: "Not built yet",
    502: "Backend error",
    503: "Service unavailable",
    504: "Backend timeout",
    507: "No room on the disk",
}


def _answer(
    status: int,
    message: str,
    *,
    error_code: str | None = None,
    should_retry: bool = False,
    retry_after: int | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {"code": status, "message": message}
    if error_code is not None:
        body["error_code"] = error_code
    sent = {**(headers or {}), "Should-Retry": "true" if should_retry else "false"}
    if retry_after is not None:
        sent["Retry-After"] = str(retry_after)
    return JSONResponse(body, status_code=status, headers=sent)


async def _on_control_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ControlError)
    return answer(error)


async def _on_invalid_request(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(400, _sentence(error))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"there is no {request.method} {request.url.path[:200]}"
    elif error.status_code == 405:
        message = f"{request.url.path[:200]} does not take {request.method}"
    return _answer(error.status_code, message, headers=dict(error.headers or {}))


async def _on_store_error(request: Request, error: Exception) -> JSONResponse:
    """The database is away, locked or full. What was asked is undone, or finished when it is back.

    Or the rows do not fit together any more, as when a template is deleted while a build is added to it. A row that
    could never be stored is a fault.
    """
    if isinstance(error, IntegrityError):
        if not rows_collide(error):
            return await _on_fault(request, error)
        log.warning("store.conflict", method=request.method, path=request.url.path, exc_info=error)
        return _answer(409, "something of this was changed or deleted at the same moment; try again", should_retry=True)
    log.error("store.failed", method=request.method, path=request.url.path, exc_info=error)
    return _answer(503, "the database cannot be used at the moment; try again", should_retry=True)


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    log.error("request.failed", method=request.method, path=request.url.path, exc_info=error)
    return _answer(500, "internal error; the server's log says more", error_code="internal_server_error")


def _sentence(error: RequestValidationError) -> str:
    """The first few problems as `body.timeout: Input should be ...`."""
    parts: list[str] = []
    for problem in error.errors()[:5]:
        kind = problem.get("type", "")
        if kind == "json_invalid":
            return f"the body is not JSON: {problem.get('ctx', {}).get('error', 'cannot be parsed')}"
        if kind == "model_attributes_type" and problem.get("loc") == ("body",):
            return "the body is not a JSON object; send one with Content-Type: application/json"
        where = ".".join(str(part) for part in problem.get("loc", ()))
        parts.append(f"{where[:200]}: {problem.get('msg', 'invalid')}")
    return "; ".join(parts) or "the request is not valid"
