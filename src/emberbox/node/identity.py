"""What `/init` tells an agent about the sandbox it serves."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from emberbox.node.model import Image
from emberbox.node.records import SandboxRecord
from emberbox.runtime.base import MIB, Limits

_ENTROPY_BYTES = 64


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a machine is told of itself, once it answers."""

    make_body: Callable[[], dict[str, Any]]
    """Called when it is sent, for the time is in it."""
    new_secret: bool = False
    """Give it a control secret of its own: one restored from memory has one that others share."""


def first(record: SandboxRecord, *, new_secret: bool) -> Introduction:
    """For a machine that becomes a new sandbox: everything, with an identity nobody else has."""
    return Introduction(lambda: {**_known(record), "machineId": secrets.token_hex(16)}, new_secret)


def again(record: SandboxRecord) -> Introduction:
    """For a sandbox that goes on: everything but a new machine ID."""
    return Introduction(lambda: _known(record))


def unclaimed(image: Image, limits: Limits) -> Introduction:
    """For a machine that is nobody's yet, so that its template's commands run as they should."""
    return Introduction(lambda: {**_common(image, limits), "envVars": dict(image.env_vars), "accessToken": ""})


def _known(record: SandboxRecord) -> dict[str, Any]:
    return {
        **_common(record.image, record.limits),
        "envVars": {**record.image.env_vars, **record.env_vars},
        "accessToken": record.access_token,
        "sandboxID": record.sandbox_id,
        "templateID": record.template_id,
        "teamID": record.team_id,
    }


def _common(image: Image, limits: Limits) -> dict[str, Any]:
    body: dict[str, Any] = {
        "timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        "limits": {
            "cpuCount": limits.cpu_count,
            "memoryBytes": limits.memory_mb * MIB,
            "diskBytes": limits.disk_size_mb * MIB,
        },
        "entropy": base64.b64encode(secrets.token_bytes(_ENTROPY_BYTES)).decode(),
    }
    if image.default_user:
        body["defaultUser"] = image.default_user
    if image.default_workdir:
        body["defaultWorkdir"] = image.default_workdir
    return body
