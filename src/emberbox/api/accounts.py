"""Teams, API keys, access tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query

from emberbox.api.account_models import (
    ApiKey,
    CreatedAccessToken,
    CreatedApiKey,
    MaxTeamMetric,
    Named,
    NewApiKey,
    TeamMetric,
    TeamShown,
    api_key,
    created_access_token,
    created_api_key,
)
from emberbox.api.auth import Control, Team, Who
from emberbox.api.errors import declared
from emberbox.api.fields import UnixSeconds, at
from emberbox.api.router import Router
from emberbox.control.accounts import check_team_id

router = Router()

TeamID = Annotated[str, Path(max_length=64, description="Identifier of the team")]
ApiKeyID = Annotated[str, Path(max_length=64, description="Identifier of the API key")]
Start = Annotated[UnixSeconds | None, Query(description="Start of the interval, unix seconds")]
End = Annotated[UnixSeconds | None, Query(description="End of the interval, unix seconds")]


@router.get("/teams", tags=["auth"], responses=declared(401, 500))
async def teams(team: Team) -> list[TeamShown]:
    """The teams that the credential may act for. Keys are stored hashed, so `apiKey` is empty."""
    return [TeamShown(teamID=team.id, name=team.name, apiKey="", isDefault=team.is_default)]


@router.get("/teams/{teamID}/metrics", tags=["auth"], responses=declared(400, 401, 403, 500))
async def metrics(teamID: TeamID, plane: Control, team: Team, start: Start = None, end: End = None) -> list[TeamMetric]:
    """How many sandboxes the team had over time, oldest first."""
    check_team_id(team, teamID)
    return [
        TeamMetric(
            timestamp=at(record.timestamp_ms),
            timestampUnix=record.timestamp_ms // 1000,
            concurrentSandboxes=record.concurrent_sandboxes,
            sandboxStartRate=record.sandbox_start_rate,
        )
        for record in await plane.metrics.of_team(team, start=start, end=end)
    ]


@router.get("/teams/{teamID}/metrics/max", tags=["auth"], responses=declared(400, 401, 403, 500))
async def metrics_max(
    teamID: TeamID,
    plane: Control,
    team: Team,
    metric: Annotated[Literal["concurrent_sandboxes", "sandbox_start_rate"], Query(description="Which metric")],
    start: Start = None,
    end: End = None,
) -> MaxTeamMetric:
    """The greatest value of a metric in an interval."""
    check_team_id(team, teamID)
    timestamp_ms, value = await plane.metrics.team_maximum(team, metric, start=start, end=end)
    return MaxTeamMetric(timestamp=at(timestamp_ms), timestampUnix=timestamp_ms // 1000, value=value)


@router.get("/api-keys", tags=["api-keys"], responses=declared(401, 500))
async def list_keys(plane: Control, team: Team) -> list[ApiKey]:
    return [api_key(record) for record in await plane.accounts.credentials("api_key", team)]


@router.post("/api-keys", status_code=201, tags=["api-keys"], responses=declared(400, 401, 403, 500))
async def create_key(body: NewApiKey, plane: Control, who: Who) -> CreatedApiKey:
    """A new API key; its value is shown this once. A limited key makes none that may more than it may itself."""
    made = await plane.accounts.add_credential(
        "api_key", who.team, body.name, scopes=body.scopes, sandbox_limit=body.sandboxLimit, by=who
    )
    return created_api_key(made)


@router.patch("/api-keys/{apiKeyID}", tags=["api-keys"], responses=declared(400, 401, 404, 500))
async def rename_key(apiKeyID: ApiKeyID, body: Named, plane: Control, team: Team) -> None:
    await plane.accounts.rename("api_key", team, apiKeyID, body.name)


@router.delete("/api-keys/{apiKeyID}", status_code=204, tags=["api-keys"], responses=declared(401, 404, 500))
async def delete_key(apiKeyID: ApiKeyID, plane: Control, team: Team) -> None:
    await plane.accounts.delete("api_key", team, apiKeyID)


@router.post(
    "/access-tokens",
    status_code=201,
    tags=["access-tokens"],
    responses=declared(400, 401, 410, 500),
    deprecated=True,
)
async def create_token(body: Named, plane: Control, who: Who) -> CreatedAccessToken:
    """A new access token; its value is shown this once."""
    return created_access_token(await plane.accounts.add_credential("access_token", who.team, body.name, by=who))


@router.delete(
    "/access-tokens/{accessTokenID}", status_code=204, tags=["access-tokens"], responses=declared(401, 404, 500)
)
async def delete_token(accessTokenID: Annotated[str, Path(max_length=64)], plane: Control, team: Team) -> None:
    await plane.accounts.delete("access_token", team, accessTokenID)
