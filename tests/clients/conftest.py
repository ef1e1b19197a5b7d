"""Fixtures of the client tests: an Emberbox, sandboxes that end with their test, and plain HTTP beside the clients.

The same files run against every runtime. Set E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY to use an Emberbox that
runs; without them one is started for the run, ended after it, and counted: nothing of it may be left on the host.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from e2b import AsyncSandbox, Sandbox

from tests.clients.support import instance, leaks
from tests.clients.support.host import Host, host_of
from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import Agent, Api
from tests.clients.support.shared import SharedEmberbox
from tests.clients.support.timing import seconds, whole_seconds
from tests.support import registry
from tests.support.registry import LocalRegistry
from tests.support.scale import TIME_SCALE

HERE = Path(__file__).parent
GIVEN = instance.from_environment()
"""Read once: while an Emberbox of the tests runs, its own variables are in the environment."""
QEMU_HOST = "10.0.2.2"
"""This machine, seen from the lab."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(seconds(1200)))


@pytest.fixture(scope="session")
def emberbox(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Emberbox]:
    if GIVEN is not None:
        with _client_environment(GIVEN):
            yield GIVEN
        return

    base = tmp_path_factory.getbasetemp()
    shared = SharedEmberbox(base if worker_id == "master" else base.parent)
    own = shared.take()
    try:
        with _client_environment(own):
            yield own
    finally:
        last = shared.give_back()
        if last is not None:
            leaks.end_and_count(last, all_killed=True)


@contextlib.contextmanager
def _client_environment(emberbox: Emberbox) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in emberbox.client_env}
    os.environ.update(emberbox.client_env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="session")
def worker_id(request: pytest.FixtureRequest) -> str:
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def host(emberbox: Emberbox) -> Host:
    """The host that the Emberbox runs on, to run commands there."""
    return _host_of(emberbox)


def _host_of(emberbox: Emberbox) -> Host:
    found = host_of(emberbox)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def api(emberbox: Emberbox) -> Iterator[Api]:
    """The REST API without a client's interpretation."""
    with contextlib.closing(Api(emberbox)) as it:
        yield it


@pytest.fixture
def agent_of(emberbox: Emberbox) -> Iterator[Callable[..., Agent]]:
    """Plain HTTP to a sandbox through the edge: `agent_of(sandbox, port=8000)`."""
    with contextlib.ExitStack() as stack:

        def make(sandbox: Any, port: int = 49983, **options: Any) -> Agent:
            return stack.enter_context(contextlib.closing(Agent(emberbox, sandbox, port, **options)))

        yield make


@pytest.fixture(scope="module")
def sandbox(emberbox: Emberbox) -> Iterator[Sandbox]:
    """A sandbox shared by a module's tests; they use paths and processes of their own in it."""
    shared = Sandbox.create(timeout=whole_seconds(3600))
    yield shared
    shared.kill()


@pytest.fixture
def make_sandbox(emberbox: Emberbox) -> Iterator[Callable[..., Sandbox]]:
    """Creates sandboxes that are killed when the test ends."""
    made: list[Sandbox] = []

    def make(template: str | None = None, **options: Any) -> Sandbox:
        options.setdefault("timeout", whole_seconds(600))
        made.append(Sandbox.create(template, **options))
        return made[-1]

    yield make
    for each in made:
        each.kill()


@pytest.fixture
async def make_async_sandbox(emberbox: Emberbox) -> AsyncIterator[Callable[..., Any]]:
    made: list[AsyncSandbox] = []

    async def make(template: str | None = None, **options: Any) -> AsyncSandbox:
        options.setdefault("timeout", whole_seconds(600))
        made.append(await AsyncSandbox.create(template, **options))
        return made[-1]

    yield make
    for each in made:
        await each.kill()


