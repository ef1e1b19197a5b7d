"""Answers as JSON-LD, for callers that ask for it with `Accept: application/ld+json`."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

LINKED = "application/ld+json"

_COLLECTIONS = {"Sandbox": "sandboxes", "Template": "templates"}


def wants_linked(request: Request) -> bool:
    accepted = (part.split(";")[0].strip().lower() for part in request.headers.get("accept", "").split(","))
    return LINKED in accepted


def address(request: Request) -> str:
    """The scheme, host and port that this request came to."""
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip()
    host = request.headers.get("x-forwarded-host", request.headers.get("host", request.url.netloc))
    return f"{scheme if scheme in ('http', 'https') else 'http'}://{host.split(',')[0].strip()}"


def linked(request: Request, kind: str, thing: BaseModel) -> JSONResponse:
    """`thing` as it is answered otherwise, with its context, its class and an identifier."""
    shown: dict[str, Any] = thing.model_dump(mode="json", exclude_unset=True)
    base = address(request)
    name = kind.lower()
    return JSONResponse(
        {
            "@context": f"{base}/context.jsonld",
            "@id": f"{base}/{_COLLECTIONS[kind]}/{shown[f'{name}ID']}",
            "@type": kind,
            **shown,
        },
        media_type=LINKED,
    )
