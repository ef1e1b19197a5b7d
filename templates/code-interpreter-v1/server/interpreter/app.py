"""The HTTP interface that E2B's code interpreter clients use."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel

from interpreter.contexts import Context, Contexts
from interpreter.errors import InterpreterError, Invalid
from interpreter.kernel import Event
from interpreter.sandbox_env import SandboxEnv


class NewContext(BaseModel):
    language: str | None = None
    cwd: str | None = None


class Execution(BaseModel):
    code: str
    context_id: str | None = None
    language: str | None = None
    env_vars: dict[str, str] | None = None


contexts: Contexts
sandbox_env = SandboxEnv()


@contextlib.asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    global contexts
    contexts = Contexts()
    # The server answers when Python runs.
    await contexts.default(None)
    yield
    await contexts.close()


app = FastAPI(title="Code interpreter", lifespan=_lifespan, openapi_url=None)


@app.exception_handler(InterpreterError)
async def _told(_: Request, error: InterpreterError) -> PlainTextResponse:
    return PlainTextResponse(str(error), error.status)


@app.exception_handler(RequestValidationError)
async def _malformed(_: Request, error: RequestValidationError) -> PlainTextResponse:
    first = error.errors()[0]
    return PlainTextResponse(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}", 400)


@app.get("/health")
async def health() -> PlainTextResponse:
    return PlainTextResponse("OK")


@app.get("/contexts")
async def list_contexts() -> list[dict[str, str]]:
    return [context.describe() for context in contexts.all()]


@app.post("/contexts")
async def create_context(body: NewContext) -> dict[str, str]:
    return (await contexts.create(body.language, body.cwd)).describe()


@app.delete("/contexts/{context_id}", status_code=204)
async def remove_context(context_id: str) -> Response:
    await contexts.remove(context_id)
    return Response(status_code=204)


@app.post("/contexts/{context_id}/restart", status_code=204)
async def restart_context(context_id: str) -> Response:
    await contexts.get(context_id).restart()
    return Response(status_code=204)


@app.post("/execute")
async def execute(body: Execution, x_access_token: Annotated[str, Header()] = "") -> StreamingResponse:
    if body.context_id and body.language:
        raise Invalid("give a context or a language, not both")
    for name, value in (body.env_vars or {}).items():
        if not (name.isascii() and name.isidentifier()):
            raise Invalid(f"{name[:64]!r} is no name of an environment variable")
        if "\0" in value:
            raise Invalid(f"the value of {name!r} has a NUL character, which no environment variable can hold")
    context = contexts.get(body.context_id) if body.context_id else await contexts.default(body.language)
    env = await sandbox_env.get(x_access_token)
    return StreamingResponse(_lines(context, body, env), media_type="application/x-ndjson")


async def _lines(context: Context, body: Execution, env: dict[str, str]) -> AsyncIterator[bytes]:
    events = context.run(body.code, env=env, call_env=body.env_vars or {})
    async with contextlib.aclosing(events):
        async for event in events:
            yield _line(event)


def _line(event: Event) -> bytes:
    # Output may have halves of surrogate pairs, which UTF-8 cannot hold; JSON's escapes can.
    return json.dumps(event, separators=(",", ":")).encode() + b"\n"
