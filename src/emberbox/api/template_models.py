"""Bodies of the template, build and tag operations. Field names are the API's."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, Field

from emberbox.api.fields import Text, at, at_or_none
from emberbox.control.build_plan import BuildPlan, Step
from emberbox.control.builds import NewTemplate, Registered
from emberbox.control.errors import Invalid
from emberbox.control.plane import envd_version
from emberbox.control.tags import Assignment
from emberbox.control.templates import TemplateView
from emberbox.store.records import BuildLogRecord, BuildRecord, TagRecord, TemplateRecord
from emberbox.wire import node_pb2 as pb

BuildStatus = Literal["building", "waiting", "ready", "error"]
LogLevel = Literal["debug", "info", "warn", "error"]
CpuCount = Annotated[int, Field(ge=1, le=256)]
MemoryMB = Annotated[int, Field(ge=128, le=1024 * 1024)]
DiskMB = Annotated[int, Field(ge=0, le=16 * 1024 * 1024)]

_RATES = {
    "disk_mb_per_second": "diskMBPerSecond",
    "disk_operations_per_second": "diskOperationsPerSecond",
    "network_mbit_per_second": "networkMbitPerSecond",
}
"""Control's names and the API's."""

LEVELS: tuple[LogLevel, ...] = ("debug", "info", "warn", "error")


def levels_from(lowest: LogLevel | None) -> tuple[str, ...]:
    """A level and those above it."""
    return LEVELS[LEVELS.index(lowest) :] if lowest else LEVELS


# ---- requests


class TemplateUpdate(BaseModel):
    public: bool | None = None


class NewTemplateV1(BaseModel):
    dockerfile: str
    alias: Text | None = None
    teamID: Text | None = None
    startCmd: Text | None = None
    readyCmd: Text | None = None
    cpuCount: CpuCount | None = None
    memoryMB: MemoryMB | None = None


class RateLimits(BaseModel):
    """How fast the template's sandboxes may be; ours, not E2B's. 0: no limit. Missing: the installation's default."""

    diskMBPerSecond: Annotated[int, Field(ge=0, le=100_000)] | None = None
    """MiB a second, of reading and of writing."""
    diskOperationsPerSecond: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    networkMbitPerSecond: Annotated[int, Field(ge=0, le=30_000)] | None = None
    """Million bits a second, of sending and of receiving."""


class NewTemplateV2(RateLimits):
    alias: Annotated[Text, Field(max_length=128)]
    teamID: Text | None = None
    cpuCount: CpuCount | None = None
    memoryMB: MemoryMB | None = None


class NewTemplateV3(RateLimits):
    name: Annotated[Text, Field(max_length=300)] | None = None
    tags: list[Text] | None = None
    alias: Annotated[Text, Field(max_length=128)] | None = None
    teamID: Text | None = None
    cpuCount: CpuCount | None = None
    memoryMB: MemoryMB | None = None
    minFreeDiskMb: DiskMB | None = Field(None, validation_alias=AliasChoices("minFreeDiskMb", "minFreeDiskMB"))
    """As the clients spell it; with `MB`, like the others, too."""


Secret = Annotated[Text, Field(repr=False)]


class AwsRegistry(BaseModel):
    type: Literal["aws"]
    awsAccessKeyId: Secret
    awsSecretAccessKey: Secret
    awsRegion: Text


class GcpRegistry(BaseModel):
    type: Literal["gcp"]
    serviceAccountJson: Secret


class GeneralRegistry(BaseModel):
    type: Literal["registry"]
    username: Text
    password: Secret


Registry = Annotated[AwsRegistry | GcpRegistry | GeneralRegistry, Field(discriminator="type")]


class TemplateStep(BaseModel):
    type: Text
    args: list[Text] = []
    filesHash: Text | None = None
    force: bool = False


class StartBuild(BaseModel):
    """What a build is made of."""

    fromImage: Text | None = None
    fromTemplate: Text | None = None
    fromImageRegistry: Registry | None = None
    force: bool = False
    steps: list[TemplateStep] = []
    startCmd: Text | None = None
    readyCmd: Text | None = None


class AssignTags(BaseModel):
    target: Annotated[Text, Field(max_length=300)]
    tags: list[Text]


class DeleteTags(BaseModel):
    name: Annotated[Text, Field(max_length=300)]
    tags: list[Text]


# ---- answers


class TeamUser(BaseModel):
    id: str
    email: str | None = None


