"""What `/init` tells an agent about the sandbox it serves. Made when it is sent, for the time is in it."""

from __future__ import annotations

import base64
import secrets
from datetime import UTC, datetime
from typing import Any

from emberbox.node.model import Image
from emberbox.node.records import SandboxRecord
from emberbox.runtime.base import MIB, Limits

_ENTROPY_BYTES = 64


def first(record: SandboxRecord) -> dict[str, Any]:
    """The body for a machine that becomes a new sandbox: everything, with an identity nobody else has."""
    return {**again(record), "machineId": secrets.token_hex(16)}


def again(record: SandboxRecord) -> dict[str, Any]:
    """The body for a sandbox that goes on: everything but a new machine ID."""
    return {
        **_common(record.image, record.limits),
        "envVars": {**record.image.env_vars, **record.env_vars},
        "accessToken": record.access_token,
        "sandboxID": record.sandbox_id,
        "templateID": record.template_id,
        "teamID": record.team_id,
    }


def unclaimed(image: Image, limits: Limits) -> dict[str, Any]:
    """The body for a machine that is nobody's yet, so that its template's commands run as they should."""
    return {**_common(image, limits), "envVars": dict(image.env_vars), "accessToken": ""}


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
