"""Structured logs, the same in every role.

Events go to standard error: one JSON object a line, or coloured text when a person is looking (`log_format=auto`).
Records of libraries that use the standard `logging` module pass through the same renderer.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog

from emberbox.settings import Settings

_SECRET_KEYS = frozenset(
    {"access_token", "traffic_token", "api_key", "authorization", "x-api-key", "x-access-token", "password", "token"}
)


def configure_logging(role: str, settings: Settings) -> None:
    """Set up structlog and the standard `logging` module for this process.

    Every event carries `role`. Call it once, before the first event; calling it again replaces the set-up.
    """
    level = getattr(logging, settings.log_level.upper())
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_role(role),
        _hide_secrets,
    ]
    exceptions: list[structlog.typing.Processor] = [] if text else [structlog.processors.format_exc_info]
    renderer: structlog.typing.Processor = (
        # Plain tracebacks: the rich ones print every local variable, secrets among them, and take seconds.
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        if text
        else structlog.processors.JSONRenderer()
    )

    structlog.configure(
        processors=[*shared, *exceptions, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *exceptions, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries are quiet unless something is wrong; their debug output would drown our events.
    root.setLevel(max(level, logging.WARNING))


def _add_role(role: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("role", role)
        return event

    return add


def _hide_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """A last net under the rule that tokens are never logged."""
    for key in event:
        if key.lower() in _SECRET_KEYS:
            event[key] = "[hidden]"
    return event
