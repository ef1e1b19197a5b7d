"""Credentials: API keys and access tokens (random, stored hashed) and sandbox tokens (derived, not stored).

A sandbox's tokens must be told again on every connect, so a hash would not do. They are HMACs of the sandbox ID under
a key of the installation that lies beside the database, readable by the api user alone.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

API_KEY_PREFIX = "e2b_"
ACCESS_TOKEN_PREFIX = "sk_e2b_"
_SHOWN_CHARACTERS = 4
_KEY_BYTES = 32
_SANDBOX_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True)
class Secret:
    """A fresh credential: shown to its owner once, stored as `hash` and the mask."""

    value: str
    hash: str
    prefix: str
    value_length: int
    masked_prefix: str
    masked_suffix: str


def new_secret(prefix: str) -> Secret:
    """A new API key or access token: `prefix` and 40 hex digits (the format that E2B's clients check)."""
    body = secrets.token_hex(20)
    return Secret(
        value=prefix + body,
        hash=hash_secret(prefix + body),
        prefix=prefix,
        value_length=len(body),
        masked_prefix=body[:_SHOWN_CHARACTERS],
        masked_suffix=body[-_SHOWN_CHARACTERS:],
    )


def hash_secret(value: str) -> str:
    """SHA-256, hex. The values have 160 random bits, so a slow hash would add nothing."""
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()


def new_sandbox_id() -> str:
    """`i` and 19 characters of [a-z0-9]: a host label without a dash, as host names are split at the first one."""
    return "i" + "".join(secrets.choice(_SANDBOX_ID_ALPHABET) for _ in range(19))


def new_template_id() -> str:
    """20 characters of [a-z0-9]."""
    return "".join(secrets.choice(_SANDBOX_ID_ALPHABET) for _ in range(20))


class SandboxTokens:
    """Derives the tokens of sandboxes from the installation's key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def load(cls, path: Path) -> SandboxTokens:
        """Read the installation's key, making it on the first call."""
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = _create_key(path)
        if len(key) != _KEY_BYTES:
            raise ValueError(f"{path} holds {len(key)} bytes, not {_KEY_BYTES}; restore it from a backup")
        return cls(key)

    def agent(self, sandbox_id: str) -> str:
        """The token that the sandbox's agent asks for (`X-Access-Token`)."""
        return self._derive("agent", sandbox_id)

    def traffic(self, sandbox_id: str) -> str:
        """The token that the edge asks for when public traffic is off."""
        return self._derive("traffic", sandbox_id)

    def sign(self, purpose: str, text: str) -> str:
        """A signature for links that carry their own authorisation."""
        return self._derive(f"sign:{purpose}", text)

    def _derive(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def _create_key(path: Path) -> bytes:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = secrets.token_bytes(_KEY_BYTES)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        # A link fails when somebody was faster, where a rename would replace their key.
        os.link(partial, path)
    except FileExistsError:
        key = path.read_bytes()
    finally:
        partial.unlink(missing_ok=True)
    return key