class TemplateLegacy(BaseModel):
    templateID: str
    buildID: str
    cpuCount: int
    memoryMB: int
    diskSizeMB: int
    public: bool
    aliases: list[str]
    createdAt: datetime
    updatedAt: datetime
    createdBy: TeamUser | None
    lastSpawnedAt: datetime | None
    spawnCount: int
    buildCount: int
    envdVersion: str


class Template(TemplateLegacy):
    names: list[str]
    buildStatus: BuildStatus
    isDefault: bool | None = None
    description: str | None = None


class RequestedBuild(BaseModel):
    templateID: str
    buildID: str
    public: bool
    names: list[str]
    tags: list[str]
    aliases: list[str]


class TemplateBuild(RateLimits):
    buildID: str
    status: BuildStatus
    createdAt: datetime
    updatedAt: datetime
    cpuCount: int
    memoryMB: int
    finishedAt: datetime | None = None
    diskSizeMB: int | None = None
    envdVersion: str | None = None


class TemplateWithBuilds(BaseModel):
    templateID: str
    public: bool
    aliases: list[str]
    names: list[str]
    createdAt: datetime
    updatedAt: datetime
    lastSpawnedAt: datetime | None
    spawnCount: int
    builds: list[TemplateBuild]


class TemplateUpdated(BaseModel):
    names: list[str]


class AliasFound(BaseModel):
    templateID: str
    public: bool


class FileUpload(BaseModel):
    present: bool
    url: str | None = None
    headers: dict[str, str] | None = None


class BuildLogEntry(BaseModel):
    timestamp: datetime
    message: str
    level: LogLevel
    step: str | None = None


class BuildReason(BaseModel):
    message: str
    step: str | None = None
    logEntries: list[BuildLogEntry] | None = None


class BuildInfo(BaseModel):
    templateID: str
    buildID: str
    status: BuildStatus
    logs: list[str]
    logEntries: list[BuildLogEntry]
    reason: BuildReason | None = None


class BuildLogs(BaseModel):
    logs: list[BuildLogEntry]


class TemplateTag(BaseModel):
    tag: str
    buildID: str
    createdAt: datetime


class AssignedTags(BaseModel):
    tags: list[str]
    buildID: str


class TagsCount(BaseModel):
    total: int


class TagExists(BaseModel):
    exists: bool
    normalizedTag: str


class TagAssignment(BaseModel):
    assignmentID: str
    buildID: str
    assignedAt: datetime
    buildCreatedAt: datetime
    buildFinishedAt: datetime | None


class TagAssignments(BaseModel):
    data: list[TagAssignment]
    nextCursor: str | None


class TagGroup(BaseModel):
    tag: str
    assignments: list[TagAssignment]
    hasMore: bool


class TagGroups(BaseModel):
    tags: list[TagGroup]
    nextCursor: str | None


# ---- to control's words


def new_template(body: NewTemplateV3) -> NewTemplate:
    """
    Raises:
        Invalid: neither name nor alias is given.
    """
    name = body.name or body.alias
    if not name:
        raise Invalid("name is missing; give the template a name such as 'my-template' or 'my-template:v1'")
    return NewTemplate(
        name=name,
        tags=tuple(body.tags or ()),
        cpu_count=body.cpuCount,
        memory_mb=body.memoryMB,
        min_free_disk_mb=body.minFreeDiskMb,
        rates=asked_rates(body),
    )


def asked_rates(body: RateLimits) -> dict[str, int]:
    """What was said, by control's names."""
    return {name: rate for name, shown in _RATES.items() if (rate := getattr(body, shown)) is not None}


def build_plan(body: StartBuild) -> BuildPlan:
    return BuildPlan(
        from_image=(body.fromImage or "").strip(),
        from_template=(body.fromTemplate or "").strip(),
        steps=tuple(Step(one.type, tuple(one.args), one.filesHash or "", one.force) for one in body.steps),
        start_command=body.startCmd or "",
        ready_command=body.readyCmd or "",
        force=body.force,
        credentials=_credentials(body.fromImageRegistry),
    )


def _credentials(given: AwsRegistry | GcpRegistry | GeneralRegistry | None) -> pb.RegistryCredentials | None:
    match given:
        case AwsRegistry():
            return pb.RegistryCredentials(
                kind=given.type,
                aws_access_key_id=given.awsAccessKeyId,
                aws_secret_access_key=given.awsSecretAccessKey,
                aws_region=given.awsRegion,
            )
        case GcpRegistry():
            return pb.RegistryCredentials(kind=given.type, gcp_service_account_json=given.serviceAccountJson)
        case GeneralRegistry():
            return pb.RegistryCredentials(kind=given.type, username=given.username, password=given.password)
    return None


