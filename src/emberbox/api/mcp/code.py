"""The tool that runs code in a sandbox of the code interpreter."""

from __future__ import annotations

import time
from typing import Annotated, Any

import anyio
from pydantic import BaseModel, Field

from emberbox.api.agent_client import AgentError, Target
from emberbox.api.fields import StringMap, Text
from emberbox.api.mcp.clipped import Clipped
from emberbox.api.mcp.tool import Call, Tool
from emberbox.api.mcp.tools import OneSandbox
from emberbox.api.mcp.work import PROGRESS_SECONDS, SHOWN_OUTPUT, target_of

INTERPRETER_PORT = 49999
TEMPLATE = "code-interpreter-v1"

_PICTURES = ("png", "jpeg", "pdf", "svg")
_SHOWN = ("text", "html", "markdown", "latex", "json", "javascript", "data", "chart")


class RunCode(OneSandbox):
    code: Annotated[Text, Field(min_length=1, description="Variables live on from call to call")]
    language: Annotated[
        str, Field(max_length=64, description="python, javascript, typescript, bash or r; each keeps its own variables")
    ] = "python"
    envVars: Annotated[StringMap | None, Field(description="Environment variables for this call alone")] = None
    timeout: Annotated[float, Field(gt=0, le=86400, description="Seconds until the code is interrupted")] = 60


class CodeError(BaseModel):
    name: str
    value: str
    traceback: str


class CodeDisplay(BaseModel):
    """One value or display: its forms that are text, and the names of all."""

    formats: list[str]
    text: str | None = None
    html: str | None = None
    markdown: str | None = None
    latex: str | None = None
    jsonValue: Any = None
    javascript: str | None = None
    data: Any = None
    chart: Any = None


class CodeResult(BaseModel):
    text: str | None = None
    """The value of the last expression."""
    stdout: str = ""
    stderr: str = ""
    results: list[CodeDisplay] = []
    error: CodeError | None = None
    timedOut: bool = False
    truncated: bool = False
    note: str | None = None


async def _run_code(call: Call, asked: RunCode) -> CodeResult:
    target = await target_of(call, asked.sandboxID, None)
    heard = _Heard()
    body = {"code": asked.code, "language": asked.language, "env_vars": asked.envVars}
    failure: AgentError | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(_tell_progress, call, heard)
        # Leaving the stream is what interrupts the code.
        with anyio.move_on_after(asked.timeout) as limit:
            try:
                await _execute(call, target, body, heard)
            except AgentError as error:
                failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return heard.result(asked.timeout if limit.cancelled_caught else None)


async def _execute(call: Call, target: Target, body: dict[str, Any], heard: _Heard) -> None:
    try:
        async with call.agent.json_lines(target, INTERPRETER_PORT, "/execute", body) as events:
            async for event in events:
                heard.take(event)
    except AgentError as error:
        if "port is not open" not in error.message:
            raise
        raise AgentError(
            f"sandbox {target.sandbox_id} has no code interpreter; create one from the template {TEMPLATE!r}"
        ) from None


async def _tell_progress(call: Call, heard: _Heard) -> None:
    began = time.monotonic()
    while True:
        await anyio.sleep(PROGRESS_SECONDS)
        seconds = time.monotonic() - began
        await call.progress(round(seconds, 1), f"running for {seconds:.0f} s; {heard.output} bytes of output")


class _Heard:
    """What has been heard of an execution."""

    def __init__(self) -> None:
        self._streams = {"stdout": Clipped(SHOWN_OUTPUT), "stderr": Clipped(SHOWN_OUTPUT)}
        self._told: dict[str, Any] = {}
        self._results: list[dict[str, Any]] = []
        self._shown = 0
        self._notes: list[str] = []

    @property
    def output(self) -> int:
        return sum(stream.total for stream in self._streams.values())

    def take(self, event: dict[str, Any]) -> None:
        match event.get("type"):
            case "stdout" | "stderr":
                self._streams[event["type"]].add(event["text"].encode(errors="replace"))
            case "error":
                self._told["error"] = {name: event.get(name, "") for name in ("name", "value", "traceback")}
            case "result":
                self._take_result(event)

    def _take_result(self, event: dict[str, Any]) -> None:
        if event.get("is_main_result"):
            self._told["text"] = event.get("text")
        formats = [name for name in (*_SHOWN, *_PICTURES) if event.get(name)] + sorted(event.get("extra") or {})
        shown: dict[str, Any] = {"formats": formats}
        for name in _SHOWN:
            size = len(str(event.get(name) or ""))
            if size and self._shown + size <= SHOWN_OUTPUT:
                self._shown += size
                shown["jsonValue" if name == "json" else name] = event[name]
            elif size:
                self._note(f"{name} of a result left out: {size} characters")
        if any(name in formats for name in _PICTURES):
            self._note("pictures are left out: save them to a file in the code, and read that with e2b-read-file")
        self._results.append(shown)

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def result(self, timed_out_after: float | None) -> CodeResult:
        told = {**self._told, **{name: stream.text() for name, stream in self._streams.items()}}
        if self._results:
            told["results"] = self._results
        if timed_out_after is not None:
            told["timedOut"] = True
            self._note(f"interrupted after {timed_out_after:g} s; variables that were set before live on")
        for name, stream in self._streams.items():
            if stream.left_out:
                told["truncated"] = True
                self._note(f"{stream.left_out} bytes of {name} left out in the middle; write them to a file instead")
        if self._notes:
            told["note"] = "; ".join(self._notes)
        return CodeResult.model_validate(told)


RUN_CODE = Tool(
    "e2b-run-code",
    "Run code",
    f"Run code in a sandbox of the template {TEMPLATE}: its output, the value of its last expression, displays, error.",
    RunCode,
    CodeResult,
    _run_code,
    read_only=False,
    destructive=True,
    idempotent=False,
    scope="sandboxes:exec",
)
