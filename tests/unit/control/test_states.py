"""The table of the life cycle: its shape, its page, and random walks through it on a real store."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberbox.control.states import IN_TRANSITION, SHOWN, TRANSITIONS, Event, State, moves, shown_as
from emberbox.store import sandboxes as rows
from emberbox.store.engine import Store
from emberbox.store.migrate import migrate
from emberbox.store.records import SandboxRecord, TeamRecord
from emberbox.store.teams import add_team

PAGE = Path(__file__).parents[3] / "docs" / "life-cycle.md"


def test_a_sandbox_can_be_killed_and_can_end_in_every_state() -> None:
    for state in set(State) - {State.ENDED}:
        assert TRANSITIONS[state, Event.KILL] is State.KILLING
        assert TRANSITIONS[state, Event.ENDED] is State.ENDED


def test_nothing_leaves_the_end() -> None:
    assert [pair for pair in TRANSITIONS if pair[0] is State.ENDED] == []


def test_every_state_is_reached_from_creating() -> None:
    reached, before = {State.CREATING}, set()
    while reached != before:
        before = set(reached)
        reached |= {target for (source, _), target in TRANSITIONS.items() if source in reached}

    assert reached == set(State)


def test_a_transition_is_left_without_being_asked() -> None:
    asked = {Event.PAUSE, Event.RESUME, Event.KILL}

    for state in IN_TRANSITION:
        ways_out = {event for (source, event) in TRANSITIONS if source is state} - asked
        assert ways_out, state


def test_every_event_is_used() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_what_is_shown_are_the_states_that_a_client_can_use() -> None:
    assert set(SHOWN) == set(State) - {State.CREATING, State.KILLING, State.ENDED}
    assert shown_as("running") == ("running",)
    assert set(shown_as("paused")) == {"pausing", "paused", "resuming"}


def test_the_page_has_the_same_table() -> None:
    documented: dict[tuple[str, str], str] = {}
    for sources, event, target in re.findall(r"^\| (.+) \| `(\w+)` \| `(\w+)` \|$", PAGE.read_text(), re.MULTILINE):
        named = re.findall(r"`(\w+)`", sources)
        if sources.startswith("all but"):
            named = [state.value for state in State if state.value not in named]
        documented.update({(source, event): target for source in named})

    assert documented == {(source.value, event.value): target.value for (source, event), target in TRANSITIONS.items()}


def test_the_page_shows_every_state() -> None:
    first_table = PAGE.read_text().split("| from |")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| .+ \| (?:`(\w+)`|404) \|$", first_table, re.MULTILINE))

    assert shown == {state.value: SHOWN.get(state, "") for state in State}


# ---- on a store


def sandbox(sandbox_id: str, team_id: str) -> SandboxRecord:
    return SandboxRecord(
        id=sandbox_id,
        team_id=team_id,
        template_id="t",
        build_id="b",
        alias=None,
        state=State.CREATING.value,
        state_changed_at=0,
        worker=None,
        node_id="n",
        address="",
        cpu_count=1,
        memory_mb=128,
        disk_size_mb=512,
        rates={},
        agent_version="",
        metadata={},
        secure=True,
        allow_internet=None,
        network={},
        volume_mounts=[],
        auto_pause=False,
        auto_pause_memory=True,
        auto_resume=False,
        timeout_seconds=1,
        started_at=0,
        end_at=1,
        paused_at=None,
        pause_memory=None,
        ended_at=None,
        end_reason=None,
        idempotency_key=None,
        idempotency_hash=None,
        api_key_id=None,
    )


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(list(Event)), max_size=12))
def test_a_row_moves_as_the_table_says_and_in_no_other_way(events: list[Event]) -> None:
    async def walk() -> None:
        with tempfile.TemporaryDirectory() as home:
            store = Store(f"sqlite:///{home}/a.db")
            try:
                await migrate(store)
                await add_team(store, TeamRecord("team", "Team", "team", True, 9, 9, 9, 9, 0))
                await rows.add(store, [sandbox("i1", "team")], limit=1)
                state = State.CREATING
                for event in events:
                    expected = TRANSITIONS.get((state, event))
                    moved = await rows.move(store, "i1", transitions=moves(event), changes={})
                    assert (moved.state if moved else None) == (expected.value if expected else None)
                    state = expected or state
                found = await rows.get(store, "i1")
                assert found is not None
                assert found.state == state.value
            finally:
                await store.close()

    asyncio.run(walk())


async def test_of_two_moves_at_once_one_wins(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/a.db")
    try:
        await migrate(store)
        await add_team(store, TeamRecord("team", "Team", "team", True, 9, 9, 9, 9, 0))
        await rows.add(store, [sandbox("i1", "team")], limit=1)
        await rows.move(store, "i1", transitions=moves(Event.STARTED), changes={})

        moved = await asyncio.gather(
            *(rows.move(store, "i1", transitions=moves(Event.PAUSE), changes={}) for _ in range(10))
        )
    finally:
        await store.close()

    assert [one for one in moved if one is not None] != []
    assert sum(one is not None for one in moved) == 1


@pytest.mark.parametrize("team", ["team", "other"])
async def test_a_move_is_the_teams_own(tmp_path: Path, team: str) -> None:
    store = Store(f"sqlite:///{tmp_path}/a.db")
    try:
        await migrate(store)
        await add_team(store, TeamRecord("team", "Team", "team", True, 9, 9, 9, 9, 0))
        await rows.add(store, [sandbox("i1", "team")], limit=1)

        moved = await rows.move(store, "i1", transitions=moves(Event.KILL), team_id=team, changes={})
    finally:
        await store.close()

    assert (moved is not None) == (team == "team")
