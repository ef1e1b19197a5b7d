"""What the steps of a build mean: the state they accumulate, and the keys of the cache.

A step's key is the hash of everything that its result depends on: the key before it (which begins with the base's
layers), its type and arguments with variables filled in, its files, and the state that it runs in. Nothing here
touches a machine.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from emberbox.node.building.model import DEFAULT_USER, DEFAULT_WORKDIR, SANE_PATH, Step, StepFailed, StepType
from emberbox.node.errors import BadValue

KEY_VERSION = "1"
"""Raised when steps begin to mean something else, so that nothing cached before is used."""

_VARIABLE = re.compile(
    r"""\\(?P<escaped>[\\$"])
    | \$(?P<plain>[A-Za-z_][A-Za-z0-9_]*)
    | \$\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)(?::(?P<kind>[-+])(?P<word>[^}]*))?\}""",
    re.VERBOSE,
)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_HASH = re.compile(r"[0-9a-zA-Z]{16,128}")
_MODE = re.compile(r"[0-7]{1,5}")


@dataclass(frozen=True, slots=True)
class BuildState:
    """What later steps run with, and what becomes the template's defaults."""

    env: Mapping[str, str] = field(default_factory=dict)
    args: Mapping[str, str] = field(default_factory=dict)
    """Variables of this build alone (`ARG`)."""
    user: str = DEFAULT_USER
    workdir: str = DEFAULT_WORKDIR

    @property
    def variables(self) -> dict[str, str]:
        return {**self.args, **self.env}

    def expand(self, text: str) -> str:
        """Fill in `$NAME`, `${NAME}`, `${NAME:-default}` and `${NAME:+other}`, as Dockerfiles have them."""
        known = {"PATH": SANE_PATH, **self.variables}

        def value(match: re.Match[str]) -> str:
            if match["escaped"]:
                return match["escaped"]
            found = known.get(match["plain"] or match["braced"], "")
            if match["kind"] == "-":
                return found or match["word"]
            if match["kind"] == "+":
                return match["word"] if found else ""
            return found

        return _VARIABLE.sub(value, text)

    def path(self, text: str) -> str:
        """An absolute path inside; relative ones start at the working directory, `~` is the user's home."""
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        if text == "~" or text.startswith("~/"):
            text = home + text[1:]
        return "/" + posixpath.normpath(posixpath.join(self.workdir or home, text)).lstrip("/")


@dataclass(frozen=True, slots=True)
class Work:
    """A step with everything that its doing needs."""

    step: Step
    key: str
    before: BuildState
    after: BuildState
    words: tuple[str, ...]
    """Arguments with variables filled in, as the type has them."""
    in_machine: bool
    """False when only the state changes."""
    forced: bool
    """Not to be taken from the cache."""


def read_steps(raw: Iterable[tuple[str, Sequence[str], str, bool]]) -> tuple[Step, ...]:
    """Check steps of (type, args, files_hash, force).

    Raises:
        BadValue: a type is unknown or arguments do not fit; says which step.
    """
    steps = []
    for number, (kind, args, files_hash, force) in enumerate(raw, start=1):
        try:
            type = StepType(kind.upper())
        except ValueError:
            known = ", ".join(StepType)
            raise BadValue(f"step {number} has the unknown type '{kind[:40]}'; use one of {known}") from None
        step = Step(number, type, tuple(args), files_hash, force)
        if problem := _problem(step):
            raise BadValue(f"step {number} ({type}) {problem}")
        steps.append(step)
    return tuple(steps)


def _problem(step: Step) -> str:
    args = step.args
    if any("\0" in arg for arg in args):
        return "has a NUL character in an argument"
    match step.type:
        case StepType.RUN:
            if not 1 <= len(args) <= 2 or not args[0].strip():
                return "needs a command, and may have a user"
        case StepType.COPY:
            if not 2 <= len(args) <= 4 or not args[0] or not args[1]:
                return "needs a source and a destination, and may have a user and a mode"
            if not _HASH.fullmatch(step.files_hash):
                return "needs the hash of its uploaded files"
            if len(args) == 4 and args[3] and not _MODE.fullmatch(args[3]):
                return f"has the mode '{args[3][:20]}', which is not an octal number such as 0755"
        case StepType.ENV:
            if not args or len(args) % 2:
                return "needs names and values in turn"
            for name in args[::2]:
                if not _ENV_NAME.fullmatch(name):
                    return f"has '{name[:80]}', which cannot be the name of a variable"
        case StepType.ARG:
            if not args or not args[0].strip():
                return "needs a name"
        case StepType.WORKDIR | StepType.USER:
            if len(args) != 1 or not args[0].strip():
                return "needs exactly one argument"
    return ""


