"""What Emberbox needs of a host, tried for real where that is possible. For `emberbox doctor` and `emberbox up`."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path

from emberbox.cli import kvm
from emberbox.cli.errors import CliError
from emberbox.runtime.firecracker import setup as firecracker
from emberbox.runtime.firecracker.errors import FirecrackerError
from emberbox.settings import Settings

SUPPORTED_SYSTEMS = {("debian", "12"), ("debian", "13"), ("ubuntu", "24.04")}
OLDEST_KERNEL = (5, 15)
"""mount_setattr(2) with idmapped mounts for EROFS and ext4 below an overlay; Debian 12 has 6.1, Ubuntu 24.04 6.8."""
LEAST_FREE_DISK = 5 * 1024**3
CONTROLLERS = ("cpu", "memory", "pids")
COMMAND_SECONDS = 15
_LEAST_ADDRESSES = 64
"""Of a slot network; fewer are no use."""


class Verdict(StrEnum):
    FOUND = "found"
    MISSING = "missing"
    """Emberbox does not work without it."""
    ABSENT = "absent"
    """Only a part of Emberbox needs it; the rest works."""


@dataclass(frozen=True)
class Finding:
    """One requirement and what became of it.

    `detail` says what was seen; `remedy` what to do, empty when there is nothing to do.
    """

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


class Unmet(Exception):
    """Raised by a check: `detail`, then what to do about it."""

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remedy = remedy


@dataclass(frozen=True)
class Requirement:
    """`check` returns what it found, or raises `Unmet`."""

    name: str
    check: Callable[[Settings], str]
    optional: bool = False

    def examine(self, settings: Settings) -> Finding:
        try:
            return Finding(self.name, Verdict.FOUND, self.check(settings))
        except Unmet as unmet:
            verdict = Verdict.ABSENT if self.optional else Verdict.MISSING
            return Finding(self.name, verdict, unmet.detail, unmet.remedy)


def examine(settings: Settings, *, running: bool) -> Iterator[Finding]:
    """Check everything, in the order in which a person would mend it.

    Args:
        running: this instance runs, so its ports are rightly in use.
    """
    root = os.geteuid() == 0
    kvm_finding = Finding("kvm", Verdict.ABSENT, "not tried")
    for requirement in _requirements(settings):
        if running and requirement.name == "ports":
            yield Finding("ports", Verdict.FOUND, "in use by this instance, which runs")
        elif not root and requirement.name in NEED_ROOT:
            yield Finding(
                requirement.name, Verdict.ABSENT, "not tried: trying it needs root", "run `emberbox doctor` as root"
            )
        else:
            finding = requirement.examine(settings)
            if finding.name == "kvm":
                kvm_finding = finding
            yield finding
    yield Finding("runtime", Verdict.FOUND, runtime_here(settings, kvm_finding))


def runtime_here(settings: Settings, kvm_finding: Finding) -> str:
    """Which runtime a node takes here and why, for people: the rule of `node.runtimes`, without starting one."""
    if settings.runtime != "auto":
        return f"{settings.runtime}, as it is set"
    if kvm_finding.verdict is not Verdict.FOUND:
        return f"container, as there is no KVM to use: {kvm_finding.detail}"
    if not firecracker.present(settings):
        return "container, as Firecracker is not installed; with `emberbox setup` sandboxes are microVMs"
    if not _guest_is_there(settings):
        return "firecracker if a guest kernel boots when Emberbox starts, else container; `emberbox setup` tries it now"
    return "firecracker, as a guest kernel boots on this host's KVM"


def require(settings: Settings) -> None:
    """Stop before anything is started when something needed is missing.

    Raises:
        CliError: with the first one's sentence.
    """
    for requirement in _requirements(settings):
        if requirement.optional or requirement.name == "system":
            continue
        finding = requirement.examine(settings)
        if finding.verdict is Verdict.MISSING:
            raise CliError(f"{finding.detail}; {finding.remedy} (`emberbox doctor` checks everything)")


def require_root() -> None:
    """Raises CliError for everybody else."""
    try:
        check_root()
    except Unmet as unmet:
        raise CliError(f"{unmet.detail}; {unmet.remedy}") from None


def _requirements(settings: Settings) -> list[Requirement]:
    microvms = settings.runtime == "firecracker"
    return [
        Requirement("system", check_system, optional=True),
        Requirement("root", check_root),
        Requirement("kernel", check_kernel),
        Requirement("cgroups", check_cgroups),
        Requirement("user namespaces", check_user_namespaces, optional=microvms),
        Requirement("overlayfs", check_overlayfs),
        Requirement("erofs", check_erofs),
        Requirement("loop devices", check_loop_devices),
        Requirement("network namespaces", check_network),
        Requirement("nftables", check_nftables),
        Requirement("kvm", check_kvm, optional=not microvms),
        Requirement(settings.runc, lambda s: check_program(s.runc, "--version"), optional=microvms),
        *(
            Requirement(program, lambda _, p=program, f=flag: check_program(p, f))  # type: ignore[misc]
            for program, flag in PROGRAMS.items()
        ),
        Requirement("agent", check_agent),
        Requirement("disk", check_disk),
        Requirement("ports", check_ports),
        Requirement("slot network", check_slot_network),
    ]


PROGRAMS = {
    "haproxy": "-v",
    "mmdebstrap": "--version",
    "mkfs.erofs": "-V",
    "mkfs.ext4": "-V",
    "skopeo": "--version",
    "umoci": "--version",
}
PACKAGES = {"mkfs.erofs": "erofs-utils", "mkfs.ext4": "e2fsprogs", "nft": "nftables"}
NEED_ROOT = frozenset(
    {"user namespaces", "overlayfs", "erofs", "nftables", "network namespaces", "kvm", "loop devices"}
)


# ---- the host


def check_system(_: Settings) -> str:
    release = _os_release()
    name = release.get("PRETTY_NAME", "an unknown system")
    if (release.get("ID"), release.get("VERSION_ID")) not in SUPPORTED_SYSTEMS:
        raise Unmet(
            f"{name} is not one of the systems that Emberbox is tested on",
            "expect surprises; Debian 12, Debian 13 and Ubuntu 24.04 are",
        )
    return name


def check_root(_: Settings | None = None) -> str:
    if os.geteuid() != 0:
        raise Unmet(
            f"this runs as user {os.geteuid()}, and only root can make machines",
            "run it as root or with sudo; api and edge then give root up by themselves",
        )
    return "running as root"


def check_kernel(_: Settings) -> str:
    if platform.system() != "Linux":
        raise Unmet(f"this is {platform.system()}", "Emberbox runs on Linux")
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST_KERNEL:
        raise Unmet(f"the kernel is {release}", "install Linux {}.{} or newer".format(*OLDEST_KERNEL))
    return f"Linux {release}, {platform.machine()}"


def check_cgroups(_: Settings) -> str:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        found = set((root / "cgroup.controllers").read_text().split())
        layout = "version 2"
        found.add("freezer")
    else:
        found = {c for c in (*CONTROLLERS, "freezer") if (root / c).is_dir() or any(root.glob(f"*{c}*"))}
        layout = "version 1 beside 2 (hybrid)" if (root / "unified").is_dir() else "version 1"
    lacking = [c for c in (*CONTROLLERS, "freezer") if c not in found]
    if lacking:
        raise Unmet(
            f"cgroup {layout} without the controllers {', '.join(lacking)}",
            "mount cgroups with them (on a host without systemd: the package cgroupfs-mount)",
        )
    return f"{layout}, with {', '.join(CONTROLLERS)}"


def check_user_namespaces(_: Settings) -> str:
    limit = Path("/proc/sys/user/max_user_namespaces")
    if not limit.exists():
        raise Unmet("the kernel has no user namespaces", "use a kernel with CONFIG_USER_NS")
    if int(limit.read_text()) == 0:
        raise Unmet("user namespaces are switched off", "sysctl user.max_user_namespaces=15000")
    try:
        _run(["unshare", "--user", "--map-root-user", "true"])
    except CommandError as error:
        raise Unmet(
            f"making a user namespace failed: {error}", "see the kernel log for the security module that refused"
        ) from None
    restriction = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if restriction.exists() and restriction.read_text().strip() == "1":
        # Only unprivileged programs are restricted; the node makes its namespaces as root.
        return "made one; AppArmor restricts them for unprivileged users, which does not touch the node"
    return "made one"


def check_overlayfs(_: Settings) -> str:
    _need_file_system("overlay")
    with _scratch_tmpfs() as mounted:
        for name in ("lower", "upper", "work", "merged"):
            (mounted / name).mkdir()
        options = f"lowerdir={mounted}/lower,upperdir={mounted}/upper,workdir={mounted}/work"
        _try(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(mounted / "merged")],
            "mounting an overlay failed",
            "modprobe overlay",
        )
    return "mounted one"


def check_erofs(_: Settings) -> str:
    _need_file_system("erofs")
    return "the kernel has it"


def check_loop_devices(_: Settings) -> str:
    if not Path("/dev/loop-control").exists() and _modprobe("loop") is False:
        raise Unmet("/dev/loop-control does not exist", "modprobe loop")
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unmet(
            f"/dev/loop-control cannot be opened: {error.strerror}", "give this host or container loop devices"
        ) from None
    os.close(control)
    return "/dev/loop-control opens"


def check_network(_: Settings) -> str:
    name = f"eb-doctor-{os.getpid()}"
    _try(
        ["ip", "netns", "add", name],
        "making a network namespace failed",
        "run in a host or container that may make namespaces",
    )
    try:
        _try(
            ["ip", "link", "add", f"ebd{os.getpid() % 100000}", "type", "veth", "peer", "name", "eth0", "netns", name],
            "making a veth pair failed",
            "modprobe veth",
        )
    finally:
        _run(["ip", "netns", "del", name])
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
        return "made a namespace and a veth pair; the node switches IPv4 forwarding on"
    return "made a namespace and a veth pair; IPv4 forwarding is on"


def check_slot_network(settings: Settings) -> str:
    network = settings.slot_network
    remedy = "choose another with --slot-network"
    if network.num_addresses < _LEAST_ADDRESSES:
        raise Unmet(f"{network} has room for {network.num_addresses // 4} machines, at four addresses each", remedy)
    listed = _try(["ip", "-j", "-4", "address"], "listing the host's addresses failed", "apt-get install iproute2")
    for link in json.loads(listed or "[]"):
        if link.get("ifname", "").startswith(f"{settings.instance}-"):
            continue
        for address in link.get("addr_info", ()):
            if IPv4Address(address["local"]) in network:
                raise Unmet(f"{address['local']} of {network} is {link['ifname']}'s already", remedy)
    return f"{network} is not in use by anybody else"


def check_nftables(_: Settings) -> str:
    table = f"emberbox_doctor_{os.getpid()}"
    if shutil.which("nft") is None:
        raise Unmet("nft is not installed", "apt-get install nftables")
    rules = "\n".join(
        (
            f"add table inet {table}",
            f"add chain inet {table} c {{ type filter hook forward priority 10; }}",
            f"add rule inet {table} c ip daddr 192.0.2.1 ct state new drop",
        )
    )
    try:
        _try(["nft", "-f", "-"], "making a table failed", "modprobe nf_tables", standard_input=rules)
    finally:
        subprocess.run(["nft", "delete", "table", "inet", table], capture_output=True, timeout=_patience())
    return "made and removed a table"


def check_kvm(settings: Settings) -> str:
    try:
        kvm.probe(kvm.DEADLINE_SECONDS * settings.time_scale)
        booted = _boot_guest(settings)
    except (kvm.KvmUnusable, FirecrackerError) as unusable:
        raise Unmet(
            f"{unusable}: no microVMs on this host",
            "sandboxes are containers; for microVMs switch on (nested) virtualization and load kvm_intel or kvm_amd",
        ) from None
    if booted:
        return "a guest kernel boots under Firecracker"
    return "ran a few instructions in a virtual machine; `emberbox setup` tries more, it boots a guest"


def _guest_is_there(settings: Settings) -> bool:
    """Whether Firecracker and a guest kernel are installed."""
    return firecracker.present(settings) and (firecracker.parts_dir(settings) / "guest").is_dir()


def _boot_guest(settings: Settings) -> bool:
    """Boot the trial guest where Firecracker and a guest kernel are installed; false where they are not."""
    if not _guest_is_there(settings):
        return False
    parts = firecracker.install(settings)
    asyncio.run(firecracker.try_guest(settings, parts))
    return True


# ---- programs


def check_program(program: str, flag: str) -> str:
    if shutil.which(program) is None:
        raise Unmet(
            f"{program} is not installed", f"apt-get install {PACKAGES.get(program, program)}, or `make install`"
        )
    try:
        # Some print their version and end with 1.
        done = subprocess.run([program, flag], capture_output=True, text=True, timeout=_patience())
        output = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unmet(f"{program} does not run: {error}", f"reinstall {PACKAGES.get(program, program)}") from None
    first = next((line.strip() for line in output.splitlines() if re.search(r"\d+\.\d+", line)), "")
    return first or "installed"


def check_agent(settings: Settings) -> str:
    path = agent_path(settings)
    if path is None:
        raise Unmet("emberd, the agent, is not built", "`make agent`, or set EMBERBOX_AGENT_PATH")
    return str(path)


def agent_path(settings: Settings) -> Path | None:
    """emberd: the configured one, the one in the package, or the one built in the source tree."""
    package = Path(__file__).parents[1]
    candidates = (
        [settings.agent_path]
        if settings.agent_path
        else [package / "bin/emberd", package.parents[1] / "agent/build/emberd"]
    )
    return next((p for p in candidates if p.is_file() and os.access(p, os.X_OK)), None)


# ---- room


def check_disk(settings: Settings) -> str:
    directory = settings.data_dir
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < LEAST_FREE_DISK:
        raise Unmet(
            f"{free / 1024**3:.1f} GiB free below {directory}",
            "make at least 5 GiB free, or choose another place with --data",
        )
    return f"{free / 1024**3:.0f} GiB free below {directory}"


def check_ports(settings: Settings) -> str:
    wanted = ports(settings)
    for option, _, port in wanted[1:]:
        if [each[2] for each in wanted].count(port) > 1:
            raise Unmet(f"port {port} is asked for twice", f"choose another with {option}")
    for option, host, port in wanted:
        problem = port_problem(host, port)
        if problem is not None:
            raise Unmet(f"port {port} on {host} {problem}", f"choose another with {option}")
    return f"{', '.join(str(port) for _, _, port in wanted)} free"


def ports(settings: Settings) -> list[tuple[str, str, int]]:
    """(option, host, port) of every port that this instance listens on."""
    wanted = [("--port", settings.api_host, settings.api_port), ("--edge-port", settings.edge_host, settings.edge_port)]
    if settings.tls_cert is not None:
        wanted.append(("--tls-port", settings.edge_host, settings.edge_tls_port))
    return wanted


def port_problem(host: str, port: int) -> str | None:
    """Why a server cannot listen on this port, or None when it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: connections of a former server in TIME_WAIT are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is taken by another program"
        return f"cannot be used: {error.strerror or error}"
    return None


