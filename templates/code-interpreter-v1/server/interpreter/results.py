"""What Jupyter calls a MIME bundle, as the client's `Result`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELDS = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}
_QUOTES = ("'", '"')


def result_event(bundle: Mapping[str, Any], *, main: bool) -> dict[str, Any]:
    """The event for one result or display.

    Args:
        bundle: MIME type -> content, as the kernel sent it.
        main: it is the value of the last expression, not something displayed.
    """
    event: dict[str, Any] = {"type": "result", "is_main_result": main}
    extra: dict[str, Any] = {}
    for mime, content in bundle.items():
        if mime in _FIELDS:
            event[_FIELDS[mime]] = content
        else:
            extra[mime] = content
    if extra:
        event["extra"] = extra
    if "text" in event:
        event["text"] = _bare(event["text"])
    return event


def _bare(text: str) -> str:
    """A string's representation without its quotes, which is what clients show."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in _QUOTES:
        return text[1:-1]
    return text
