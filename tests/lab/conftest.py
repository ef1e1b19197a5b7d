"""Fixtures of the tests of microVMs on their host: a lab that runs already, or this machine where its KVM runs guests.

Start a lab first with `make lab`; a boot takes longer than a test may. Without one these tests need
EMBERBOX_RUNTIME=firecracker, which `suite.py` sets where it works, and start an Emberbox of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2b import Sandbox

from tests.clients.support import instance, leaks
from tests.clients.support.host import host_of
from tests.clients.support.instance import Emberbox
from tests.lab.host import Lab
from tests.lab.lab import LabError, client_variables
from tests.lab.support import PATIENCE, KvmHost

_SMALL = {
    "EMBERBOX_WARM_MAX": "2",
    "EMBERBOX_DEFAULT_CPU_COUNT": "1",
    "EMBERBOX_DEFAULT_MEMORY_MB": "256",
    "EMBERBOX_DEFAULT_DISK_SIZE_MB": "1024",
}
"""As in the lab: see `environment.sh`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    possible = Lab().running() is not None or _runs_here()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.lab)
            if not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(600))
            if not possible:
                item.add_marker(pytest.mark.skip(reason="no lab is running; start it with 'make lab'"))


def _runs_here() -> bool:
    return os.environ.get("EMBERBOX_RUNTIME") == "firecracker"


@pytest.fixture(scope="session")
def emberbox() -> Iterator[Emberbox]:
    lab = Lab()
    if lab.running() is None:
        if not _runs_here():
            pytest.skip("the lab has ended")
        own = instance.start(settings=_SMALL)
        try:
            yield own
        finally:
            leaks.end_and_count(own, all_killed=False)  # a test that failed half-way is told once
        return
    try:
        variables = client_variables(lab)
    except LabError as error:
        pytest.skip(str(error))
    yield Emberbox(*(variables[name] for name in instance.ENV_NAMES))


@pytest.fixture(scope="session")
def host(emberbox: Emberbox) -> KvmHost:
    found = host_of(emberbox)
    if isinstance(found, str):
        pytest.skip(found)
    return KvmHost(found)


@pytest.fixture(scope="session", autouse=True)
def client_environment(emberbox: Emberbox) -> Iterator[None]:
    """Points the official clients at it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in emberbox.client_env.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def new_sandbox() -> Iterator[Callable[[], Sandbox]]:
    """Makes sandboxes that end with the test."""
    made: list[Sandbox] = []

    def make() -> Sandbox:
        sandbox = Sandbox.create(timeout=1800, request_timeout=PATIENCE)
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        sandbox.kill(request_timeout=PATIENCE)
