"""The life cycle of a sandbox, as a table.

A sandbox is in exactly one state. A move happens in one transaction that checks the state it moves from, so of two
requests that contradict each other one wins and the other is told. A state whose name ends in -ing is a transition
that an api process carries out; when that process dies, `reconcile.py` finishes or undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    CREATING = "creating"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    KILLING = "killing"
    ENDED = "ended"


class Event(StrEnum):
    STARTED = "started"
    """The node started the machine."""
    START_FAILED = "start_failed"
    PAUSE = "pause"
    """Somebody asks for a pause."""
    PAUSE_DONE = "pause_done"
    PAUSE_FAILED = "pause_failed"
    """The machine goes on running."""
    RESUME = "resume"
    RESUME_DONE = "resume_done"
    RESUME_FAILED = "resume_failed"
    """The machine stays paused."""
    KILL = "kill"
    ENDED = "ended"
    """The machine is gone: killed, timed out, died or lost."""
    FOUND_RUNNING = "found_running"
    """The node says that it runs."""
    FOUND_PAUSED = "found_paused"
    """The node says that it is paused (it pauses by itself at the deadline)."""


_S, _E = State, Event

TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (_S.CREATING, _E.STARTED): _S.RUNNING,
        (_S.CREATING, _E.START_FAILED): _S.ENDED,
        (_S.RUNNING, _E.PAUSE): _S.PAUSING,
        (_S.PAUSING, _E.PAUSE_DONE): _S.PAUSED,
        (_S.PAUSING, _E.PAUSE_FAILED): _S.RUNNING,
        (_S.PAUSED, _E.RESUME): _S.RESUMING,
        (_S.RESUMING, _E.RESUME_DONE): _S.RUNNING,
        (_S.RESUMING, _E.RESUME_FAILED): _S.PAUSED,
        # What the node does by itself, or did while nobody listened.
        (_S.RUNNING, _E.FOUND_PAUSED): _S.PAUSED,
        (_S.PAUSING, _E.FOUND_PAUSED): _S.PAUSED,
        (_S.RESUMING, _E.FOUND_PAUSED): _S.PAUSED,
        (_S.RUNNING, _E.FOUND_RUNNING): _S.RUNNING,
        (_S.PAUSED, _E.FOUND_RUNNING): _S.RUNNING,
        (_S.PAUSING, _E.FOUND_RUNNING): _S.RUNNING,
        (_S.RESUMING, _E.FOUND_RUNNING): _S.RUNNING,
        # A sandbox can be killed, and can end, in every state; asking twice is harmless.
        **{(state, _E.KILL): _S.KILLING for state in _S if state is not _S.ENDED},
        **{(state, _E.ENDED): _S.ENDED for state in _S if state is not _S.ENDED},
    }
)

SHOWN: Mapping[State, str] = MappingProxyType(
    {
        _S.RUNNING: "running",
        _S.PAUSING: "paused",
        _S.PAUSED: "paused",
        _S.RESUMING: "paused",
    }
)
"""The state that the API shows. States that are not here answer 404: not there yet, or gone."""

IN_TRANSITION = frozenset({_S.CREATING, _S.PAUSING, _S.RESUMING, _S.KILLING})


def moves(event: Event) -> dict[str, str]:
    """State -> next state, for every state in which `event` is allowed."""
    return {source.value: target.value for (source, on), target in TRANSITIONS.items() if on is event}


def shown_as(*names: str) -> tuple[str, ...]:
    """The states that the API shows under `names`."""
    return tuple(state.value for state, name in SHOWN.items() if name in names)
