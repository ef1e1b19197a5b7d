"""How templates and snapshots are named: `[namespace/]alias[:tag]`, or an ID in the place of the alias."""

from __future__ import annotations

import difflib
import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass

from emberbox.control.errors import Invalid

DEFAULT_TAG = "default"
_PART = re.compile(r"[a-z0-9_-]{1,128}\Z")
_TAG = re.compile(r"[a-z0-9_.-]{1,128}\Z")

_LONGEST_SUGGESTED = 40
_NEAR, _LIKELY = 100, 3
"""Names that are looked at, and those of them that are compared. A comparison takes up to a millisecond with names of
40 characters and up to ten with those of 128, and every other request waits meanwhile."""


@dataclass(frozen=True, slots=True)
class TemplateRef:
    """A reference as a user wrote it, taken apart."""

    namespace: str | None
    name: str
    tag: str | None

    @property
    def tag_or_default(self) -> str:
        return self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        namespace = f"{self.namespace}/" if self.namespace else ""
        tag = f":{self.tag}" if self.tag else ""
        return f"{namespace}{self.name}{tag}"


def parse_ref(text: str) -> TemplateRef:
    """
    Raises:
        Invalid: a part is empty, too long or has a character that names cannot have.
    """
    rest, colon, tag = text.strip().lower().partition(":")
    namespace, slash, name = rest.rpartition("/")
    parts = [name, *([namespace] if slash else [])]
    if not all(_PART.match(part) for part in parts) or (colon and not _TAG.match(tag)):
        raise Invalid(
            f"{text[:200]!r} is not a template name; use [namespace/]name[:tag], each of lower-case letters, "
            "digits, '-' and '_'"
        )
    return TemplateRef(namespace if slash else None, name, tag if colon else None)


def check_tag(tag: str) -> str:
    """The tag, normalised.

    Raises:
        Invalid: it is empty, too long or has a character that tags cannot have.
    """
    normal = tag.strip().lower()
    if not _TAG.match(normal):
        raise Invalid(f"{tag[:200]!r} is not a tag; use 1 to 128 letters, digits, '-', '_' and '.'")
    return normal


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'base'?`, or nothing when no known name is close, or it is long."""
    if len(name) > _LONGEST_SUGGESTED:
        return ""
    short = (other for other in known if len(other) <= _LONGEST_SUGGESTED)
    near = heapq.nsmallest(_NEAR, short, key=lambda other: abs(len(other) - len(name)))
    matcher = difflib.SequenceMatcher(b=name)

    def at_most(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.quick_ratio()

    close = difflib.get_close_matches(name, heapq.nlargest(_LIKELY, near, key=at_most), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
