"""What `up` leaves for the other commands."""

from __future__ import annotations

import os
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from emberbox.cli.errors import CliError, NotRunning
from emberbox.cli.exports import client_variables
from emberbox.cli.processes import ProcessRef
from emberbox.cli.state import (
    AlreadyRunning,
    RoleProcess,
    State,
    StateDir,
    as_environment,
    effective_settings,
    running_state,
)
from emberbox.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, api_port=3100, edge_port=3102, dns_upstreams=("192.0.2.1",))


@pytest.fixture
def state_dir(settings: Settings) -> StateDir:
    directory = StateDir(settings)
    directory.make()
    return directory


def a_state(settings: Settings, process: ProcessRef) -> State:
    return State("1.2.3", "ready", process, settings.model_dump(mode="json"), [RoleProcess("api", process, 2)])


def test_a_state_is_read_back_as_it_was_written(settings: Settings, state_dir: StateDir) -> None:
    state = a_state(settings, ProcessRef.of(os.getpid()))

    state_dir.write(state)

    assert state_dir.read() == state


def test_only_root_can_read_the_directory(state_dir: StateDir) -> None:
    assert state_dir.path.stat().st_mode & 0o777 == 0o700


def test_a_damaged_state_says_so(state_dir: StateDir) -> None:
    (state_dir.path / "state.json").write_text('{"version": 1}')

    with pytest.raises(CliError, match="damaged"):
        state_dir.read()


def test_the_directory_has_one_holder(settings: Settings, state_dir: StateDir) -> None:
    state_dir.write(a_state(settings, ProcessRef.of(os.getpid())))

    with state_dir.lock(), pytest.raises(AlreadyRunning, match=f"pid {os.getpid()}"), StateDir(settings).lock():
        pass


def test_a_state_whose_processes_are_gone_is_not_running(settings: Settings, state_dir: StateDir) -> None:
    gone = ProcessRef(os.getpid(), 1, "another boot")
    state_dir.write(a_state(settings, gone))

    with pytest.raises(NotRunning, match="emberbox up"):
        running_state(settings)


def test_later_commands_use_the_settings_that_up_was_started_with(settings: Settings, state_dir: StateDir) -> None:
    state_dir.write(a_state(settings, ProcessRef.of(os.getpid())))

    used = effective_settings(Settings(data_dir=settings.data_dir), state_dir.read())

    assert used == settings


def test_settings_survive_the_way_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(
        data_dir=tmp_path,
        slot_network=IPv4Network("198.19.0.0/16"),
        inherit_host_network=True,
        deny_networks=("192.0.2.0/24", "198.51.100.0/24"),
        tls_cert=Path("/etc/ssl/a.pem"),
    )

    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)

    assert Settings() == settings


def test_the_variables_of_an_instance(settings: Settings, state_dir: StateDir) -> None:
    state_dir.write_key("e2b_" + "0" * 40)

    assert client_variables(settings) == {
        "E2B_API_URL": "http://localhost:3100",
        "E2B_SANDBOX_URL": "http://localhost:3102",
        "E2B_API_KEY": "e2b_" + "0" * 40,
    }


def test_there_are_no_variables_before_the_first_up(settings: Settings) -> None:
    with pytest.raises(CliError, match="emberbox up"):
        client_variables(settings)
