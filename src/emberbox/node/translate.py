"""Between the wire messages of `proto/node` and the node's own words."""

from __future__ import annotations

from dataclasses import asdict

from emberbox.images.credentials import Credentials
from emberbox.node.building import model as building
from emberbox.node.building.plan import read_steps
from emberbox.node.errors import BadValue, Unsupported
from emberbox.node.events import Event, Sample
from emberbox.node.logs import LogEntry
from emberbox.node.model import EndReason, Image, Network, NewSandbox, State, Status, TimeoutAction
from emberbox.runtime.base import Limits, Rates
from emberbox.wire import node_pb2 as wire

_STATES = {
    State.RUNNING: wire.MACHINE_STATE_RUNNING,
    State.PAUSED: wire.MACHINE_STATE_PAUSED,
    State.ENDED: wire.MACHINE_STATE_ENDED,
}
_END_REASONS = {
    None: wire.END_REASON_UNSPECIFIED,
    EndReason.KILLED: wire.END_REASON_KILLED,
    EndReason.TIMED_OUT: wire.END_REASON_TIMED_OUT,
    EndReason.DIED: wire.END_REASON_DIED,
    EndReason.LOST: wire.END_REASON_LOST,
}
_TIMEOUT_ACTIONS = {
    wire.TIMEOUT_ACTION_KILL: TimeoutAction.KILL,
    wire.TIMEOUT_ACTION_PAUSE: TimeoutAction.PAUSE,
    wire.TIMEOUT_ACTION_PAUSE_FILES: TimeoutAction.PAUSE_FILES,
}

# ---- from the wire


def image(message: wire.Image) -> Image:
    return Image(
        build_id=message.build_id,
        layers=tuple(message.layers),
        env_vars=dict(message.env_vars),
        default_user=message.default_user,
        default_workdir=message.default_workdir,
        start_command=message.start_command,
        ready_command=message.ready_command,
    )


def network(message: wire.Network) -> Network:
    """
    Raises:
        Unsupported: it asks for what this node does not do yet.
    """
    if message.HasField("egress_proxy") and message.egress_proxy.address:
        raise Unsupported("this node does not support an egress proxy; leave 'egressProxy' out")
    if message.rules_json and message.rules_json not in ("{}", "null"):
        raise Unsupported("this node does not support request transforms; leave 'rules' out")
    return Network(
        allow_internet=message.allow_internet,
        allow_out=tuple(message.allow_out),
        deny_out=tuple(message.deny_out),
        dns_servers=tuple(message.dns_servers),
    )


def timeout_action(value: int) -> TimeoutAction | None:
    return _TIMEOUT_ACTIONS.get(value)  # type: ignore[call-overload, no-any-return]


def new_sandbox(message: wire.CreateRequest) -> NewSandbox:
    """
    Raises:
        BadValue, Unsupported
    """
    if message.volume_mounts:
        raise Unsupported("this node does not support volumes; leave 'volumeMounts' out")
    source = message.WhichOneof("source")
    return NewSandbox(
        sandbox_id=message.sandbox_id,
        template_id=message.template_id,
        team_id=message.team_id,
        image=image(message.image) if source == "image" else None,
        snapshot_id=message.snapshot_id,
        limits=limits(message),
        env_vars=dict(message.env_vars),
        access_token=message.access_token,
        network=network(message.network) if message.HasField("network") else Network(),
        deadline_ms=message.deadline_unix_ms,
        on_timeout=timeout_action(message.on_timeout) or TimeoutAction.KILL,
        metadata=dict(message.metadata),
    )


def limits(message: wire.CreateRequest | wire.BuildRequest) -> Limits:
    """
    Raises:
        BadValue: a size is not positive, or a rate is negative.
    """
    rates = Rates(
        disk_mb_per_second=message.rates.disk_mb_per_second,
        disk_operations_per_second=message.rates.disk_operations_per_second,
        network_mbit_per_second=message.rates.network_mbit_per_second,
    )
    made = Limits(message.cpu_count, message.memory_mb, message.disk_size_mb, rates=rates)
    for name, value in (("cpuCount", made.cpu_count), ("memoryMB", made.memory_mb), ("diskSizeMB", made.disk_size_mb)):
        if value <= 0:
            raise BadValue(f"{name} must be positive, not {value}")
    for name, value in asdict(rates).items():
        if value < 0:
            raise BadValue(f"{name} must not be negative, it is {value}; 0 is no limit")
    return made


