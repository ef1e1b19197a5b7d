"""What `emberbox up` leaves for the other commands, in `data_dir`/run/supervisor (root, 0700).

`lock` is held while a supervisor runs. `state.json` says which processes run and with which settings. `key.json` holds
the first team's API key, for `emberbox env`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from emberbox.cli.errors import CliError, NotRunning
from emberbox.cli.processes import ProcessRef
from emberbox.settings import Settings

Phase = Literal["starting", "ready", "stopping"]


@dataclass(frozen=True)
class RoleProcess:
    name: str
    process: ProcessRef
    restarts: int = 0


@dataclass(frozen=True)
class State:
    """One instance as its supervisor last wrote it down."""

    version: str
    phase: Phase
    supervisor: ProcessRef
    settings: dict[str, Any]
    """The settings that the roles were started with, as JSON values."""
    processes: list[RoleProcess] = field(default_factory=list)


class StateDir:
    """The supervisor's own directory."""

    def __init__(self, settings: Settings) -> None:
        self.path = settings.run_dir / "supervisor"

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the instance.

        Raises:
            AlreadyRunning: another supervisor holds it.
        """
        # Python opens files close-on-exec, so the roles do not keep the lock when the supervisor is killed.
        with (self.path / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning(self.read()) from None
            yield

    def read(self) -> State | None:
        """The last written state, or None when Emberbox has never run here or was stopped cleanly.

        Raises:
            CliError: no permission, or a damaged file.
        """
        raw = self._read("state.json")
        if raw is None:
            return None
        try:
            return State(
                version=raw["version"],
                phase=raw["phase"],
                supervisor=ProcessRef(**raw["supervisor"]),
                settings=raw["settings"],
                processes=[RoleProcess(p["name"], ProcessRef(**p["process"]), p["restarts"]) for p in raw["processes"]],
            )
        except (KeyError, TypeError) as error:
            raise CliError(
                f"{self.path / 'state.json'} is damaged ({error!r}); stop the processes by hand and remove it"
            ) from None

    def write(self, state: State) -> None:
        self._write("state.json", asdict(state))

    def clear(self) -> None:
        """Forget the processes: they have ended."""
        with suppress(FileNotFoundError):
            (self.path / "state.json").unlink()

    def read_key(self) -> str | None:
        raw = self._read("key.json")
        return None if raw is None else str(raw["api_key"])

    def write_key(self, api_key: str) -> None:
        self._write("key.json", {"api_key": api_key})

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            value = json.loads((self.path / name).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            raise CliError(f"reading {self.path} needs root: run this command as root, or with sudo") from None
        except json.JSONDecodeError as error:
            raise CliError(f"{self.path / name} is damaged: {error}") from None
        if not isinstance(value, dict):
            raise CliError(f"{self.path / name} is damaged: not an object")
        return value

    def _write(self, name: str, value: object) -> None:
        temporary = self.path / f".{name}.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as handle:
            json.dump(value, handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(self.path / name)


class AlreadyRunning(CliError):
    """A supervisor holds the data directory."""

    def __init__(self, state: State | None) -> None:
        super().__init__(
            "Emberbox already runs on this data directory"
            + (f" (pid {state.supervisor.pid})" if state else "")
            + ": `emberbox env` prints its variables, `emberbox down` stops it, --data DIR starts another one"
        )
        self.state = state


def running_state(settings: Settings) -> State:
    """The state of the instance, which has live processes.

    Raises:
        NotRunning: nothing of it runs.
    """
    state = StateDir(settings).read()
    if state is None or not (state.supervisor.alive or any(role.process.alive for role in state.processes)):
        raise NotRunning(f"Emberbox does not run on {settings.data_dir}: start it with `emberbox up`")
    return state


def effective_settings(settings: Settings, state: State | None) -> Settings:
    """The settings that the running instance was started with, so that later commands need only `--data`."""
    return settings if state is None else Settings(**state.settings)


def as_environment(settings: Settings) -> dict[str, str]:
    """`settings` as the `EMBERBOX_*` variables of the roles."""
    environment = {}
    for name, value in settings.model_dump(mode="json").items():
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            environment[f"EMBERBOX_{name.upper()}"] = text
    return environment
