"""Builds while parts of Emberbox are killed."""

from __future__ import annotations

import time
import uuid

import httpx
import pytest
from e2b import Sandbox, Template

from tests.clients.support.raw import Api
from tests.clients.support.timing import eventually, seconds, whole_seconds

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("builds")]

SLOWLY = "for n in $(seq 60); do echo line-$n; sleep 0.2; done; echo done > ~/done"


@pytest.fixture
def name(builder):
    chosen = f"s-{uuid.uuid4().hex[:12]}"
    yield chosen
    with Api(builder) as api:
        api.delete(f"/templates/{chosen}")


def kill(host, process, before):
    """Kill a process, of which `before` is the pid: asking for that takes as long as some builds."""
    host.kill(before)
    eventually(lambda: host.pids().get(process, before) != before, within=180, every=0.2, what=f"{process} is back")
    eventually(lambda: _healthy(host.emberbox), within=180, every=0.2, what="the API answers")


def _healthy(emberbox):
    try:
        return httpx.get(f"{emberbox.api_url}/health", timeout=10, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def begun(info):
    """Wait until the build's steps print."""
    eventually(lambda: _printed(info), within=120, every=0.1, what="the step prints")


def _printed(info):
    return [entry for entry in Template.get_build_status(info).log_entries if entry.message.startswith("line-")]


def finished(info):
    """The last status and the whole log, read page by page."""
    entries, status = [], None
    while status is None or status.status.value in ("waiting", "building") or status.log_entries:
        status = Template.get_build_status(info, logs_offset=len(entries))
        entries += status.log_entries
        time.sleep(0.1)
    return status, [entry.message for entry in entries]


def test_a_build_outlives_the_api_and_its_log_is_whole(builder_host, name):
    pids = builder_host.pids()
    info = Template.build_in_background(Template().from_template("base").run_cmd(SLOWLY), name)
    begun(info)

    kill(builder_host, "api", pids["api"])
    status, log = finished(info)
    sandbox = Sandbox.create(name, timeout=whole_seconds(600))
    content = sandbox.commands.run("cat ~/done").stdout
    sandbox.kill()

    assert status.status.value == "ready", status.reason
    assert [line for line in log if line.startswith("line-")] == [f"line-{n}" for n in range(1, 61)]
    assert content == "done\n"


def test_a_build_whose_node_is_killed_fails_clearly_and_works_the_next_time(builder_host, name):
    template = Template().from_template("base").run_cmd("echo first > ~/first").run_cmd(SLOWLY)
    pids = builder_host.pids()
    info = Template.build_in_background(template, name)
    begun(info)

    kill(builder_host, "node", pids["node"])
    status, _ = finished(info)
    Template.build(template, name)

    assert status.status.value == "error"
    assert "the node restarted during the build" in status.reason.message
    assert Template.exists(name)
