"""What a tool is, whoever lists or calls it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict

from emberbox.api.agent_client import AgentClient
from emberbox.control.accounts import Principal
from emberbox.control.scopes import Scope
from emberbox.control.service import ControlPlane
from emberbox.store.records import TeamRecord


async def _unheard(_seconds: float, _message: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls a tool, and what the tool works with."""

    plane: ControlPlane
    who: Principal
    agent: AgentClient
    progress: Callable[[float, str], Awaitable[None]] = _unheard
    """Tell the caller how many seconds have passed, and what happens."""

    @property
    def team(self) -> TeamRecord:
        return self.who.team


class Input(BaseModel):
    """Arguments of a tool. An argument that it does not have is an error, not ignored: agents guess names."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    title: str
    description: str
    input: type[BaseModel]
    output: type[BaseModel]
    run: Callable[[Call, Any], Awaitable[BaseModel]]
    read_only: bool
    destructive: bool
    idempotent: bool
    scope: Scope
    """What a key needs to call it."""
    descriptions: dict[str, str] = field(default_factory=dict)
    """Of input fields, where the model has none."""

    def input_schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = _plain(self.input.model_json_schema())
        for name, description in self.descriptions.items():
            schema["properties"][name]["description"] = description
        return schema

    def output_schema(self) -> dict[str, Any]:
        """Fields that are left out when they do not apply are not required, as in the REST API."""
        return self.output.model_json_schema()

    async def call(self, call: Call, arguments: dict[str, Any]) -> dict[str, Any]:
        """The structured answer.

        Raises:
            Forbidden: the caller's key lacks the scope.
            pydantic.ValidationError: the arguments do not fit.
            ControlError: it cannot be done.
        """
        call.who.check(self.scope)
        answer = await self.run(call, self.input.model_validate(_flat(arguments)))
        return answer.model_dump(mode="json", exclude_unset=True)


def _plain(schema: Any) -> Any:
    """Optional fields as their type alone: `null` is understood, but models and simple clients do better without."""
    if isinstance(schema, list):
        return [_plain(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _plain(value) for name, value in schema.items()}
    variants = plain.get("anyOf")
    if isinstance(variants, list) and {"type": "null"} in variants and len(variants) == 2:
        (only,) = (variant for variant in variants if variant != {"type": "null"})
        del plain["anyOf"]
        if plain.get("default", ...) is None:
            del plain["default"]
        return {**only, **plain}
    return plain


def _flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """The published tools take a `body` beside the ID; ours take its fields. Understand both."""
    body = arguments.get("body")
    if isinstance(body, dict):
        return {**body, **{name: value for name, value in arguments.items() if name != "body"}}
    return arguments
