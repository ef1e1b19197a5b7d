"""Bodies of the sandbox operations. Field names are the API's."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from emberbox.api.errors import Error
from emberbox.api.fields import Json, StringMap, Text, at
from emberbox.control.accounts import Principal
from emberbox.control.plane import envd_version
from emberbox.control.service import ControlPlane
from emberbox.control.states import SHOWN, State
from emberbox.store.records import MetricRecord, SandboxRecord

SandboxState = Literal["running", "paused"]
TimeoutSeconds = Annotated[int, Field(strict=True, ge=0, lt=2**31, description="Seconds")]

CLIENT_ID = "emberbox"
"""`clientID` is deprecated in E2B's API but still required in its answers."""


# ---- requests


class AutoResume(BaseModel):
    enabled: bool = False


class EgressProxyTls(BaseModel):
    enabled: bool
    serverName: Text | None = None
    caCert: Text | None = None


class EgressProxy(BaseModel):
    address: Text
    username: Annotated[Text, Field(max_length=255)] | None = None
    password: Annotated[Text, Field(max_length=255)] | None = None
    tls: EgressProxyTls | None = None


class RuleTransform(BaseModel):
    headers: StringMap | None = None


class NetworkRule(BaseModel):
    transform: RuleTransform | None = None


class Egress(BaseModel):
    """What a sandbox may reach."""

    allowOut: list[Text] | None = None
    denyOut: list[Text] | None = None
    dnsServers: list[Text] | None = None
    egressProxy: EgressProxy | None = None
    rules: dict[Text, list[NetworkRule]] | None = None


class NetworkConfig(Egress):
    """Egress, and who may reach the sandbox how."""

    allowPublicTraffic: bool | None = None
    maskRequestHost: Text | None = None
    httpsPorts: list[int] | None = None


class NetworkUpdate(Egress):
    allow_internet_access: bool | None = None


class VolumeMount(BaseModel):
    name: Text
    path: Text


class IamToken(BaseModel):
    audience: Text
    tokenType: Text


class Iam(BaseModel):
    tokens: dict[Text, IamToken] | None = None


class NewSandboxV2(BaseModel):
    """A sandbox to create; always secured."""

    templateID: Annotated[Text, Field(max_length=300, description="ID or name of a template or snapshot")]
    timeout: TimeoutSeconds = 300
    autoPause: bool = False
    autoPauseMemory: bool = True
    autoResume: AutoResume | None = None
    allow_internet_access: bool | None = None
    network: NetworkConfig | None = None
    metadata: StringMap | None = None
    envVars: StringMap | None = None
    mcp: Json | None = None
    iam: Iam | None = None
    volumeMounts: list[VolumeMount] | None = None


class NewSandbox(NewSandboxV2):
    """The first version: `secure` is the caller's choice."""

    timeout: TimeoutSeconds = 15
    secure: bool | None = None


class ResumeRequest(BaseModel):
    timeout: TimeoutSeconds | None = None
    autoPause: bool | None = None
    memory: bool = True


class ConnectRequest(BaseModel):
    timeout: TimeoutSeconds
    memory: bool = True


class ConnectRequestV2(BaseModel):
    timeout: TimeoutSeconds = 300
    memory: bool = True


class TimeoutRequest(BaseModel):
    timeout: TimeoutSeconds


class RefreshRequest(BaseModel):
    duration: Annotated[int, Field(ge=0, le=3600)] | None = None


class PauseRequest(BaseModel):
    memory: bool = True
    requireHealthyGuest: bool = False


class SnapshotRequest(BaseModel):
    name: Annotated[Text, Field(max_length=300)] | None = None
    memory: bool = True


class ForkRequest(BaseModel):
    timeout: TimeoutSeconds = 15
    count: Annotated[int, Field(ge=1, le=100)] = 1


# ---- answers


class Sandbox(BaseModel):
    """A sandbox to work with: what a client needs to reach it."""

    templateID: str
    sandboxID: str
    clientID: str
    envdVersion: str
    alias: str | None = None
    envdAccessToken: str | None = None
    trafficAccessToken: str | None = None
    domain: str | None = None


class ListedSandbox(BaseModel):
    templateID: str
    sandboxID: str
    clientID: str
    startedAt: datetime
    endAt: datetime
    cpuCount: int
    memoryMB: int
    diskSizeMB: int
    state: SandboxState
    envdVersion: str
    alias: str | None = None
    metadata: dict[str, str] | None = None
    volumeMounts: list[VolumeMount] | None = None


