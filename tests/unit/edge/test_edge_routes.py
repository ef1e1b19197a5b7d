"""Routes and their table: what is a route, and that the file holds all of it."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from emberbox.edge.errors import BadRoute
from emberbox.edge.routes import GROUPS, Lane, LanePool, Placed, Route, RouteTable

IDS = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=20)
ROUTES = st.builds(
    Route,
    sandbox_id=IDS,
    address=st.ip_addresses(v=4),
    traffic_token_sha256=st.one_of(st.just(""), st.text("0123456789abcdef", min_size=64, max_size=64)),
    mask_request_host=st.sampled_from(["", "app.local", "app.local:${PORT}", "${PORT}.x"]),
    https_ports=st.lists(st.integers(1, 65535), max_size=4).map(tuple),
)


@given(ROUTES, st.integers(0, 5000), st.integers(0, 50))
def test_a_route_is_read_back_as_it_was_written(route: Route, lane: int, tls_lane: int) -> None:
    placed = Placed(route, Lane(lane), Lane(tls_lane, tls=True) if route.https_ports else None)

    assert Placed.parse(route.sandbox_id, placed.value) == placed
    assert "\n" not in placed.value


def test_a_route_without_more_is_three_fields() -> None:
    placed = Placed(Route.parse("iabc", "198.18.0.2"), Lane(35))

    assert placed.value == f"198.18.0.2|lanes_{35 % GROUPS}|l35"


@pytest.mark.parametrize(
    "fields",
    [
        {"sandbox_id": "", "address": "10.0.0.1"},
        {"sandbox_id": "UPPER", "address": "10.0.0.1"},
        {"sandbox_id": "a b", "address": "10.0.0.1"},
        {"sandbox_id": "a\nb", "address": "10.0.0.1"},
        {"sandbox_id": "ok", "address": ""},
        {"sandbox_id": "ok", "address": "::1"},
        {"sandbox_id": "ok", "address": "10.0.0.1|x"},
        {"sandbox_id": "ok", "address": "10.0.0.1", "token_sha256": "short"},
        {"sandbox_id": "ok", "address": "10.0.0.1", "mask": "a|b"},
        {"sandbox_id": "ok", "address": "10.0.0.1", "mask": "a\r\nX-Evil: 1"},
        {"sandbox_id": "ok", "address": "10.0.0.1", "https_ports": [0]},
        {"sandbox_id": "ok", "address": "10.0.0.1", "https_ports": [70000]},
    ],
)
def test_what_is_no_route_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BadRoute):
        Route.parse(**fields)  # type: ignore[arg-type]


def test_a_line_that_cannot_be_read_costs_no_other_route(tmp_path: Path) -> None:
    path = tmp_path / "routes.map"
    path.write_text("iabc 10.0.0.1|lanes_0|l0\nbroken\nidef 10.0.0.2|lanes_1|lx\nighi 10.0.0.3|lanes_0|l0\n\n")
    table = RouteTable(path, lanes=64, tls_lanes=4)

    refused = table.load()

    assert [placed.route.sandbox_id for placed in table] == ["iabc"]
    assert len(refused) == 4


def test_a_lane_that_was_given_back_is_the_last_to_be_taken_again() -> None:
    pool = LanePool(4)
    first = pool.take()
    pool.give_back(first)

    taken = [pool.take() for _ in range(4)]

    assert taken[-1] == first


def test_a_full_pool_doubles() -> None:
    pool = LanePool(2)

    taken = {pool.take().number for _ in range(5)}

    assert taken == {0, 1, 2, 3, 4}
    assert pool.capacity == 8


def test_a_route_keeps_its_lane_until_it_moves(tmp_path: Path) -> None:
    table = RouteTable(tmp_path / "routes.map", lanes=64, tls_lanes=4)
    first, _ = table.put(Route.parse("iabc", "10.0.0.1"))

    same, nothing_freed = table.put(Route.parse("iabc", "10.0.0.1", mask="x.test"))
    moved, freed = table.put(Route.parse("iabc", "10.0.0.2"))

    assert (same.lane, nothing_freed) == (first.lane, None)
    assert moved.lane != first.lane
    assert freed == same


class TableMachine(RuleBasedStateMachine):
    """The table, its file, and a plain dictionary agree, whatever is done in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "routes.map"
        self.table = RouteTable(self.path, lanes=4, tls_lanes=2)
        self.model: dict[str, Route] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(route=ROUTES)
    def put(self, route: Route) -> None:
        self.table.put(route)
        self.model[route.sandbox_id] = route

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        if self.model:
            sandbox_id = data.draw(st.sampled_from(sorted(self.model)))
            self.table.drop(sandbox_id)
            del self.model[sandbox_id]

    @rule()
    def restart(self) -> None:
        self.table.save()
        self.table = RouteTable(self.path, lanes=4, tls_lanes=2)
        assert self.table.load() == []

    @invariant()
    def holds_what_it_was_given(self) -> None:
        assert {placed.route.sandbox_id: placed.route for placed in self.table} == self.model

    @invariant()
    def gives_every_sandbox_lanes_of_its_own(self) -> None:
        lanes = [lane for placed in self.table for lane in placed.lanes]
        assert len(set(lanes)) == len(lanes)
        plain, tls = self.table.capacity
        assert all(lane.number < (tls if lane.tls else plain) for lane in lanes)


TestTable = TableMachine.TestCase
