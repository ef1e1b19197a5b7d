"""The agent alone, as PID 1 of a machine made by the test, driven by the official client."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest
from e2b import Sandbox
from e2b.connection_config import ConnectionConfig
from packaging.version import Version

from tests.support.agent import AGENT, AgentMachine

MISSING = [t for t in ("ip", "unshare", "setpriv") if shutil.which(t) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if os.geteuid() != 0:
        reason = "needs root: the agent runs as PID 1 in new namespaces"
    elif MISSING:
        reason = f"needs {', '.join(MISSING)}"
    elif shutil.which("go") is None and not (AGENT / "build" / "emberd").exists():
        reason = "needs Go, or a built agent/build/emberd"
    for item in items:
        if reason and "integration/agent" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def machine() -> Iterator[AgentMachine]:
    with AgentMachine() as machine:
        yield machine


@pytest.fixture
def fresh_machine() -> Iterator[AgentMachine]:
    """A machine that the test may spoil."""
    with AgentMachine() as machine:
        yield machine


@pytest.fixture(scope="module")
def connect() -> Callable[..., Sandbox]:
    """Make the official client's sandbox object for a bare agent."""

    def connect(machine: AgentMachine, token: str | None = None) -> Sandbox:
        return Sandbox(
            sandbox_id="agent-test",
            sandbox_domain=None,
            envd_version=Version("0.6.4"),
            envd_access_token=token,
            traffic_access_token=None,
            connection_config=ConnectionConfig(
                sandbox_url=machine.url,
                api_key="e2b_" + "0" * 40,
                extra_sandbox_headers={"X-Access-Token": token} if token else {},
            ),
        )

    return connect


@pytest.fixture
def sandbox(machine: AgentMachine, connect: Callable[..., Sandbox]) -> Sandbox:
    return connect(machine)