class LifecyclePolicy(BaseModel):
    autoResume: bool
    onTimeout: Literal["kill", "pause"]


class SandboxDetail(ListedSandbox):
    envdAccessToken: str | None = None
    allowInternetAccess: bool | None = None
    domain: str | None = None
    network: Json | None = None
    lifecycle: LifecyclePolicy | None = None
    pauseMode: Literal["full", "filesystem"] | None = None


class SandboxMetric(BaseModel):
    timestamp: datetime
    timestampUnix: int
    cpuCount: int
    cpuUsedPct: float
    memUsed: int
    memTotal: int
    memCache: int
    diskUsed: int
    diskTotal: int


class SandboxesWithMetrics(BaseModel):
    sandboxes: dict[str, SandboxMetric]


class SandboxLog(BaseModel):
    timestamp: datetime
    line: str


class SandboxLogEntry(BaseModel):
    timestamp: datetime
    level: Literal["debug", "info", "warn", "error"]
    message: str
    fields: dict[str, str]


class SandboxLogs(BaseModel):
    logs: list[SandboxLog]
    logEntries: list[SandboxLogEntry]


class SandboxLogsV2(BaseModel):
    logs: list[SandboxLogEntry]


class SnapshotInfo(BaseModel):
    snapshotID: str
    names: list[str]


class ForkResult(BaseModel):
    """Exactly one of the two."""

    sandbox: Sandbox | None = None
    error: Error | None = None


# ---- from the store's records


def sandbox(record: SandboxRecord, control: ControlPlane, who: Principal) -> Sandbox:
    """A sandbox with the tokens that let the caller run commands and reach ports, if it may."""
    tokens, opened = control.plane.tokens, who.may("sandboxes:exec")
    shown: dict[str, Any] = {
        "templateID": record.template_id,
        "sandboxID": record.id,
        "clientID": CLIENT_ID,
        "envdVersion": envd_version(record.agent_version),
        "domain": control.settings.sandbox_domain,
    }
    if record.alias is not None:
        shown["alias"] = record.alias
    if opened and record.secure:
        shown["envdAccessToken"] = tokens.agent(record.id)
    if opened and record.network.get("allowPublicTraffic") is False:
        shown["trafficAccessToken"] = tokens.traffic(record.id)
    return Sandbox(**shown)


def listed_sandbox(record: SandboxRecord) -> ListedSandbox:
    return ListedSandbox(**_listed(record))


def sandbox_detail(record: SandboxRecord, control: ControlPlane, who: Principal) -> SandboxDetail:
    """Everything of a sandbox, with its token if the caller may run commands."""
    shown = _listed(record)
    if record.secure and who.may("sandboxes:exec"):
        shown["envdAccessToken"] = control.plane.tokens.agent(record.id)
    if record.state == State.PAUSED and record.pause_memory is not None:
        shown["pauseMode"] = "full" if record.pause_memory else "filesystem"
    return SandboxDetail(
        **shown,
        allowInternetAccess=record.allow_internet,
        domain=control.settings.sandbox_domain,
        network=record.network,
        lifecycle=LifecyclePolicy(autoResume=record.auto_resume, onTimeout="pause" if record.auto_pause else "kill"),
    )


def sandbox_metric(record: MetricRecord) -> SandboxMetric:
    return SandboxMetric(
        timestamp=at(record.timestamp_ms),
        timestampUnix=record.timestamp_ms // 1000,
        cpuCount=record.cpu_count,
        cpuUsedPct=record.cpu_used_percent,
        memUsed=record.memory_used,
        memTotal=record.memory_total,
        memCache=record.memory_cache,
        diskUsed=record.disk_used,
        diskTotal=record.disk_total,
    )


def _listed(record: SandboxRecord) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "templateID": record.template_id,
        "sandboxID": record.id,
        "clientID": CLIENT_ID,
        "startedAt": at(record.started_at),
        "endAt": at(record.end_at),
        "cpuCount": record.cpu_count,
        "memoryMB": record.memory_mb,
        "diskSizeMB": record.disk_size_mb,
        "state": SHOWN[State(record.state)],
        "envdVersion": envd_version(record.agent_version),
        "metadata": record.metadata,
    }
    if record.alias is not None:
        shown["alias"] = record.alias
    if record.volume_mounts:
        shown["volumeMounts"] = record.volume_mounts
    return shown
