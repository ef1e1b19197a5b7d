"""What a sandbox used and what it said."""

from __future__ import annotations

import datetime
import json

import pytest
from e2b import Sandbox, SandboxNotFoundException

from tests.clients.support.timing import eventually, seconds


def test_metrics_are_sampled_while_it_runs(sandbox):
    samples = eventually(sandbox.get_metrics, within=90, every=0.5, what="a first sample")

    sample = samples[-1]
    assert sample.cpu_count >= 1
    assert sample.cpu_used_pct >= 0
    assert 0 < sample.mem_used <= sample.mem_total
    assert 0 <= sample.mem_cache <= sample.mem_total
    assert 0 < sample.disk_used < sample.disk_total
    assert sample.mem_total == pytest.approx(sandbox.get_info().memory_mb * 1024 * 1024, rel=0.25)
    assert abs((datetime.datetime.now(datetime.UTC) - sample.timestamp).total_seconds()) < seconds(60)


def test_work_shows_in_the_metrics(make_sandbox):
    sandbox = make_sandbox()
    sandbox.commands.run("head -c 150M /dev/zero > ~/ballast; sync; while :; do :; done", background=True, timeout=0)

    busy = eventually(
        lambda: [each for each in sandbox.get_metrics() if each.cpu_used_pct > 10 and each.disk_used > 100_000_000],
        within=90,
        every=0.5,
        what="a busy sample",
    )

    assert busy[0].cpu_used_pct > 10


def test_metrics_can_be_cut_by_time(sandbox):
    eventually(sandbox.get_metrics, within=90, every=0.5, what="a first sample")
    hour = datetime.timedelta(hours=1)
    now = datetime.datetime.now(datetime.UTC)

    assert sandbox.get_metrics(start=now - hour, end=now + hour)
    assert sandbox.get_metrics(start=now + hour) == []
    assert sandbox.get_metrics(end=now - hour) == []


def test_metrics_of_several_sandboxes_come_in_one_answer(sandbox, api):
    eventually(sandbox.get_metrics, within=90, every=0.5, what="a first sample")

    answer = api.get("/sandboxes/metrics", params={"sandbox_ids": f"{sandbox.sandbox_id},i{'0' * 19}"})

    found = answer.json()["sandboxes"]
    assert list(found) == [sandbox.sandbox_id]
    assert found[sandbox.sandbox_id]["cpuCount"] >= 1


def test_metrics_of_nothing_are_not_found(emberbox):
    with pytest.raises(SandboxNotFoundException):
        Sandbox.get_metrics("i" + "0" * 19)


def test_both_logs_tell_the_same_story(sandbox, api):
    sandbox.commands.run("echo into the log")
    first = eventually(
        lambda: api.get(f"/sandboxes/{sandbox.sandbox_id}/logs").json()["logs"], within=90, every=0.3, what="a log line"
    )
    second = api.get(f"/v2/sandboxes/{sandbox.sandbox_id}/logs").json()["logs"]

    # The CLI parses each line as JSON and reads its level.
    levels = {json.loads(entry["line"])["level"].upper() for entry in first}
    assert levels <= {"DEBUG", "INFO", "WARN", "ERROR"}
    assert all(datetime.datetime.fromisoformat(entry["timestamp"]) for entry in first + second)
    assert all({"timestamp", "level", "message"} <= entry.keys() for entry in second)


def test_logs_page_by_cursor_without_loss(sandbox, api):
    eventually(lambda: _v2(api, sandbox), within=90, every=0.3, what="a log line")
    everything = _v2(api, sandbox, direction="forward", limit=1000)

    newest = _v2(api, sandbox, direction="backward", limit=1)

    assert newest[0]["timestamp"] >= everything[-1]["timestamp"]


def test_logs_of_nothing_are_not_found(api, emberbox):
    assert api.get(f"/sandboxes/i{'0' * 19}/logs").status_code == 404
    assert api.get(f"/v2/sandboxes/i{'0' * 19}/logs").status_code == 404


def _v2(api, sandbox, **query):
    return api.get(f"/v2/sandboxes/{sandbox.sandbox_id}/logs", params=query).json()["logs"]
