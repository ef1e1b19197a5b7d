"""Bodies of the team, key and token operations. Field names are the API's."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from emberbox.api.fields import Text, at, at_or_none
from emberbox.api.template_models import TeamUser
from emberbox.control.accounts import NewCredential
from emberbox.store.records import CredentialRecord


class Mask(BaseModel):
    """What may be shown of a credential."""

    prefix: str
    valueLength: int
    maskedValuePrefix: str
    maskedValueSuffix: str


class Named(BaseModel):
    name: Text


class NewApiKey(Named):
    # A limit under a name that we do not know must not make a key without one.
    model_config = ConfigDict(extra="forbid")

    scopes: Annotated[list[Text] | None, Field(max_length=20, description="What it may do; all when left out")] = None
    sandboxLimit: Annotated[
        int | None, Field(ge=1, le=1_000_000, description="How many sandboxes that it made may live at once")
    ] = None


class TeamShown(BaseModel):
    teamID: str
    name: str
    apiKey: str
    isDefault: bool


class TeamMetric(BaseModel):
    timestamp: datetime
    timestampUnix: int
    concurrentSandboxes: int
    sandboxStartRate: float


class MaxTeamMetric(BaseModel):
    timestamp: datetime
    timestampUnix: int
    value: float


class ApiKey(BaseModel):
    id: str
    name: str
    mask: Mask
    createdAt: datetime
    createdBy: TeamUser | None = None
    lastUsed: datetime | None = None
    scopes: list[str] | None = None
    """Left out: all of them."""
    sandboxLimit: int | None = None


class CreatedApiKey(ApiKey):
    key: str


class CreatedAccessToken(BaseModel):
    id: str
    name: str
    token: str
    mask: Mask
    createdAt: datetime


def api_key(record: CredentialRecord) -> ApiKey:
    return ApiKey(**_key(record))


def created_api_key(made: NewCredential) -> CreatedApiKey:
    return CreatedApiKey(**_key(made.record), key=made.value)


def created_access_token(made: NewCredential) -> CreatedAccessToken:
    record = made.record
    return CreatedAccessToken(
        id=record.id, name=record.name, token=made.value, mask=_mask(record), createdAt=at(record.created_at)
    )


def _key(record: CredentialRecord) -> dict[str, Any]:
    shown = {
        "id": record.id,
        "name": record.name,
        "mask": _mask(record),
        "createdAt": at(record.created_at),
        "createdBy": None,
        "lastUsed": at_or_none(record.last_used_at),
    }
    if record.scopes is not None:
        shown["scopes"] = record.scopes
    if record.sandbox_limit is not None:
        shown["sandboxLimit"] = record.sandbox_limit
    return shown


def _mask(record: CredentialRecord) -> Mask:
    return Mask(
        prefix=record.prefix,
        valueLength=record.value_length,
        maskedValuePrefix=record.masked_prefix,
        maskedValueSuffix=record.masked_suffix,
    )
