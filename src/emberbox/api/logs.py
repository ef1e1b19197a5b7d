"""Log entries of nodes in the API's words."""

from __future__ import annotations

import json

from emberbox.api.fields import at
from emberbox.api.sandbox_models import SandboxLog, SandboxLogEntry
from emberbox.control.logs import LogLine

_LEVELS = {"debug": "debug", "info": "info", "warn": "warn", "warning": "warn", "error": "error"}


def log_entry(line: LogLine) -> SandboxLogEntry:
    return SandboxLogEntry(
        timestamp=at(line.timestamp_ms),
        level=_LEVELS.get(line.level, "info"),
        message=line.message,
        fields=dict(line.fields),
    )


def log_line(line: LogLine) -> SandboxLog:
    """The older shape: one line of JSON."""
    text = json.dumps({"level": line.level, "message": line.message, **line.fields}, ensure_ascii=False)
    return SandboxLog(timestamp=at(line.timestamp_ms), line=text)