# ---- helpers


def _patience() -> float:
    """How long one program may take before it counts as hanging; slow hosts stretch it like every time-out."""
    return COMMAND_SECONDS * Settings().time_scale


class CommandError(Exception):
    """A helper command failed; the message is its last line."""


def _run(command: list[str], *, standard_input: str | None = None) -> str:
    try:
        done = subprocess.run(command, input=standard_input, capture_output=True, text=True, timeout=_patience())
    except FileNotFoundError:
        raise CommandError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"{command[0]} did not end within {_patience():g} s") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CommandError(lines[-1] if lines else f"{command[0]} ended with code {done.returncode}")
    return done.stdout


def _try(command: list[str], failure: str, remedy: str, *, standard_input: str | None = None) -> str:
    try:
        return _run(command, standard_input=standard_input)
    except CommandError as error:
        raise Unmet(f"{failure}: {error}", remedy) from None


def _need_file_system(name: str) -> None:
    def present() -> bool:
        return any(line.split()[-1] == name for line in Path("/proc/filesystems").read_text().splitlines())

    if not present():
        _modprobe(name)
    if not present():
        raise Unmet(
            f"the kernel has no {name} file system", f"use a kernel with the module {name} (modprobe {name} failed)"
        )


def _modprobe(name: str) -> bool:
    try:
        _run(["modprobe", name])
    except CommandError:
        return False
    return True


@contextmanager
def _scratch_tmpfs() -> Iterator[Path]:
    """A directory on a tmpfs; an overlay's upper needs a file system that is not itself an overlay."""
    with tempfile.TemporaryDirectory(prefix="emberbox-doctor-") as directory:
        _try(["mount", "-t", "tmpfs", "tmpfs", directory], "mounting a tmpfs failed", "run as root")
        try:
            yield Path(directory)
        finally:
            _run(["umount", "--recursive", directory])


def _os_release() -> dict[str, str]:
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {k: v.strip('"') for k, _, v in (line.partition("=") for line in lines) if v}
