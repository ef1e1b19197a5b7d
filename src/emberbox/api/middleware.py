"""What every request passes through: path decoding, body limit, counting. Plain ASGI, as it is on every hot path."""

from __future__ import annotations

import time
from urllib.parse import unquote

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emberbox.api.errors import answer
from emberbox.control.errors import TooLarge

SLASH = "\ue000"
"""Stands for an encoded slash inside a path segment, from the middleware to `paths.py`."""

BODY_LIMIT = 1024 * 1024
"""Bytes of a request's body. Uploads of build files have a route and a limit of their own."""

REQUESTS = Counter("emberbox_http_requests_total", "Requests answered", ["method", "route", "status"])
SECONDS = Histogram(
    "emberbox_http_request_seconds",
    "Time to answer",
    ["method", "route"],
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
)


class EncodedSlashes:
    """Keep `%2F` of a path segment (`templates/team%2Fname`) from splitting the route."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw: bytes = scope.get("raw_path") or b""
            if b"%2f" in raw.lower():
                path = raw.split(b"?", 1)[0].decode("ascii", "replace")
                scope["path"] = unquote(path.replace("%2F", SLASH).replace("%2f", SLASH))
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuse bodies over the limit, declared or not, before they are in memory."""

    def __init__(self, app: ASGIApp, *, exempt: tuple[str, ...] = ()) -> None:
        """Paths that start with one of `exempt` look after their own bodies."""
        self._app = app
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(self._exempt or ("\0",)):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_LIMIT:
            await _too_large(scope, receive, send)
            return
        seen = 0
        exceeded = False

        async def limited() -> Message:
            nonlocal seen, exceeded
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > BODY_LIMIT:
                    exceeded = True
                    raise TooLarge(_SENTENCE)
            return message

        async def watched(message: Message) -> None:
            # The application answers the exception in its own way; ours is the answer that counts.
            if not exceeded:
                await send(message)

        try:
            await self._app(scope, limited, watched)
        except TooLarge:
            if not exceeded:
                raise
        if exceeded:
            await _too_large(scope, receive, send)


class Measured:
    """Count requests by route, and time them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # The route's template, not the path: labels must stay few.
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            REQUESTS.labels(method, route, str(status)).inc()
            SECONDS.labels(method, route).observe(time.perf_counter() - began)


_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"})
_SENTENCE = f"the body is larger than {BODY_LIMIT} bytes; make metadata and environment variables smaller"


async def _too_large(scope: Scope, receive: Receive, send: Send) -> None:
    response = answer(TooLarge(_SENTENCE))
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
