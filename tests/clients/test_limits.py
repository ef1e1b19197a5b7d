"""What the clients raise when an Emberbox is full or is asked too often, and that they go on when it is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import e2b
import pytest
from e2b import Sandbox

from tests.clients.support.host import Host
from tests.clients.support.instance import Emberbox
from tests.clients.support.teams import set_request_rate
from tests.clients.support.timing import SCALE, eventually, seconds, whole_seconds

RATE, BURST = 2, 20
SETTINGS = {"EMBERBOX_MAX_MACHINES": "1", "EMBERBOX_RATE_PER_SECOND": str(RATE), "EMBERBOX_RATE_BURST": str(BURST)}

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("limits")]


@pytest.fixture(scope="module", autouse=True)
def _rate(breakable: Host) -> Iterator[None]:
    """In the lab the first team is older than these settings."""
    before = set_request_rate(breakable, RATE, BURST)
    time.sleep(seconds(3))  # the api looks again now and then
    yield
    set_request_rate(breakable, *before)


@pytest.fixture(autouse=True)
def _room_to_ask(own_emberbox: Emberbox) -> Iterator[None]:
    """Whoever is next, also the end of the instance, finds some requests left."""
    yield
    time.sleep(3)


def test_a_full_node_is_a_busy_service_and_has_room_after_a_kill(own_emberbox: Emberbox) -> None:
    first = Sandbox.create(timeout=whole_seconds(300))
    try:
        with pytest.raises(e2b.ServiceBusyException, match="may run 1"):
            Sandbox.create(timeout=whole_seconds(300))
        assert first.commands.run("echo unharmed").stdout == "unharmed\n"
    finally:
        first.kill()

    second = Sandbox.create(timeout=whole_seconds(300))
    assert second.commands.run("echo room").stdout == "room\n"
    second.kill()


def test_too_many_requests_are_a_rate_limit_and_pass_again_later(own_emberbox: Emberbox) -> None:
    def ask(_: int) -> str:
        try:
            Sandbox.list().next_items()
        except e2b.RateLimitException as error:
            return str(error)
        return ""

    many = 80 if SCALE == 1 else 160  # a slow API lets some pass meanwhile
    with ThreadPoolExecutor(many // 2) as pool:
        answers = list(pool.map(ask, range(many)))

    refused = [answer for answer in answers if answer]
    assert refused, f"{many} requests at once met no limit of 20"
    assert "a second" in refused[0]
    assert "" in answers
    eventually(lambda: ask(0) == "", within=90, every=1, what="a request passes again")


def test_a_single_client_is_slowed_down_not_refused(own_emberbox: Emberbox) -> None:
    for _ in range(30):
        Sandbox.list().next_items()
