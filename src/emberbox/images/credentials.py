"""Credentials of an image registry. They live in memory and, for one call, in a file that root alone reads."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and a password, or what one is exchanged for. Secrets are left out of `repr`."""

    kind: str
    """registry, aws or gcp."""
    username: str = ""
    password: str = field(default="", repr=False)
    aws_access_key_id: str = field(default="", repr=False)
    aws_secret_access_key: str = field(default="", repr=False)
    aws_region: str = ""
    gcp_service_account_json: str = field(default="", repr=False)


@contextlib.contextmanager
def auth_file(directory: Path, registry: str, username: str, password: str) -> Iterator[Path]:
    """A containers-auth.json(5) for one registry, readable by its owner alone, removed at the end of the block."""
    handle, name = tempfile.mkstemp(prefix="auth-", dir=directory)
    try:
        with os.fdopen(handle, "w") as file:
            secret = base64.b64encode(f"{username}:{password}".encode()).decode()
            json.dump({"auths": {registry: {"auth": secret}}} if username else {"auths": {}}, file)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
