"""Teams and their credentials: made, listed, renamed, deleted, and recognised in a request."""

from __future__ import annotations

import hmac
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.errors import Forbidden, Invalid, NotFound, Unauthorized
from emberbox.control.scopes import KeyLimit, Scope, checked_scopes, missing
from emberbox.control.tokens import (
    ACCESS_TOKEN_PREFIX,
    API_KEY_PREFIX,
    hash_secret,
    new_secret,
)
from emberbox.settings import Settings
from emberbox.store import teams as rows
from emberbox.store.engine import Store
from emberbox.store.records import CredentialRecord, TeamRecord
from emberbox.store.teams import CredentialKind

log = structlog.get_logger()

_PREFIXES: dict[CredentialKind, str] = {"api_key": API_KEY_PREFIX, "access_token": ACCESS_TOKEN_PREFIX}
_REMEMBER_SECONDS = 2.0
"""How long another process's deletion of a key may go unnoticed."""
_REMEMBER_MOST = 10_000
_LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks. `credential` is None for the administrator, who may act for a team."""

    team: TeamRecord
    kind: CredentialKind | None
    credential: CredentialRecord | None

    def may(self, scope: Scope) -> bool:
        scopes = self.credential.scopes if self.credential is not None else None
        return scopes is None or scope in scopes

    def check(self, scope: Scope) -> None:
        """
        Raises:
            Forbidden: the credential lacks the scope.
        """
        if not self.may(scope):
            raise missing(scope)

    @property
    def key_limit(self) -> KeyLimit | None:
        """What is written down and counted for sandboxes that it makes; None for all but API keys."""
        if self.credential is None or self.kind != "api_key":
            return None
        return KeyLimit(self.credential.id, self.credential.sandbox_limit)


@dataclass(frozen=True, slots=True)
class NewCredential:
    """A credential that was just made, with the value that is shown once."""

    record: CredentialRecord
    value: str


class Accounts:
    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._remembered: dict[tuple[CredentialKind, str], tuple[float, Principal]] = {}
        self._used: dict[CredentialKind, dict[str, int]] = {"api_key": {}, "access_token": {}}

    # ---- recognising

    async def recognise(self, kind: CredentialKind, value: str) -> Principal:
        """Who has this API key or access token.

        Raises:
            Unauthorized: nobody.
        """
        hashed = hash_secret(value)
        now = time.monotonic()
        remembered = self._remembered.get((kind, hashed))
        if remembered is not None and now - remembered[0] < _REMEMBER_SECONDS:
            principal = remembered[1]
        else:
            found = await rows.find_credential(self._store, kind, hashed)
            if found is None:
                self._remembered.pop((kind, hashed), None)
                raise Unauthorized(_UNKNOWN[kind])
            principal = Principal(found[1], kind, found[0])
            if len(self._remembered) >= _REMEMBER_MOST:
                self._remembered.clear()
            self._remembered[kind, hashed] = (now, principal)
        assert principal.credential is not None
        self._used[kind][principal.credential.id] = now_ms()
        return principal

    def forget(self) -> None:
        """Look every credential up again at its next use."""
        self._remembered.clear()

    def is_admin(self, token: str) -> bool:
        expected = self._settings.admin_token
        return bool(expected) and hmac.compare_digest(
            token.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape")
        )

    async def record_use(self) -> None:
        """Write down when credentials were last used. Called now and then, not on each request."""
        for kind, used in self._used.items():
            if used:
                self._used[kind] = {}
                await rows.touch_credentials(self._store, kind, used)

    # ---- teams

    async def team(self, team_id: str) -> TeamRecord:
        """
        Raises:
            NotFound: no such team.
        """
        team = await rows.get_team(self._store, team_id) if _is_uuid(team_id) else None
        if team is None:
            raise NotFound(f"team {team_id[:64]!r} was not found")
        return team

    async def teams(self) -> list[TeamRecord]:
        return await rows.list_teams(self._store)

    async def add_team(self, name: str, slug: str, *, is_default: bool = False) -> TeamRecord:
        """
        Raises:
            DuplicateName: another team has the slug.
        """
        settings = self._settings
        team = TeamRecord(
            id=str(uuid.uuid4()),
            name=name,
            slug=slug,
            is_default=is_default,
            max_sandboxes=settings.max_sandboxes,
            max_timeout_seconds=settings.max_timeout_seconds,
            rate_per_second=settings.rate_per_second,
            rate_burst=settings.rate_burst,
            created_at=now_ms(),
        )
        await rows.add_team(self._store, team)
        return team

    # ---- credentials

    async def add_credential(
        self,
        kind: CredentialKind,
        team: TeamRecord,
        name: str,
        *,
        scopes: Sequence[str] | None = None,
        sandbox_limit: int | None = None,
        by: Principal | None = None,
    ) -> NewCredential:
        """A new API key or access token of a team.

        Args:
            scopes: what it may do; None for everything.
            sandbox_limit: how many sandboxes that it made may live at once; None for as many as the team may have.
            by: who asks; the new one may do no more than it.

        Raises:
            Forbidden: it would.
            Invalid: the name is empty or too long, there is no such scope, or the limit is below 1.
        """
        if sandbox_limit is not None and sandbox_limit < 1:
            raise Invalid(f"a key's limit of sandboxes is at least 1, not {sandbox_limit}")
        if by is not None:
            _check_not_wider(by, scopes)
        secret = new_secret(_PREFIXES[kind])
        record = CredentialRecord(
            id=str(uuid.uuid4()),
            team_id=team.id,
            name=_checked_name(name),
            hash=secret.hash,
            prefix=secret.prefix,
            value_length=secret.value_length,
            masked_prefix=secret.masked_prefix,
            masked_suffix=secret.masked_suffix,
            scopes=checked_scopes(scopes) if scopes is not None else None,
            sandbox_limit=sandbox_limit,
            created_at=now_ms(),
            last_used_at=None,
        )
        await rows.add_credential(self._store, kind, record)
        log.info("credential.created", kind=kind, credential_id=record.id, team_id=team.id)
        return NewCredential(record, secret.value)

    async def credentials(self, kind: CredentialKind, team: TeamRecord | None) -> list[CredentialRecord]:
        return await rows.list_credentials(self._store, kind, team.id if team else None)

    async def rename(self, kind: CredentialKind, team: TeamRecord, credential_id: str, name: str) -> None:
        """
        Raises:
            NotFound: the team has no such credential.
            Invalid: the name is empty or too long.
        """
        checked = _checked_name(name)
        if not _is_uuid(credential_id) or not await rows.rename_credential(
            self._store, kind, team.id, credential_id, checked
        ):
            raise NotFound(f"{_CALLED[kind]} {credential_id[:64]!r} was not found")

    async def delete(self, kind: CredentialKind, team: TeamRecord | None, credential_id: str) -> None:
        """
        Raises:
            NotFound: the team has no such credential.
        """
        deleted = (
            await rows.delete_credential(self._store, kind, team.id if team else None, credential_id)
            if _is_uuid(credential_id)
            else None
        )
        if deleted is None:
            raise NotFound(f"{_CALLED[kind]} {credential_id[:64]!r} was not found")
        self._remembered.pop((kind, deleted.hash), None)
        log.info("credential.deleted", kind=kind, credential_id=credential_id, team_id=deleted.team_id)


_CALLED: dict[CredentialKind, str] = {"api_key": "API key", "access_token": "access token"}
_UNKNOWN: dict[CredentialKind, str] = {
    "api_key": "this API key is not known; create one with `emberbox key create` and send it as X-API-Key",
    "access_token": "this access token is not known; send an API key as X-API-Key instead",
}


def check_team_id(team: TeamRecord, team_id: str | None) -> None:
    """
    Raises:
        Forbidden: the request names another team than the credential's.
    """
    if team_id is not None and team.id != team_id:
        raise Forbidden(f"the credential does not belong to team {team_id[:64]!r}")


def _check_not_wider(by: Principal, scopes: Sequence[str] | None) -> None:
    """
    Raises:
        Forbidden: a credential with these scopes could do what `by` cannot.
    """
    if by.credential is None:
        return
    own = by.credential.scopes
    if own is not None and (scopes is None or not set(scopes) <= set(own)):
        raise Forbidden(f"this key may make keys of its own scopes at most; give `scopes` out of: {', '.join(own)}")
    if by.credential.sandbox_limit is not None:
        # Several keys of its own limit would be a way around it.
        raise Forbidden("a key with a limit of sandboxes makes no other keys")


def _checked_name(name: str) -> str:
    if not name.strip() or len(name) > _LONGEST_NAME:
        raise Invalid(f"name must have 1 to {_LONGEST_NAME} characters")
    return name


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False