def base_key(layers: Sequence[str], disk_size_mb: int, *, team_id: str = "", more: str = "") -> str:
    """The key that a chain begins with."""
    return _hash(KEY_VERSION, list(layers), disk_size_mb, team_id, more)


def chain(steps: Sequence[Step], start: str, state: BuildState, *, force: bool) -> list[Work]:
    """Lay out a build: what each step does and the key of its result.

    Args:
        start: the key of what the first step finds.
        force: nothing comes from the cache.

    Raises:
        StepFailed: a step's arguments make no sense once variables are filled in.
    """
    works: list[Work] = []
    key = start
    forced = force
    for step in steps:
        forced = forced or step.force
        try:
            words, after, in_machine = _meaning(step, state)
        except StepFailed as error:
            raise StepFailed(str(error), step=step.name) from None
        if in_machine:
            key = _hash(key, step.type, list(words), step.files_hash, *_surroundings(step, state))
        works.append(Work(step, key, state, after, words, in_machine, forced))
        state = after
    return works


def final_key(key: str, state: BuildState) -> str:
    """The key of the layer that a chain packs into."""
    return _hash("made", key, state.user, state.workdir)


def _surroundings(step: Step, state: BuildState) -> tuple[object, ...]:
    """What a step's result depends on besides its own arguments."""
    if step.type is StepType.RUN:
        return (sorted(state.variables.items()), state.user, state.workdir)
    return ()


def _meaning(step: Step, state: BuildState) -> tuple[tuple[str, ...], BuildState, bool]:
    args = step.args
    match step.type:
        case StepType.RUN:
            user = state.expand(args[1]) if len(args) > 1 else ""
            return (args[0], user or state.user), state, True
        case StepType.COPY:
            return _copy_words(step, state), state, True
        case StepType.ENV:
            new = {name: state.expand(value) for name, value in zip(args[::2], args[1::2], strict=True)}
            after = replace(state, env={**state.env, **new})
            return (("PATH", new["PATH"]) if "PATH" in new else ()), after, "PATH" in new
        case StepType.ARG:
            return (), replace(state, args={**state.args, **_arg_values(args, state)}), False
        case StepType.USER:
            # `name:group` names a group that nothing here uses: the agent takes the user's own.
            user = state.expand(args[0]).partition(":")[0]
            if not user:
                raise StepFailed(f"USER '{args[0]}' is empty once its variables are filled in")
            return (user,), replace(state, user=user), True
        case StepType.WORKDIR:
            folder = state.expand(args[0])
            if not folder:
                raise StepFailed(f"WORKDIR '{args[0]}' is empty once its variables are filled in")
            path = state.path(folder)
            return (path, state.user), replace(state, workdir=path), True


def _copy_words(step: Step, state: BuildState) -> tuple[str, ...]:
    """(source pattern, destination, owner, mode)."""
    source, destination, owner, mode = (*step.args, "", "")[:4]
    pattern = posixpath.normpath(state.expand(source))
    if pattern.startswith("/"):
        pattern = posixpath.normpath(pattern.lstrip("/") or ".")
    if pattern == ".." or pattern.startswith("../"):
        raise StepFailed(f"COPY's source '{source}' lies outside the folder that it copies from")
    target = state.expand(destination)
    if not target:
        raise StepFailed(f"COPY's destination '{destination}' is empty once its variables are filled in")
    place = state.path(target)
    if target.endswith(("/", "/.")) and place != "/":
        place += "/"
    return pattern, place, state.expand(owner) or state.user, mode


def _arg_values(args: Sequence[str], state: BuildState) -> dict[str, str]:
    """`ARG` comes as NAME=VALUE words, or as a name and a value."""
    if len(args) == 2 and "=" not in args[0]:
        return {args[0]: state.expand(args[1])}
    pairs = (arg.partition("=") for arg in args)
    return {name: state.expand(value) for name, sign, value in pairs if sign}


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
