"""Operations of the contract that are not built yet: declared, checked, and answered with 501."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, Field

from emberbox.api.auth import Team
from emberbox.api.errors import declared
from emberbox.api.fields import PathText, StringMap, Text
from emberbox.api.paging import Limit, NextToken
from emberbox.api.router import Router
from emberbox.control.errors import NotBuilt

router = Router()

_VOLUMES = "volumes are not built yet"
_SECRETS = "secrets are not built yet"
_SECRET_ERRORS = (400, 401, 403, 404, 409, 429, 500, 501, 502, 504)

VolumeID = Annotated[str, Path(max_length=128, description="Identifier of the volume")]


class NewVolume(BaseModel):
    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]+$", max_length=128)]


class Volume(BaseModel):
    volumeID: str
    name: str


class VolumeAndToken(Volume):
    token: str
    domain: str | None = None


class NewSecret(BaseModel):
    name: Annotated[Text, Field(min_length=1, max_length=128, pattern=r"^[a-zA-Z0-9_-]+$")]
    value: Text
    metadata: StringMap | None = None


class SecretUpdate(BaseModel):
    value: Text
    metadata: StringMap | None = None


class Secret(BaseModel):
    secretID: str
    name: str
    currentVersion: int
    metadata: dict[str, str]
    createdAt: datetime
    updatedAt: datetime


@router.get("/volumes", tags=["volumes"], responses=declared(401, 500, 501))
async def list_volumes(team: Team) -> list[Volume]:
    raise NotBuilt(_VOLUMES)


@router.post("/volumes", status_code=201, tags=["volumes"], responses=declared(400, 401, 500, 501))
async def create_volume(body: NewVolume, team: Team) -> VolumeAndToken:
    raise NotBuilt(_VOLUMES)


@router.get("/volumes/{volumeID}", tags=["volumes"], responses=declared(401, 404, 500, 501))
async def get_volume(volumeID: VolumeID, team: Team) -> VolumeAndToken:
    raise NotBuilt(_VOLUMES)


@router.delete("/volumes/{volumeID}", status_code=204, tags=["volumes"], responses=declared(401, 404, 500, 501))
async def delete_volume(volumeID: VolumeID, team: Team) -> None:
    raise NotBuilt(_VOLUMES)


@router.get("/secrets", tags=["secrets"], responses=declared(*_SECRET_ERRORS))
async def list_secrets(team: Team, nextToken: NextToken = None, limit: Limit = 100) -> list[Secret]:
    raise NotBuilt(_SECRETS)


@router.post("/secrets", status_code=201, tags=["secrets"], responses=declared(*_SECRET_ERRORS))
async def create_secret(body: NewSecret, team: Team) -> Secret:
    raise NotBuilt(_SECRETS)


@router.get("/secrets/{secretID}", tags=["secrets"], responses=declared(*_SECRET_ERRORS))
async def get_secret(secretID: PathText, team: Team) -> Secret:
    raise NotBuilt(_SECRETS)


@router.post("/secrets/{secretID}", tags=["secrets"], responses=declared(*_SECRET_ERRORS))
async def update_secret(secretID: PathText, body: SecretUpdate, team: Team) -> Secret:
    raise NotBuilt(_SECRETS)


@router.delete("/secrets/{secretID}", status_code=204, tags=["secrets"], responses=declared(*_SECRET_ERRORS))
async def delete_secret(secretID: PathText, team: Team) -> None:
    raise NotBuilt(_SECRETS)
