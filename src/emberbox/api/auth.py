"""Who asks: `X-API-Key`, `Authorization: Bearer`, or the administrator's `X-Admin-Token` (with `X-Team-ID`)."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from emberbox.api.scopes import scope_of
from emberbox.control.accounts import Principal, check_team_id
from emberbox.control.errors import Unauthorized
from emberbox.control.service import ControlPlane
from emberbox.control.tokens import API_KEY_PREFIX
from emberbox.store.records import TeamRecord


def control_plane(request: Request) -> ControlPlane:
    plane: ControlPlane = request.app.state.control
    return plane


async def principal(request: Request) -> Principal:
    """
    Raises:
        Unauthorized: no credentials, or unknown ones.
        Forbidden: `X-Team-ID` names another team than the credential's, or the key lacks the route's scope.
        TooMany: the team asks too often.
    """
    control: ControlPlane = request.app.state.control
    headers = request.headers
    if key := headers.get("x-api-key"):
        found = await control.accounts.recognise("api_key", key)
    elif bearer := _bearer(headers.get("authorization")):
        kind = "api_key" if bearer.startswith(API_KEY_PREFIX) else "access_token"
        found = await control.accounts.recognise(kind, bearer)  # type: ignore[arg-type]
    elif (admin := headers.get("x-admin-token")) is not None and (team_id := headers.get("x-team-id")):
        _check_admin(control, admin)
        return Principal(await control.accounts.team(team_id), None, None)
    else:
        raise Unauthorized("send an API key in the X-API-Key header")
    check_team_id(found.team, headers.get("x-team-id"))
    control.rates.take(found.team)
    scope = scope_of(request.method, getattr(request.scope.get("route"), "path", ""))
    if scope is not None:
        found.check(scope)
    return found


async def team(who: Annotated[Principal, Depends(principal)]) -> TeamRecord:
    return who.team


async def admin(request: Request) -> None:
    """
    Raises:
        Unauthorized: the admin token is missing, wrong, or none is configured.
    """
    _check_admin(request.app.state.control, request.headers.get("x-admin-token", ""))


Control = Annotated[ControlPlane, Depends(control_plane)]
Team = Annotated[TeamRecord, Depends(team)]
Who = Annotated[Principal, Depends(principal)]


def _check_admin(control: ControlPlane, token: str) -> None:
    if not control.accounts.is_admin(token):
        raise Unauthorized("send the admin token (EMBERBOX_ADMIN_TOKEN of the server) in the X-Admin-Token header")


def _bearer(header: str | None) -> str | None:
    scheme, _, value = (header or "").partition(" ")
    return value.strip() or None if scheme.lower() == "bearer" else None