# ---- from the store's records


def full_names(names: list[tuple[str, str]]) -> list[str]:
    return [f"{namespace}/{alias}" for namespace, alias in names]


def template(view: TemplateView) -> Template:
    record, build = view.template, view.build
    shown: dict[str, Any] = {
        **_legacy(view),
        "names": full_names(view.names),
        "buildStatus": build.status,
        "isDefault": record.is_default,
    }
    if record.description is not None:
        shown["description"] = record.description
    return Template(**shown)


def template_legacy(view: TemplateView) -> TemplateLegacy:
    return TemplateLegacy(**_legacy(view))


def _legacy(view: TemplateView) -> dict[str, Any]:
    record, build = view.template, view.build
    return {
        "templateID": record.id,
        "buildID": build.id,
        "cpuCount": build.cpu_count,
        "memoryMB": build.memory_mb,
        "diskSizeMB": build.disk_size_mb,
        "public": record.public,
        "aliases": [alias for _, alias in view.names],
        "createdAt": at(record.created_at),
        "updatedAt": at(record.updated_at),
        "createdBy": None,
        # How others use a default template is theirs to know.
        "lastSpawnedAt": at_or_none(record.last_spawned_at) if view.owned else None,
        "spawnCount": record.spawn_count if view.owned else 0,
        "buildCount": view.build_count if view.owned else 0,
        "envdVersion": envd_version(build.agent_version),
    }


def requested_build(made: Registered) -> RequestedBuild:
    return RequestedBuild(
        templateID=made.template.id,
        buildID=made.build.id,
        public=made.template.public,
        names=full_names(made.names),
        tags=made.tags,
        aliases=[alias for _, alias in made.names],
    )


def template_with_builds(
    record: TemplateRecord, names: list[tuple[str, str]], builds: list[BuildRecord], *, owned: bool
) -> TemplateWithBuilds:
    return TemplateWithBuilds(
        templateID=record.id,
        public=record.public,
        aliases=[alias for _, alias in names],
        names=full_names(names),
        createdAt=at(record.created_at),
        updatedAt=at(record.updated_at),
        # As in lists.
        lastSpawnedAt=at_or_none(record.last_spawned_at) if owned else None,
        spawnCount=record.spawn_count if owned else 0,
        builds=[_build(build) for build in builds],
    )


def build_info(build: BuildRecord, entries: list[BuildLogRecord], reason_logs: list[BuildLogRecord]) -> BuildInfo:
    shown: dict[str, Any] = {
        "templateID": build.template_id,
        "buildID": build.id,
        "status": build.status,
        "logs": [entry.message for entry in entries],
        "logEntries": [build_log_entry(entry) for entry in entries],
    }
    if build.reason is not None:
        reason = {key: build.reason[key] for key in ("message", "step") if key in build.reason}
        shown["reason"] = BuildReason(**reason, logEntries=[build_log_entry(entry) for entry in reason_logs])
    return BuildInfo(**shown)


def build_log_entry(record: BuildLogRecord) -> BuildLogEntry:
    shown: dict[str, Any] = {
        "timestamp": at(record.timestamp_ms),
        "message": record.message,
        "level": record.level if record.level in LEVELS else "info",
    }
    if record.step:
        shown["step"] = record.step
    return BuildLogEntry(**shown)


def template_tag(record: TagRecord) -> TemplateTag:
    return TemplateTag(tag=record.tag, buildID=record.build_id, createdAt=at(record.assigned_at))


def tag_assignment(assignment: Assignment) -> TagAssignment:
    return TagAssignment(
        assignmentID=assignment.tag.id,
        buildID=assignment.build.id,
        assignedAt=at(assignment.tag.assigned_at),
        buildCreatedAt=at(assignment.build.created_at),
        buildFinishedAt=at_or_none(assignment.build.finished_at),
    )


def _build(build: BuildRecord) -> TemplateBuild:
    shown: dict[str, Any] = {
        "buildID": build.id,
        "status": build.status,
        "createdAt": at(build.created_at),
        "updatedAt": at(build.updated_at),
        "cpuCount": build.cpu_count,
        "memoryMB": build.memory_mb,
        "diskSizeMB": build.disk_size_mb,
        **{_RATES[name]: rate for name, rate in build.rates.items()},
    }
    if build.finished_at is not None:
        shown["finishedAt"] = at(build.finished_at)
    if build.agent_version:
        shown["envdVersion"] = envd_version(build.agent_version)
    return TemplateBuild(**shown)
