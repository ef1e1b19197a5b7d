"""What an agent reads to find its way: OpenAPI, schemas, capability files, the catalogue of all of them, `llms.txt`.

None of these needs a key: they describe the API and hold nothing of any team. Addresses in them are the one that the
request came to, so that they are right behind any name and proxy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml
from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse

from emberbox.api.capabilities.catalogue import CAPABILITIES
from emberbox.api.capabilities.pages import operations_page
from emberbox.api.capabilities.schemas import context, sandbox_schema, template_schema
from emberbox.api.capabilities.skill import skill_zip
from emberbox.api.capabilities.specification import specification
from emberbox.api.linked import LINKED, address
from emberbox.api.router import Router
from emberbox.control.errors import NotFound

router = Router(include_in_schema=False)

_SCHEMA = "application/schema+json"
_YAML = "application/yaml"
_LINKSET = "application/linkset+json"

_SCHEMAS: dict[str, Callable[[str], dict[str, Any]]] = {
    "sandbox.json": sandbox_schema,
    "template.json": template_schema,
}


@router.get("/openapi.yml")
async def openapi_yaml(request: Request) -> Response:
    """The OpenAPI document of what is really served."""
    return Response(yaml.safe_dump(request.app.openapi(), sort_keys=False), media_type=_YAML)


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The same document as a page, with no asset from elsewhere."""
    return HTMLResponse(operations_page(request.app.openapi()))


@router.get("/schemas/{name}")
async def schema(name: str, request: Request) -> Response:
    """A JSON Schema (draft 2020-12)."""
    found = _SCHEMAS.get(name)
    if found is None:
        raise NotFound(f"there is no schema {name[:64]!r}; there are {', '.join(sorted(_SCHEMAS))}")
    return JSONResponse(found(address(request)), media_type=_SCHEMA)


@router.get("/context.jsonld")
async def linked_context(request: Request) -> Response:
    """The JSON-LD context."""
    return JSONResponse(context(address(request)), media_type=LINKED)


@router.get("/capabilities/{name}")
async def capability(name: str, request: Request) -> Response:
    """A capability specification, with this installation's address."""
    for one in CAPABILITIES:
        if name == f"{one.name}.yaml":
            document = specification(one, address(request))
            return Response(yaml.safe_dump(document, sort_keys=False, width=120), media_type=_YAML)
    names = ", ".join(f"{one.name}.yaml" for one in CAPABILITIES)
    raise NotFound(f"there is no capability {name[:64]!r}; there are {names}")


@router.get("/skill.zip")
async def skill() -> Response:
    """The Agent Skill as an archive."""
    return Response(
        skill_zip(), media_type="application/zip", headers={"Content-Disposition": "attachment; filename=emberbox.zip"}
    )


@router.get("/.well-known/api-catalog")
async def api_catalog(request: Request) -> Response:
    """Where everything is (RFC 9727)."""
    base = address(request)
    document = {
        "linkset": [
            {
                "anchor": f"{base}/",
                "service-desc": [
                    {"href": f"{base}/openapi.json", "type": "application/json"},
                    {"href": f"{base}/openapi.yml", "type": _YAML},
                    *({"href": f"{base}/capabilities/{one.name}.yaml", "type": _YAML} for one in CAPABILITIES),
                ],
                "service-doc": [
                    {"href": f"{base}/docs", "type": "text/html"},
                    {"href": f"{base}/llms.txt", "type": "text/plain"},
                    {"href": f"{base}/skill.zip", "type": "application/zip"},
                ],
                "service-meta": [
                    *({"href": f"{base}/schemas/{name}", "type": _SCHEMA} for name in sorted(_SCHEMAS)),
                    {"href": f"{base}/context.jsonld", "type": LINKED},
                ],
                "status": [{"href": f"{base}/health"}],
            }
        ]
    }
    return Response(json.dumps(document), media_type=_LINKSET)


@router.get("/llms.txt")
async def llms(request: Request) -> PlainTextResponse:
    """A page for language models: what this is and where to read on."""
    base = address(request)
    lines = [
        "# Emberbox",
        "",
        "> Isolated Linux sandboxes for AI agents: create one, run commands and code in it, move files, expose ports,",
        "> pause it and go on later. Every request needs an API key in the `X-API-Key` header.",
        "",
        "## Documents",
        "",
        f"- [OpenAPI]({base}/openapi.json): every operation ([as a page]({base}/docs), [as YAML]({base}/openapi.yml))",
        f"- [MCP]({base}/mcp): the same for agents, as tools over streamable HTTP",
        f"- [Agent Skill]({base}/skill.zip): instructions and small scripts, Python 3 only",
        *(f"- [{one.label}]({base}/capabilities/{one.name}.yaml): {one.description}" for one in CAPABILITIES),
        f"- [Sandbox schema]({base}/schemas/sandbox.json), [template schema]({base}/schemas/template.json),"
        f" [JSON-LD context]({base}/context.jsonld)",
        "",
        "## Operations",
        "",
    ]
    lines += [
        f"- `{operation.method} {operation.path}`: {operation.description}"
        for one in CAPABILITIES
        for operation in one.operations
    ]
    return PlainTextResponse("\n".join(lines) + "\n")
