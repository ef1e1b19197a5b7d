"""What a build is made of, as the API got it: checked here, stored without credentials, told to a node."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from emberbox.control.errors import Invalid
from emberbox.store.records import BuildRecord
from emberbox.wire import node_pb2 as pb

STEP_TYPES = ("COPY", "RUN", "ENV", "WORKDIR", "USER", "ARG")
_STEPS = 1000
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,511}\Z")
_OWN_IMAGES = {
    "e2bdev/base": "base",
    "e2bdev/code-interpreter": "code-interpreter-v1",
    "e2bdev/desktop": "desktop",
}
"""Images of E2B's own templates. Clients name the first one when a template says nothing else; here the templates that
ship with Emberbox stand for them, so that no registry is asked."""
_HUB = ("docker.io/", "index.docker.io/", "registry-1.docker.io/")


@dataclass(frozen=True, slots=True)
class Step:
    type: str
    args: tuple[str, ...]
    files_hash: str = ""
    force: bool = False


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """One of `from_image` and `from_template` is set."""

    from_image: str = ""
    from_template: str = ""
    steps: tuple[Step, ...] = ()
    start_command: str = ""
    ready_command: str = ""
    force: bool = False
    credentials: pb.RegistryCredentials | None = field(default=None, repr=False, compare=False)
    """For the image's registry. They go to the node and nowhere else: not into the store, not into a log."""

    @property
    def files(self) -> frozenset[str]:
        """Hashes of the archives that the steps copy from."""
        return frozenset(step.files_hash for step in self.steps if step.type == "COPY")

    def stored(self) -> dict[str, Any]:
        """The plan without credentials, for the build's row."""
        return {
            "from_image": self.from_image,
            "from_template": self.from_template,
            "steps": [asdict(step) for step in self.steps],
            "start_command": self.start_command,
            "ready_command": self.ready_command,
            "force": self.force,
            "registry": self.credentials.kind if self.credentials else "",
        }

    @classmethod
    def from_stored(cls, stored: Mapping[str, Any]) -> BuildPlan:
        return cls(
            from_image=stored.get("from_image", ""),
            from_template=stored.get("from_template", ""),
            steps=tuple(Step(**{**step, "args": tuple(step["args"])}) for step in stored.get("steps", ())),
            start_command=stored.get("start_command", ""),
            ready_command=stored.get("ready_command", ""),
            force=stored.get("force", False),
        )


def check_plan(plan: BuildPlan) -> None:
    """
    Raises:
        Invalid: something in it cannot be built; says which step.
    """
    if bool(plan.from_image) == bool(plan.from_template):
        raise Invalid("a build starts from one of fromImage and fromTemplate; set exactly one of them")
    if plan.from_image and not _IMAGE.match(plan.from_image):
        raise Invalid(f"{plan.from_image[:200]!r} is not an image reference such as 'debian:12' or 'ghcr.io/me/app:v1'")
    if plan.from_template and plan.credentials is not None:
        raise Invalid("fromImageRegistry goes with fromImage, not with fromTemplate")
    if len(plan.steps) > _STEPS:
        raise Invalid(f"a build has at most {_STEPS} steps, this one has {len(plan.steps)}")
    for number, step in enumerate(plan.steps, start=1):
        if problem := _problem(step):
            raise Invalid(f"step {number} ({step.type[:40]}): {problem}")


def own_template(image: str) -> str | None:
    """The shipped template that stands for one of E2B's own images; None for any other image."""
    for prefix in _HUB:
        image = image.removeprefix(prefix)
    return _OWN_IMAGES.get(image.removesuffix(":latest"))


def build_request(
    build: BuildRecord,
    team_id: str,
    plan: BuildPlan,
    *,
    rates: Mapping[str, int],
    files_dir: str,
    source: BuildRecord | None,
) -> pb.BuildRequest:
    """The plan in the node contract's words. `source` is the ready build that `from_template` means."""
    request = pb.BuildRequest(
        build_id=build.id,
        template_id=build.template_id,
        team_id=team_id,
        steps=[
            pb.BuildStep(type=step.type, args=step.args, files_hash=step.files_hash, force=step.force)
            for step in plan.steps
        ],
        start_command=plan.start_command,
        ready_command=plan.ready_command,
        cpu_count=build.cpu_count,
        memory_mb=build.memory_mb,
        disk_size_mb=build.disk_size_mb,
        rates=pb.Rates(**rates),
        force=plan.force,
        files_dir=files_dir,
        credentials=plan.credentials,
    )
    if source is None:
        request.from_image = plan.from_image
    else:
        request.from_build.CopyFrom(image_of(source))
    return request


def image_of(build: BuildRecord) -> pb.Image:
    """A ready build in the node contract's words."""
    return pb.Image(
        build_id=build.id,
        layers=build.layers,
        env_vars=build.env_vars,
        default_user=build.default_user,
        default_workdir=build.default_workdir,
        start_command=build.start_command,
        ready_command=build.ready_command,
    )


def _problem(step: Step) -> str:
    """What is wrong with a step, for people; empty when nothing is."""
    args = step.args
    match step.type:
        case "COPY":
            if not 2 <= len(args) <= 4 or not args[1]:
                return "needs a source and a destination, and may have a user and a mode"
            if not step.files_hash:
                return "needs the filesHash of its uploaded files"
            if len(args) == 4 and args[3] and not re.fullmatch(r"[0-7]{1,5}", args[3]):
                return f"mode {args[3][:20]!r} is not an octal number such as '0755'"
        case "RUN":
            if not 1 <= len(args) <= 2 or not args[0].strip():
                return "needs a command, and may have a user"
        case "ENV":
            if not args or len(args) % 2:
                return "needs names and values in turn"
            for name in args[::2]:
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name):
                    return f"{name[:80]!r} cannot be the name of an environment variable"
        case "WORKDIR" | "USER":
            if len(args) != 1 or not args[0].strip():
                return "needs exactly one argument"
        case "ARG":
            if not args or not args[0].strip():
                return "needs a name"
        case _:
            return f"unknown type; use one of {', '.join(STEP_TYPES)}"
    return ""
