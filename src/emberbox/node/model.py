"""The node's words as data: what a sandbox is made of, without a wire format.

`translate.py` turns the wire messages into these; `records.py` writes them to disk.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum

from emberbox.runtime.base import Limits


class State(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class EndReason(StrEnum):
    KILLED = "killed"
    TIMED_OUT = "timed_out"
    DIED = "died"
    LOST = "lost"


class TimeoutAction(StrEnum):
    KILL = "kill"
    PAUSE = "pause"
    PAUSE_FILES = "pause_files"


@dataclass(frozen=True, slots=True)
class Image:
    """A ready build: what machines of a template start from. Empty user and workdir: the agent's defaults."""

    build_id: str
    layers: tuple[str, ...]
    env_vars: dict[str, str] = field(default_factory=dict)
    default_user: str = ""
    default_workdir: str = ""
    start_command: str = ""
    ready_command: str = ""


@dataclass(frozen=True, slots=True)
class Network:
    """What a sandbox may reach."""

    allow_internet: bool = True
    allow_out: tuple[str, ...] = ()
    deny_out: tuple[str, ...] = ()
    dns_servers: tuple[str, ...] = ()


OPEN_NETWORK = Network()
"""What a slot has when it is taken: the internet, nothing private."""


@dataclass(frozen=True, slots=True)
class NewSandbox:
    """What `Create` asks for: exactly one of `image` and `snapshot_id` is set."""

    sandbox_id: str
    template_id: str
    team_id: str
    image: Image | None
    snapshot_id: str
    limits: Limits
    env_vars: dict[str, str]
    access_token: str
    network: Network
    deadline_ms: int
    on_timeout: TimeoutAction
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Status:
    """A sandbox as the control plane sees it. Times in Unix milliseconds."""

    sandbox_id: str
    state: State
    address: str = ""
    deadline_ms: int = 0
    memory_kept: bool = False
    end_reason: EndReason | None = None
    message: str = ""
    started_ms: int = 0
    changed_ms: int = 0


def now_ms() -> int:
    """Wall-clock time in Unix milliseconds; deadlines are kept in it because the control plane sends them so."""
    return time.time_ns() // 1_000_000
