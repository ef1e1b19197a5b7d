"""The three published capabilities: their operations, the names of their MCP tools, and the hints of each.

Names and hints are those that the Sandbox API publishes; a test compares this list with the application's routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ParameterType = Literal["string", "integer", "number", "boolean", "array", "object"]
Place = Literal["path", "query", "body"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """An input of an operation. `place` is where the HTTP request has it."""

    name: str
    type: ParameterType
    description: str
    place: Place
    required: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a capability, in its three exposures."""

    name: str
    """In call references, e.g. `pause-sandbox`. The MCP tool is `e2b-` and this."""
    title: str
    description: str
    method: Literal["GET", "POST", "DELETE"]
    path: str
    read_only: bool
    destructive: bool
    idempotent: bool
    parameters: tuple[Parameter, ...] = ()

    @property
    def tool(self) -> str:
        return f"e2b-{self.name}"

    @property
    def has_body(self) -> bool:
        return any(parameter.place == "body" for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Capability:
    name: str
    """The file is `capabilities/<name>.yaml`."""
    label: str
    description: str
    tags: tuple[str, ...]
    operations: tuple[Operation, ...]


SANDBOX_ID = Parameter("sandboxID", "string", "Identifier of the sandbox", "path", required=True)
_TIMEOUT = Parameter("timeout", "integer", "Seconds from now until the sandbox ends", "body")
_AUTO_PAUSE = Parameter("autoPause", "boolean", "Pause at the deadline instead of ending", "body")
_MEMORY = Parameter(
    "memory", "boolean", "Keep running processes, where the runtime can; false keeps files only", "body"
)

SANDBOXES = Capability(
    name="sandboxes",
    label="Sandboxes",
    description="Create, list, inspect and end isolated Linux sandboxes for AI agents.",
    tags=("sandbox", "agents", "code-execution"),
    operations=(
        Operation(
            "list-sandboxes",
            "List sandboxes",
            "List the running sandboxes of the team, newest first.",
            "GET",
            "/sandboxes",
            read_only=True,
            destructive=False,
            idempotent=True,
            parameters=(
                Parameter("metadata", "string", "Only sandboxes with this metadata, as key=value&key=value", "query"),
            ),
        ),
        Operation(
            "create-sandbox",
            "Create a sandbox",
            "Start a sandbox from a template. It ends by itself after `timeout` seconds unless that is extended.",
            "POST",
            "/sandboxes",
            read_only=False,
            destructive=False,
            idempotent=False,
            parameters=(
                Parameter("templateID", "string", "ID or name of a template or snapshot", "body", required=True),
                Parameter("timeout", "integer", "Seconds until the sandbox ends", "body"),
                Parameter("metadata", "object", "Strings by name, to find the sandbox again", "body"),
                Parameter("envVars", "object", "Environment variables of every process", "body"),
                _AUTO_PAUSE,
                Parameter("allow_internet_access", "boolean", "Let the sandbox reach the internet", "body"),
                Parameter("secure", "boolean", "Require an access token for commands and files", "body"),
            ),
        ),
        Operation(
            "get-sandbox",
            "Get a sandbox",
            "Tell the state, deadline, size and metadata of a sandbox that runs or is paused.",
            "GET",
            "/sandboxes/{sandboxID}",
            read_only=True,
            destructive=False,
            idempotent=True,
            parameters=(SANDBOX_ID,),
        ),
        Operation(
            "kill-sandbox",
            "Kill a sandbox",
            "End a sandbox, whatever its state. Its processes and files are gone afterwards.",
            "DELETE",
            "/sandboxes/{sandboxID}",
            read_only=False,
            destructive=True,
            idempotent=True,
            parameters=(SANDBOX_ID,),
        ),
    ),
)

LIFECYCLE = Capability(
    name="lifecycle",
    label="Sandbox life cycle",
    description="Pause, resume, connect to, snapshot and extend sandboxes.",
    tags=("sandbox", "agents", "life-cycle"),
    operations=(
        Operation(
            "pause-sandbox",
            "Pause a sandbox",
            "Stop a sandbox and keep it. Its deadline does not count while it is paused.",
            "POST",
            "/sandboxes/{sandboxID}/pause",
            read_only=False,
            destructive=False,
            idempotent=True,
            parameters=(SANDBOX_ID, _MEMORY),
        ),
        Operation(
            "resume-sandbox",
            "Resume a sandbox",
            "Let a paused sandbox run again.",
            "POST",
            "/sandboxes/{sandboxID}/resume",
            read_only=False,
            destructive=False,
            idempotent=True,
            parameters=(SANDBOX_ID, _TIMEOUT, _AUTO_PAUSE),
        ),
        Operation(
            "connect-sandbox",
            "Connect to a sandbox",
            "Make sure that a sandbox runs: extend its deadline, or resume it when it is paused.",
            "POST",
            "/sandboxes/{sandboxID}/connect",
            read_only=False,
            destructive=False,
            idempotent=True,
            parameters=(
                SANDBOX_ID,
                Parameter("timeout", "integer", "Seconds from now until the sandbox ends", "body", required=True),
            ),
        ),
        Operation(
            "snapshot-sandbox",
            "Snapshot a sandbox",
            "Save a sandbox; it goes on. New sandboxes can be created from the snapshot's ID.",
            "POST",
            "/sandboxes/{sandboxID}/snapshots",
            read_only=False,
            destructive=False,
            idempotent=False,
            parameters=(SANDBOX_ID, Parameter("name", "string", "Name of the snapshot", "body"), _MEMORY),
        ),
        Operation(
            "set-sandbox-timeout",
            "Set a sandbox's timeout",
            "Let a sandbox end this many seconds from now, sooner or later than before.",
            "POST",
            "/sandboxes/{sandboxID}/timeout",
            read_only=False,
            destructive=False,
            idempotent=True,
            parameters=(
                SANDBOX_ID,
                Parameter("timeout", "integer", "Seconds from now until the sandbox ends", "body", required=True),
            ),
        ),
        Operation(
            "refresh-sandbox",
            "Refresh a sandbox",
            "Keep a sandbox for at least this many seconds from now; never shortens.",
            "POST",
            "/sandboxes/{sandboxID}/refreshes",
            read_only=False,
            destructive=False,
            idempotent=True,
            parameters=(SANDBOX_ID, Parameter("duration", "integer", "Seconds from now, at most 3600", "body")),
        ),
    ),
)

METRICS_LOGS = Capability(
    name="metrics-logs",
    label="Sandbox metrics and logs",
    description="Read the resource use and the logs of sandboxes.",
    tags=("sandbox", "agents", "observability"),
    operations=(
        Operation(
            "get-sandbox-metrics",
            "Get a sandbox's metrics",
            "CPU, memory and disk use of a sandbox, sampled every 5 seconds, oldest first.",
            "GET",
            "/sandboxes/{sandboxID}/metrics",
            read_only=True,
            destructive=False,
            idempotent=True,
            parameters=(
                SANDBOX_ID,
                Parameter("start", "integer", "Start of the interval, unix seconds", "query"),
                Parameter("end", "integer", "End of the interval, unix seconds", "query"),
            ),
        ),
        Operation(
            "get-sandbox-logs",
            "Get a sandbox's logs",
            "Log entries of a sandbox, oldest first.",
            "GET",
            "/sandboxes/{sandboxID}/logs",
            read_only=True,
            destructive=False,
            idempotent=True,
            parameters=(
                SANDBOX_ID,
                Parameter("start", "integer", "From this time on, unix milliseconds", "query"),
                Parameter("limit", "integer", "At most this many entries, 1000 or fewer", "query"),
            ),
        ),
        Operation(
            "get-fleet-metrics",
            "Get the metrics of many sandboxes",
            "The newest metrics of each of the named sandboxes.",
            "GET",
            "/sandboxes/metrics",
            read_only=True,
            destructive=False,
            idempotent=True,
            parameters=(Parameter("sandbox_ids", "string", "Up to 100 IDs, comma-separated", "query", required=True),),
        ),
    ),
)

CAPABILITIES = (SANDBOXES, LIFECYCLE, METRICS_LOGS)
OPERATIONS = tuple(operation for capability in CAPABILITIES for operation in capability.operations)
