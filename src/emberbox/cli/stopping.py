"""`emberbox down`."""

from __future__ import annotations

import json
import signal

from emberbox.cli import node_client
from emberbox.cli.errors import CliError, NotRunning
from emberbox.cli.output import err, note, warn
from emberbox.cli.state import State, StateDir, effective_settings, running_state
from emberbox.edge.main import end_leftover
from emberbox.linux import processes
from emberbox.node.model import State as Kept
from emberbox.settings import Settings

STOP_SECONDS = 120.0
ROLE_GRACE = 15.0

END_SANDBOXES = signal.SIGUSR1
"""Asks a supervisor to end the running sandboxes after the api has stopped, and then to stop like on SIGTERM."""


def down(settings: Settings, *, keep: bool) -> None:
    """Stop the roles and end the running sandboxes; with `keep`, leave the sandboxes running for the next `up`.

    Raises:
        CliError: something is still there after that.
    """
    try:
        state = running_state(settings)
    except NotRunning as nothing:
        end_leftover(settings)
        note(nothing.message)
        if not keep and (left := _left_running(settings)):
            raise CliError(
                f"{count(left)} may still run without it; `emberbox up --detach` finds them again, and `emberbox down` "
                "ends them then"
            ) from None
        return
    settings = effective_settings(settings, state)
    _tell(settings, keep=keep)
    if state.supervisor.alive:
        state.supervisor.signal(signal.SIGTERM if keep else END_SANDBOXES)
        if not state.supervisor.wait(STOP_SECONDS):
            logs = settings.data_dir / "logs"
            raise CliError(
                f"the supervisor (pid {state.supervisor.pid}) is still there after {STOP_SECONDS:.0f} s; see {logs}"
            )
    else:
        _stop_roles(settings, state, keep=keep)
    err.print("Emberbox has stopped")


def _tell(settings: Settings, *, keep: bool) -> None:
    view = node_client.look(settings)
    if view is None:
        warn("the node does not answer: sandboxes that run are found again by the next `emberbox up`")
        return
    if view.running:
        note(f"{'leaving' if keep else 'ending'} {count(view.running)} running")
    if view.paused:
        note(f"{count(view.paused)} paused: kept")


def _stop_roles(settings: Settings, state: State, *, keep: bool) -> None:
    """Stop the roles of a supervisor that was killed."""
    by_name = {one.name: one.process for one in state.processes}
    if "api" in by_name:
        by_name["api"].stop(grace=ROLE_GRACE)
    if not keep:
        end_sandboxes(settings)
    for name in ("edge", "node"):
        if name in by_name:
            by_name[name].stop(grace=ROLE_GRACE)
    # An edge that was killed leaves its HAProxy running for the next one.
    end_leftover(settings)
    StateDir(settings).clear()


def _left_running(settings: Settings) -> tuple[str, ...]:
    """Sandboxes that ran when the last node stopped, and still may: the host was not restarted since."""
    this_boot = processes.boot_id()
    found = []
    for path in sorted((settings.node_dir / "records").glob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if record.get("state") == Kept.RUNNING and record.get("boot_id") == this_boot:
            found.append(path.stem)
    return tuple(found)


def end_sandboxes(settings: Settings) -> None:
    """End what runs on the node. Call it when no api can make new ones."""
    view = node_client.look(settings)
    if view is not None and view.running:
        node_client.kill(settings, view.running)


def count(sandbox_ids: tuple[str, ...]) -> str:
    return f"{len(sandbox_ids)} sandbox" + ("" if len(sandbox_ids) == 1 else "es")
