"""A build's words as data: what is asked for, and what is told while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from emberbox.images.credentials import Credentials
from emberbox.node.errors import NodeError
from emberbox.node.model import Image
from emberbox.runtime.base import Limits

BASE_STEP = "base"
"""The step that has the source ready."""
FINAL_STEP = "finalize"
"""Packing the layer, and trying the start and ready commands."""

DEFAULT_USER = "user"
DEFAULT_WORKDIR = "/home/user"
SANE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class StepType(StrEnum):
    COPY = "COPY"
    RUN = "RUN"
    ENV = "ENV"
    ARG = "ARG"
    WORKDIR = "WORKDIR"
    USER = "USER"


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it was asked for. `number` counts from 1."""

    number: int
    type: StepType
    args: tuple[str, ...]
    files_hash: str = ""
    force: bool = False

    @property
    def name(self) -> str:
        return str(self.number)

    def __str__(self) -> str:
        return f"{self.type} {' '.join(arg for arg in self.args if arg)}"


@dataclass(frozen=True, slots=True)
class NewBuild:
    """What `Build` asks for: one of `recipe`, `from_image` and `from_build` is set."""

    build_id: str
    template_id: str
    limits: Limits
    team_id: str = ""
    recipe: str = ""
    from_image: str = ""
    from_build: Image | None = None
    credentials: Credentials | None = field(default=None, repr=False)
    steps: tuple[Step, ...] = ()
    files_dir: str = ""
    start_command: str = ""
    ready_command: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class LogLine:
    """One entry of a build's log. `position` counts from 0."""

    position: int
    timestamp_ms: int
    level: str
    message: str
    step: str


@dataclass(frozen=True, slots=True)
class LogLines:
    """Lines that follow each other; at least one."""

    lines: tuple[LogLine, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    stage: str
    fraction: float
    """Of the whole, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Done:
    image: Image
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    message: str
    step: str


Outcome = Done | Failed
BuildEvent = LogLines | Progress | Done | Failed


class StepFailed(NodeError):
    """A step could not be done; the message is for the one who wrote it.

    Attributes:
        step: the step's name; empty: the one that the build was at.
    """

    def __init__(self, message: str, *, step: str = "") -> None:
        super().__init__(message)
        self.step = step
