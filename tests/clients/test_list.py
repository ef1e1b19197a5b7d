"""Listing sandboxes: filters, order and pages."""

from __future__ import annotations

import datetime
import uuid

import pytest
from e2b import Sandbox, SandboxQuery, SandboxState

from tests.clients.support.timing import whole_seconds


@pytest.fixture(scope="module")
def family(emberbox):
    """Five sandboxes with a mark of their own; the last is paused."""
    mark = uuid.uuid4().hex
    made = [
        Sandbox.create(timeout=whole_seconds(1800), metadata={"mark": mark, "number": str(n), "odd key": "a&b=c é/+%"})
        for n in range(5)
    ]
    made[4].pause()
    yield mark, [each.sandbox_id for each in made]
    for each in made:
        each.kill()


def _ids(paginator):
    found = []
    while paginator.has_next:
        found += [each.sandbox_id for each in paginator.next_items()]
    return found


def _list(mark, **options):
    metadata = {"mark": mark, **options.pop("metadata", {})}
    query = {key: options.pop(key) for key in ("state", "started_after", "template") if key in options}
    return _ids(Sandbox.list(query=SandboxQuery(metadata=metadata, **query), **options))


def test_running_and_paused_are_listed_newest_first(family):
    mark, ids = family

    assert _list(mark) == ids[::-1]


def test_order_may_be_turned(family):
    mark, ids = family

    assert _list(mark, order="asc") == ids
    assert _list(mark, order="desc") == ids[::-1]


def test_states_filter(family):
    mark, ids = family

    assert sorted(_list(mark, state=[SandboxState.RUNNING])) == sorted(ids[:4])
    assert _list(mark, state=[SandboxState.PAUSED]) == [ids[4]]
    assert sorted(_list(mark, state=[SandboxState.RUNNING, SandboxState.PAUSED])) == sorted(ids)


def test_all_metadata_must_match(family):
    mark, ids = family

    assert _list(mark, metadata={"number": "2"}) == [ids[2]]
    assert _list(mark, metadata={"number": "2", "odd key": "a&b=c é/+%"}) == [ids[2]]
    assert _list(mark, metadata={"number": "99"}) == []


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_give_each_sandbox_once(family, limit, order):
    mark, ids = family
    paginator = Sandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=limit, order=order)

    pages = []
    while paginator.has_next:
        pages.append([each.sandbox_id for each in paginator.next_items()])

    assert all(len(page) <= limit for page in pages)
    assert [each for page in pages for each in page] == (ids if order == "asc" else ids[::-1])


def test_a_page_can_be_continued_by_its_token(family):
    mark, ids = family
    first = Sandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=2)
    start = [each.sandbox_id for each in first.next_items()]

    rest = _ids(Sandbox.list(query=SandboxQuery(metadata={"mark": mark}), limit=2, next_token=first.next_token))

    assert start + rest == ids[::-1]


def test_the_exhausted_paginator_says_so(family):
    mark, _ = family
    paginator = Sandbox.list(query=SandboxQuery(metadata={"mark": mark}))
    paginator.next_items()

    assert paginator.has_next is False
    with pytest.raises(Exception, match="No more items"):
        paginator.next_items()


def test_started_after_filters(family):
    mark, ids = family
    third = Sandbox.get_info(ids[2]).started_at

    assert _list(mark, started_after=third) == ids[:1:-1]
    assert _list(mark, started_after=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)) == []


def test_template_filters_by_name_and_id(family):
    mark, ids = family
    template_id = Sandbox.get_info(ids[0]).template_id

    assert _list(mark, template="base") == ids[::-1]
    assert _list(mark, template=template_id) == ids[::-1]
    assert _list(mark, template="no-such-template") == []


def test_listed_sandboxes_carry_their_details(family):
    mark, ids = family

    listed = Sandbox.list(query=SandboxQuery(metadata={"mark": mark, "number": "0"})).next_items()[0]

    assert listed.sandbox_id == ids[0]
    assert listed.metadata["odd key"] == "a&b=c é/+%"
    assert listed.name == "base"
    assert listed.state == SandboxState.RUNNING
    assert listed.cpu_count >= 1
    assert listed.end_at > listed.started_at


def test_the_first_list_shows_running_ones_only(family, api):
    mark, ids = family

    answer = api.get("/sandboxes", params={"metadata": f"mark={mark}"})

    assert sorted(each["sandboxID"] for each in answer.json()) == sorted(ids[:4])


def test_the_list_counts_what_runs(family, api):
    answer = api.get("/v2/sandboxes", params={"limit": 1})

    assert int(answer.headers["x-total-running"]) >= 4


@pytest.mark.parametrize("limit", ["0", "-1", "101", "1000000000000", "ten"])
def test_limits_out_of_range_are_a_bad_request(api, limit):
    answer = api.get("/v2/sandboxes", params={"limit": limit})

    assert answer.status_code == 400
    assert "limit" in answer.json()["message"]


@pytest.mark.parametrize("token", ["garbage", "AAAA", "é", "x" * 5000])
def test_a_token_nobody_issued_is_a_bad_request(api, token):
    answer = api.get("/v2/sandboxes", params={"nextToken": token})

    assert answer.status_code == 400
    assert answer.json()["code"] == 400


@pytest.mark.parametrize(
    "query", [{"state": "flying"}, {"order": "sideways"}, {"startedAfter": "yesterday"}, {"state": ""}], ids=str
)
def test_filters_that_make_no_sense_are_a_bad_request_or_ignored_when_empty(api, query):
    answer = api.get("/v2/sandboxes", params=query)

    assert answer.status_code == (200 if query == {"state": ""} else 400)
