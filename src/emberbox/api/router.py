"""The router of every resource module."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, get_args, get_type_hints

from fastapi import APIRouter
from starlette.responses import Response


class Router(APIRouter):
    """A router whose answers hold what was set, no more: absent and null are different in E2B's API.

    A handler may return a model or a ready `Response`; the model is what is declared.
    """

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        options["response_model_exclude_unset"] = True
        models = get_args(get_type_hints(endpoint).get("return"))
        if Response in models:
            options["response_model"] = reduce(or_, (model for model in models if model is not Response))
        super().add_api_route(path, endpoint, **options)
