"""The router of every resource module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter


class Router(APIRouter):
    """A router whose answers hold what was set, no more: absent and null are different in E2B's API."""

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["response_model_exclude_unset"] = True
        super().add_api_route(path, endpoint, **options)