@pytest.fixture
def folder(sandbox: Sandbox, request: pytest.FixtureRequest) -> str:
    """A directory in the shared sandbox that only this test uses."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    path = f"/home/user/{name}"
    sandbox.files.make_dir(path)
    return path


@pytest.fixture(scope="session")
def lab_host() -> Host | None:
    """The lab, when the Emberbox that was given is the one in it."""
    found = host_of(GIVEN) if GIVEN is not None else None
    return found if isinstance(found, Host) else None


@pytest.fixture(scope="session")
def lab_settings(lab_host: Host | None) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """In the lab: `lab_settings({...})` has Emberbox restarted when it runs with other settings. Elsewhere nothing."""
    now: Mapping[str, str] | None = {}

    def use(settings: Mapping[str, str]) -> None:
        nonlocal now
        if lab_host is not None and settings != now:
            now = None  # until it has started
            lab_host.restart(settings)
            now = dict(settings)

    yield use
    use({})


@pytest.fixture(scope="module", autouse=True)
def _lab_has_settings(
    request: pytest.FixtureRequest, lab_host: Host | None, lab_settings: Callable[[Mapping[str, str]], None]
) -> None:
    """The lab has one Emberbox: it runs with what a module's own one would have."""
    if lab_host is None:
        return
    of_module = [item for item in request.session.items if item.path == request.path]
    if any("building" in getattr(item, "fixturenames", ()) for item in of_module):
        lab_settings(_builder_settings(lab_host.tree, request.getfixturevalue("registries")))
    else:
        lab_settings(getattr(request.module, "SETTINGS", {}))


@pytest.fixture(scope="module")
def own_emberbox(request: pytest.FixtureRequest) -> Iterator[Emberbox]:
    """An Emberbox of the module's own, to break; in the lab the one there, whose tests run singly. Its tests may use
    nothing of the shared one.

    A module's `SETTINGS` are its environment variables.
    """
    if GIVEN is not None:
        _host_of(GIVEN)
        with _client_environment(GIVEN):
            yield GIVEN
        return
    own = instance.start(settings=getattr(request.module, "SETTINGS", None))
    try:
        with _client_environment(own):
            yield own
    finally:
        # A test that failed half-way has not killed its sandboxes; one failure is told once.
        leaks.end_and_count(own, all_killed=False)


@pytest.fixture(scope="module")
def breakable(own_emberbox: Emberbox) -> Host:
    """`own_emberbox`, whose processes a test may kill."""
    return _host_of(own_emberbox)


@pytest.fixture(scope="session")
def registries(lab_host: Host | None) -> Iterator[tuple[LocalRegistry, ...]]:
    """A registry for everybody and one that asks for a password; none where they cannot run."""
    if registry.missing():
        yield ()
        return
    seen_as = QEMU_HOST if lab_host is not None else ""
    with (
        registry.local_registry(seen_as=seen_as) as everybodys,
        registry.local_registry(user="me", password="s3cret", seen_as=seen_as) as private,
    ):
        yield everybodys, private


@pytest.fixture
def local_registries(builder_host: Host, registries: tuple[LocalRegistry, ...]) -> tuple[LocalRegistry, ...]:
    """`registries`, whose images the Emberbox of `builder` may fetch."""
    if not registries:
        pytest.skip(f"needs {registry.missing()}; `make install-dev` installs it")
    return registries


def _builder_settings(tree: str, registries: tuple[LocalRegistry, ...], *, time_scale: float = 1.0) -> dict[str, str]:
    """A template has little time to become ready, and a small one is shipped.

    Args:
        time_scale: what the Emberbox multiplies its time-outs by, beyond what its host needs.
    """
    return {
        "EMBERBOX_READY_SECONDS": str(20 / time_scale),
        "EMBERBOX_TEMPLATES_DIR": f"{tree}/tests/clients/shipped",
        "EMBERBOX_INSECURE_REGISTRIES": json.dumps([each.host for each in registries]),
    }


@pytest.fixture(scope="session")
def building(registries: tuple[LocalRegistry, ...]) -> Iterator[Emberbox]:
    """An Emberbox to build templates with."""
    if GIVEN is not None:
        yield GIVEN
        return
    own = instance.start(settings=_builder_settings(str(instance.ROOT), registries, time_scale=TIME_SCALE))
    try:
        yield own
    finally:
        # A test that failed half-way has not killed its sandboxes; one failure is told once.
        leaks.end_and_count(own, all_killed=False)


@pytest.fixture
def builder(building: Emberbox) -> Iterator[Emberbox]:
    """The clients talk to the Emberbox that builds."""
    with _client_environment(building):
        yield building


@pytest.fixture
def builder_host(builder: Emberbox) -> Host:
    """Where `builder` runs; its processes may be killed."""
    return _host_of(builder)
