"""What the OCI bundle promises."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from emberbox.runtime.base import Limits, MachineSpec, Slot
from emberbox.runtime.container import seccomp
from emberbox.runtime.container.bundle import Places, configuration


@pytest.fixture
def config(tmp_path: Path) -> dict:  # type: ignore[type-arg]
    slot = Slot(3, "eb1-3", IPv4Address("198.18.0.13"), IPv4Address("198.18.0.14"))
    spec = MachineSpec("m1", tmp_path, (), tmp_path / "u", slot, Limits(2, 512, 1024, 100), "box", "ab" * 32)
    places = Places(tmp_path / "rootfs", tmp_path / "emberd", tmp_path / "etc", "/eb1/m1")
    return configuration(spec, places, 1_000_196_608, swap_accounting=True)


def test_every_namespace_is_new_and_the_network_is_the_slots(config: dict) -> None:  # type: ignore[type-arg]
    namespaces = {entry["type"]: entry.get("path") for entry in config["linux"]["namespaces"]}

    assert namespaces == {
        "pid": None,
        "ipc": None,
        "uts": None,
        "mount": None,
        "user": None,
        "cgroup": None,
        "network": "/run/netns/eb1-3",
    }


def test_no_capability_reaches_beyond_the_machine(config: dict) -> None:  # type: ignore[type-arg]
    dangerous = {
        "SYS_ADMIN",
        "SYS_PTRACE",
        "NET_ADMIN",
        "NET_RAW",
        "SYS_MODULE",
        "SYS_RAWIO",
        "MKNOD",
        "BPF",
        "SYS_BOOT",
    }

    for name, capabilities in config["process"]["capabilities"].items():
        assert name in ("bounding", "effective", "permitted")
        assert not {f"CAP_{word}" for word in dangerous} & set(capabilities)


def test_limits_are_written_and_swap_is_none(config: dict) -> None:  # type: ignore[type-arg]
    resources = config["linux"]["resources"]

    assert resources["memory"] == {"limit": 512 << 20, "swap": 512 << 20}
    assert resources["cpu"]["quota"] == 2 * resources["cpu"]["period"]
    assert resources["pids"] == {"limit": 100}
    assert resources["devices"][0] == {"allow": False, "access": "rwm"}


def test_only_the_machines_own_files_are_mounted_writable(config: dict) -> None:  # type: ignore[type-arg]
    binds = {m["destination"]: m["options"] for m in config["mounts"] if m["type"] == "bind"}

    writable = {target for target, options in binds.items() if "ro" not in options}
    assert writable == {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert all("nosuid" in options and "nodev" in options for options in binds.values())


def test_no_system_call_is_in_two_answers() -> None:
    allowed, refused = set(seccomp._ALLOWED), set(seccomp._OWNERS_ONLY)

    assert not allowed & refused
    assert len(seccomp._ALLOWED) == len(allowed)
    assert not allowed & {"clone", "clone3", "unshare", "socket", "socketpair", "personality"}


def test_an_unknown_system_call_does_not_exist() -> None:
    profile = seccomp.profile()

    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    assert profile["defaultErrnoRet"] == 38
    assert len(profile["architectures"]) == 1
