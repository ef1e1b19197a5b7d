"""Kinds of fields that several resources share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Path
from pydantic import AfterValidator, Field

from emberbox.api.middleware import SLASH


def at(milliseconds: int) -> datetime:
    """A time of the store, for an answer."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def at_or_none(milliseconds: int | None) -> datetime | None:
    return at(milliseconds) if milliseconds is not None else None


def storable(text: str) -> str:
    """The text, when every database can hold it: PostgreSQL has no NUL, and nothing encodes half a surrogate pair.

    Raises:
        ValueError: it cannot.
    """
    if "\0" in text:
        raise ValueError("must not contain a NUL character")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("must be valid Unicode") from None
    return text


def _with_slashes(text: str) -> str:
    return text.replace(SLASH, "/")


Text = Annotated[str, AfterValidator(storable)]
StringMap = dict[Text, Text]

UnixSeconds = Annotated[int, Field(ge=0, le=99_999_999_999)]
UnixMilliseconds = Annotated[int, Field(ge=0, le=99_999_999_999_999)]

PathText = Annotated[str, Path(), AfterValidator(_with_slashes)]
"""A path segment that may hold an encoded slash, such as a template's name."""

SandboxID = Annotated[str, Path(description="Identifier of the sandbox")]

Json = dict[str, Any]
