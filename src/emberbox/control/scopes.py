"""What a credential may do: scopes, and a number of sandboxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from emberbox.control.errors import Forbidden, Invalid

Scope = Literal["sandboxes:read", "sandboxes:write", "sandboxes:exec", "templates", "admin"]

SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class KeyLimit:
    """The key that makes a sandbox, and how many of its sandboxes may live at once; None for any number."""

    key_id: str
    most: int | None


def checked_scopes(scopes: Sequence[str]) -> list[str]:
    """The scopes without repetitions, in the order of `SCOPES`.

    Raises:
        Invalid: one of them does not exist, or there is none.
    """
    for scope in scopes:
        if scope not in SCOPES:
            raise Invalid(f"there is no scope {scope[:64]!r}; there are: {', '.join(SCOPES)}")
    if not scopes:
        raise Invalid(f"a limited key needs at least one scope; there are: {', '.join(SCOPES)}")
    return [scope for scope in SCOPES if scope in scopes]


def missing(scope: Scope) -> Forbidden:
    """The refusal of a key that lacks a scope."""
    return Forbidden(
        f"this API key lacks the scope {scope!r}; use a key that has it, or create one with "
        f"`emberbox key create --scope {scope}`",
        error_code="missing_scope",
    )
