"""Rows as they leave the store: frozen dataclasses whose fields are the columns of `tables.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy.engine import Row


@dataclass(frozen=True, slots=True)
class TeamRecord:
    id: str
    name: str
    slug: str
    is_default: bool
    max_sandboxes: int
    max_timeout_seconds: int
    rate_per_second: int
    rate_burst: int
    created_at: int


@dataclass(frozen=True, slots=True)
class CredentialRecord:
    """An API key or an access token: never its value, only a hash and the parts that may be shown."""

    id: str
    team_id: str
    name: str
    hash: str
    prefix: str
    value_length: int
    masked_prefix: str
    masked_suffix: str
    scopes: list[str] | None
    sandbox_limit: int | None
    created_at: int
    last_used_at: int | None


@dataclass(frozen=True, slots=True)
class TemplateRecord:
    id: str
    team_id: str
    kind: str
    public: bool
    is_default: bool
    description: str | None
    created_at: int
    updated_at: int
    last_spawned_at: int | None
    spawn_count: int


@dataclass(frozen=True, slots=True)
class BuildRecord:
    id: str
    template_id: str
    status: str
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    rates: dict[str, int]
    layers: list[str]
    env_vars: dict[str, str]
    default_user: str
    default_workdir: str
    start_command: str
    ready_command: str
    snapshot_id: str | None
    memory_kept: bool | None
    node_id: str | None
    source_sandbox_id: str | None
    size_bytes: int | None
    agent_version: str
    request: dict[str, Any] | None
    reason: dict[str, Any] | None
    worker: str | None
    created_at: int
    updated_at: int
    finished_at: int | None


@dataclass(frozen=True, slots=True)
class TagRecord:
    id: str
    template_id: str
    tag: str
    build_id: str
    assigned_at: int


@dataclass(frozen=True, slots=True)
class BuildLogRecord:
    build_id: str
    position: int
    timestamp_ms: int
    level: str
    message: str
    step: str


@dataclass(frozen=True, slots=True)
class SandboxRecord:
    id: str
    team_id: str
    template_id: str
    build_id: str
    alias: str | None
    state: str
    state_changed_at: int
    worker: str | None
    node_id: str
    address: str
    cpu_count: int
    memory_mb: int
    disk_size_mb: int
    rates: dict[str, int]
    agent_version: str
    metadata: dict[str, str]
    secure: bool
    allow_internet: bool | None
    network: dict[str, Any]
    volume_mounts: list[dict[str, str]]
    auto_pause: bool
    auto_pause_memory: bool
    auto_resume: bool
    timeout_seconds: int
    started_at: int
    end_at: int
    paused_at: int | None
    pause_memory: bool | None
    ended_at: int | None
    end_reason: str | None
    idempotency_key: str | None
    idempotency_hash: str | None
    api_key_id: str | None


@dataclass(frozen=True, slots=True)
class MetricRecord:
    sandbox_id: str
    timestamp_ms: int
    cpu_count: int
    cpu_used_percent: float
    memory_used: int
    memory_total: int
    memory_cache: int
    disk_used: int
    disk_total: int


@dataclass(frozen=True, slots=True)
class TeamMetricRecord:
    team_id: str
    timestamp_ms: int
    concurrent_sandboxes: int
    sandbox_start_rate: float


@dataclass(frozen=True, slots=True)
class Leftover:
    """A deleted build or snapshot that its node still has to remove."""

    build_id: str
    node_id: str
    snapshot_id: str | None
    layers: list[str]
    """What it stood on; other builds may stand on it, too."""


@dataclass(frozen=True, slots=True)
class NodeRecord:
    id: str
    target: str
    status: str
    status_changed_at: int
    service_instance_id: str
    runtime: str
    memory_snapshots: bool
    version: str
    last_seen_at: int


def values(record: Any) -> dict[str, Any]:
    """A record as column values, for an insert."""
    return {name: getattr(record, name) for name in record.__slots__}


def fields(row: Row[Any]) -> dict[str, Any]:
    """A row as keyword arguments of its record."""
    return row._asdict()
