"""What `doctor` and `up` find out about a host."""

from __future__ import annotations

import socket
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from emberbox.cli.requirements import (
    Requirement,
    Unmet,
    Verdict,
    check_agent,
    check_disk,
    check_ports,
    check_program,
    check_slot_network,
)
from emberbox.settings import Settings
from tests.support.ports import free_ports


def test_a_taken_port_is_named_with_the_option_that_changes_it(tmp_path: Path) -> None:
    (free,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        with pytest.raises(Unmet) as unmet:
            check_ports(Settings(data_dir=tmp_path, edge_port=port, api_port=free))

    assert f"port {port} on 127.0.0.1 is taken" in unmet.value.detail
    assert "--edge-port" in unmet.value.remedy


def test_free_ports_are_found_free(tmp_path: Path) -> None:
    api_port, edge_port = free_ports(2)

    assert "free" in check_ports(Settings(data_dir=tmp_path, api_port=api_port, edge_port=edge_port))


def test_a_missing_program_says_which_package_brings_it() -> None:
    with pytest.raises(Unmet) as unmet:
        check_program("mkfs.erofs-of-nowhere", "--version")

    assert unmet.value.detail == "mkfs.erofs-of-nowhere is not installed"


def test_a_program_tells_its_version() -> None:
    assert "bash" in check_program("bash", "--version")


def test_a_missing_agent_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(Unmet) as unmet:
        check_agent(Settings(agent_path=tmp_path / "emberd"))

    assert "make agent" in unmet.value.remedy


def test_the_disk_is_measured_where_the_data_will_be(tmp_path: Path) -> None:
    assert str(tmp_path) in check_disk(Settings(data_dir=tmp_path / "not" / "yet"))


def test_an_optional_requirement_that_is_not_met_is_absent_and_not_missing(tmp_path: Path) -> None:
    def unmet(_: Settings) -> str:
        raise Unmet("no", "do")

    settings = Settings(data_dir=tmp_path)

    assert Requirement("x", unmet).examine(settings).verdict is Verdict.MISSING
    assert Requirement("x", unmet, optional=True).examine(settings).verdict is Verdict.ABSENT


def test_a_port_that_is_asked_for_twice_is_refused(tmp_path: Path) -> None:
    (port,) = free_ports(1)

    with pytest.raises(Unmet, match="asked for twice") as unmet:
        check_ports(Settings(data_dir=tmp_path, api_port=port, edge_port=port))

    assert "--edge-port" in unmet.value.remedy


def test_a_slot_network_that_somebody_has_addresses_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unmet, match=r"127\.0\.0\.1 of 127\.0\.0\.0/16 is lo's already") as unmet:
        check_slot_network(Settings(data_dir=tmp_path, slot_network=IPv4Network("127.0.0.0/16")))

    assert "--slot-network" in unmet.value.remedy


def test_a_slot_network_of_two_addresses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unmet, match="room for 0 machines"):
        check_slot_network(Settings(data_dir=tmp_path, slot_network=IPv4Network("198.19.0.0/31")))


def test_a_free_slot_network_is_found_free(tmp_path: Path) -> None:
    assert "198.19.77.0/24" in check_slot_network(
        Settings(data_dir=tmp_path, slot_network=IPv4Network("198.19.77.0/24"))
    )