def new_build(message: wire.BuildRequest) -> building.NewBuild:
    """
    Raises:
        BadValue: a step or a limit cannot be used.
    """
    source = message.WhichOneof("source")
    return building.NewBuild(
        build_id=message.build_id,
        template_id=message.template_id,
        team_id=message.team_id,
        recipe=message.recipe,
        from_image=message.from_image,
        from_build=image(message.from_build) if source == "from_build" else None,
        credentials=_credentials(message.credentials) if message.HasField("credentials") else None,
        steps=read_steps((step.type, step.args, step.files_hash, step.force) for step in message.steps),
        files_dir=message.files_dir,
        start_command=message.start_command,
        ready_command=message.ready_command,
        limits=limits(message),
        force=message.force,
    )


def _credentials(message: wire.RegistryCredentials) -> Credentials:
    return Credentials(
        kind=message.kind,
        username=message.username,
        password=message.password,
        aws_access_key_id=message.aws_access_key_id,
        aws_secret_access_key=message.aws_secret_access_key,
        aws_region=message.aws_region,
        gcp_service_account_json=message.gcp_service_account_json,
    )


# ---- to the wire


def status(value: Status) -> wire.MachineStatus:
    return wire.MachineStatus(
        sandbox_id=value.sandbox_id,
        state=_STATES[value.state],
        address=value.address,
        deadline_unix_ms=value.deadline_ms,
        memory_kept=value.memory_kept,
        end_reason=_END_REASONS[value.end_reason],
        message=value.message,
        started_unix_ms=value.started_ms,
        changed_unix_ms=value.changed_ms,
    )


def event(value: Event) -> wire.NodeEvent:
    if isinstance(value, Status):
        return wire.NodeEvent(changed=status(value))
    return wire.NodeEvent(samples=wire.Samples(samples=[_sample(sample) for sample in value]))


def _sample(value: Sample) -> wire.MachineSample:
    return wire.MachineSample(
        sandbox_id=value.sandbox_id,
        timestamp_unix_ms=value.timestamp_ms,
        cpu_count=value.cpu_count,
        cpu_used_percent=value.cpu_used_percent,
        memory_used_bytes=value.memory_used,
        memory_total_bytes=value.memory_total,
        memory_cache_bytes=value.memory_cache,
        disk_used_bytes=value.disk_used,
        disk_total_bytes=value.disk_total,
    )


def log_entry(value: LogEntry) -> wire.LogEntry:
    return wire.LogEntry(
        timestamp_unix_ms=value.timestamp_ms, level=value.level, message=value.message, fields=value.fields
    )


def _build_log(line: building.LogLine) -> wire.BuildLog:
    entry = wire.LogEntry(timestamp_unix_ms=line.timestamp_ms, level=line.level, message=line.message)
    return wire.BuildLog(entry=entry, step=line.step, position=line.position)


def build_event(value: building.BuildEvent, agent_version: str) -> wire.BuildEvent:
    match value:
        case building.LogLines(lines=(line,)):
            return wire.BuildEvent(log=_build_log(line))
        case building.LogLines():
            return wire.BuildEvent(logs=wire.BuildLogs(logs=[_build_log(line) for line in value.lines]))
        case building.Progress():
            return wire.BuildEvent(progress=wire.BuildProgress(stage=value.stage, fraction=value.fraction))
        case building.Failed():
            return wire.BuildEvent(failed=wire.BuildFailed(message=value.message, step=value.step))
        case building.Done():
            made = value.image
            return wire.BuildEvent(
                done=wire.BuildDone(
                    image=wire.Image(
                        build_id=made.build_id,
                        layers=made.layers,
                        env_vars=made.env_vars,
                        default_user=made.default_user,
                        default_workdir=made.default_workdir,
                        start_command=made.start_command,
                        ready_command=made.ready_command,
                    ),
                    size_bytes=value.size_bytes,
                    agent_version=agent_version,
                )
            )
