"""The OCI bundle of a machine: what runc (or another OCI runtime) reads to isolate it.

Nothing here depends on the host's cgroup version or on runc; a runtime such as runsc gets the same bundle.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberbox.linux import netns
from emberbox.runtime.base import MIB, Limits, MachineSpec
from emberbox.runtime.container.seccomp import profile

AGENT_PATH = "/usr/local/lib/.emberd"
"""Where the agent is inside."""
ID_COUNT = 65536
CPU_PERIOD_US = 100_000

# What apt, pip, sudo, su and servers need of root inside. All of it counts in the machine's user namespace only.
_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]

_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/cmdline",
    "/proc/config.gz",
    "/proc/kallsyms",
    "/proc/kcore",
    "/proc/key-users",
    "/proc/keys",
    "/proc/kpagecgroup",
    "/proc/kpagecount",
    "/proc/kpageflags",
    "/proc/latency_stats",
    "/proc/modules",
    "/proc/sched_debug",
    "/proc/schedstat",
    "/proc/scsi",
    "/proc/slabinfo",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/vmallocinfo",
]
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]

# Of the host's /sys: how many CPUs there are, and what allocators ask. Nothing else is there.
_SYS_PARTS = ("/sys/devices/system/cpu", "/sys/kernel/mm/transparent_hugepage")

_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of a bundle are on the host."""

    rootfs: Path
    agent: Path
    etc: Path
    """Folder with the machine's `hosts`, `hostname` and `resolv.conf`."""
    cgroup: str
    """Path below the root of every cgroup hierarchy."""


def configuration(spec: MachineSpec, places: Places, first_id: int, *, swap_accounting: bool) -> dict[str, Any]:
    """The bundle's config.json."""
    # A container cannot have more than the node may give: its root has no say over the host's limits.
    open_files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 1_048_576)
    return {
        "ociVersion": "1.0.2",
        "hostname": spec.hostname,
        "root": {"path": str(places.rootfs), "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": 0o022},
            "args": [AGENT_PATH],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                f"EMBERD_CONTROL_HASH={spec.control_hash}",
            ],
            "cwd": "/",
            # Without the ambient and inheritable sets: a user who is not root starts with nothing.
            "capabilities": {
                "bounding": _CAPABILITIES,
                "effective": _CAPABILITIES,
                "permitted": _CAPABILITIES,
            },
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "hard": open_files, "soft": min(open_files, 65_536)},
                {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
                {"type": "RLIMIT_MEMLOCK", "hard": 8 * MIB, "soft": 8 * MIB},
            ],
            "noNewPrivileges": False,  # sudo
            "oomScoreAdj": 0,  # the agent raises it for what it starts, so that it goes last itself
        },
        "mounts": _mounts(spec, places),
        "linux": {
            "uidMappings": [{"containerID": 0, "hostID": first_id, "size": ID_COUNT}],
            "gidMappings": [{"containerID": 0, "hostID": first_id, "size": ID_COUNT}],
            "namespaces": [
                {"type": "pid"},
                {"type": "ipc"},
                {"type": "uts"},
                {"type": "mount"},
                {"type": "user"},
                {"type": "cgroup"},
                {"type": "network", "path": str(netns.DIRECTORY / spec.slot.netns)},
            ],
            "cgroupsPath": places.cgroup,
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    *({"allow": True, "type": "c", "major": a, "minor": b, "access": "rw"} for _, a, b in _DEVICES),
                    {"allow": True, "type": "c", "major": 5, "minor": 2, "access": "rw"},  # ptmx
                    {"allow": True, "type": "c", "major": 136, "access": "rw"},  # pts
                ],
                **resources(spec.limits, swap_accounting=swap_accounting),
            },
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
            "rootfsPropagation": "rprivate",
            "seccomp": profile(),
        },
    }


def resources(limits: Limits, *, swap_accounting: bool) -> dict[str, Any]:
    """cpu, memory and pids as OCI says them."""
    memory = {"limit": limits.memory_mb * MIB}
    if swap_accounting:
        memory["swap"] = limits.memory_mb * MIB  # memory and swap together: none of it is swap
    return {
        "cpu": {"quota": limits.cpu_count * CPU_PERIOD_US, "period": CPU_PERIOD_US, "shares": 1024},
        "memory": memory,
        "pids": {"limit": limits.pids},
    }


def _mounts(spec: MachineSpec, places: Places) -> list[dict[str, Any]]:
    half = max(spec.limits.memory_mb // 2, 64)
    quiet = ["nosuid", "noexec", "nodev"]
    mounts = [
        _mount("/proc", "proc", "proc", *quiet),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=64k", "nr_inodes=1k"),
        _mount(
            "/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid", "nodev", "mode=1777", f"size={half}m"),
        _mount("/dev/mqueue", "mqueue", "mqueue", *quiet),
        _mount("/run", "tmpfs", "tmpfs", "nosuid", "nodev", "mode=755", f"size={half}m"),
        _mount("/sys", "tmpfs", "tmpfs", *quiet, "ro", "mode=755", "size=64k", "nr_inodes=1k"),
    ]
    mounts += [_mount(part, "bind", part, "rbind", "ro", *quiet) for part in _SYS_PARTS if Path(part).is_dir()]
    mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", "ro", *quiet))
    mounts += [
        _mount(f"/etc/{name}", "bind", str(places.etc / name), "bind", "rw", "nosuid", "nodev", "noexec")
        for name in ("hosts", "hostname", "resolv.conf")
    ]
    mounts.append(_mount(AGENT_PATH, "bind", str(places.agent), "bind", "ro", "nosuid", "nodev"))
    return mounts


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def write(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json, readable by root alone."""
    path = directory / "config.json"
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, separators=(",", ":")))
