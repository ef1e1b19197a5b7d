"""Starts a program as the unprivileged user, with its code reachable and the rest of root's files out of sight.

The source tree, the Python installation and the data directory may lie below a directory that the user cannot enter
(`/root`, a private temporary directory). So the program gets a mount namespace of its own: an empty tmpfs covers the
first closed directory on the way to each needed tree, the way is made again in it, and the tree is bound to its end.
What else lies in the covered directory does not exist for the program.

Only the standard library is used here: this runs in the short-lived process between the supervisor and the role.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import resource
import stat
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNS = 0x00020000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 32, 4096, 16384, 1 << 19
MNT_DETACH = 2
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 8, 38, 47
PR_CAP_AMBIENT_RAISE = 2
CAP_NET_BIND_SERVICE = 10
CAPABILITY_VERSION_3 = 0x20080522
OPEN_FILES = 65536

# What a role may see of the caller's environment; root's secrets stay with root.
KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LANGUAGE",
    "TZ",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "PYTHONPATH",
    "PYTHONDEVMODE",
    "PYTHONWARNINGS",
)
KEPT_PREFIXES = ("EMBERBOX_", "LC_", "COVERAGE_")

SYSTEM_DIRECTORIES = tuple(
    Path(p) for p in ("/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sys", "/tmp", "/usr", "/var")
)
IMAGE_FILE_SYSTEMS = frozenset({"overlay", "erofs", "squashfs", "nsfs"})


class LaunchFailed(Exception):
    """The program cannot be started as the user; the message says what is in the way."""


@dataclass(frozen=True)
class Tree:
    """A directory or file that the program needs, under the name it will use."""

    path: Path
    writable: bool = False


@dataclass(frozen=True)
class Account:
    name: str
    uid: int
    gid: int

    @classmethod
    def named(cls, name: str) -> Account:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            raise LaunchFailed(f"the user {name!r} does not exist") from None
        return cls(name, entry.pw_uid, entry.pw_gid)


@dataclass(frozen=True)
class Plan:
    """What the mount namespace hides, and what it shows again below that."""

    covers: tuple[Path, ...]
    binds: tuple[Tree, ...]
    needed: tuple[Path, ...]
    """All trees, also those in reach without any of this."""


def command(
    user: str,
    program: Sequence[str],
    *,
    writable: Iterable[Path] = (),
    readable: Iterable[Path] = (),
    low_ports: bool = False,
) -> list[str]:
    """The command line that starts `program` as `user`; to be run as root.

    Args:
        writable: directories of the program's own, that the user owns.
        readable: what it reads besides the Python code.
        low_ports: the program may bind ports below 1024.
    """
    words = [sys.executable, "-P", "-m", "emberbox.cli.launch", "--user", user]
    for path in writable:
        words += ["--writable", str(path)]
    for path in readable:
        words += ["--readable", str(path)]
    if low_ports:
        words.append("--low-ports")
    return [*words, "--", *program]


def environment(source: Mapping[str, str]) -> dict[str, str]:
    """The part of `source` that an unprivileged role gets."""
    kept = {k: v for k, v in source.items() if k in KEPT_VARIABLES or k.startswith(KEPT_PREFIXES)}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **kept, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}


def python_trees() -> list[Tree]:
    """Everything that this Python and this package are made of, under every name that leads there."""
    paths = {Path(p) for p in (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)}
    paths |= {Path(p).absolute() for p in sys.path if p and os.path.isdir(p)}
    paths.add(Path(__file__).absolute().parents[2])
    # The interpreter of a virtual environment is a symbolic link, often one of a chain.
    link = Path(sys.executable)
    while link.is_symlink():
        paths.add(link.parent)
        link = link.parent / link.readlink()
    paths.add(link.parent)
    paths |= {path.resolve() for path in paths}
    return [Tree(Path(os.path.normpath(path))) for path in paths]


def plan(account: Account, trees: Iterable[Tree]) -> Plan:
    """Find what must be covered so that `account` reaches every tree.

    Raises:
        LaunchFailed: a tree does not exist, or the account could not use it even if it were reachable.
    """
    covers: set[Path] = set()
    binds: dict[Path, Tree] = {}
    trees = sorted(trees, key=lambda tree: tree.path)
    for tree in trees:
        _check_usable(account, tree)
        closed = next((p for p in reversed(tree.path.parents) if not _may_enter(account, p)), None)
        if closed is not None:
            covers.add(closed)
            binds[tree.path] = tree
    outer = tuple(sorted(p for p in covers if not any(q in covers for q in p.parents)))
    return Plan(outer, tuple(binds.values()), tuple(tree.path for tree in trees))


def _check_usable(account: Account, tree: Tree) -> None:
    try:
        status = tree.path.stat()
    except FileNotFoundError:
        raise LaunchFailed(f"{tree.path} does not exist") from None
    wanted = 5 if stat.S_ISDIR(status.st_mode) else 4
    if _mode_for(account, status) & wanted != wanted:
        raise LaunchFailed(
            f"the user {account.name!r} may not read {tree.path} (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"make it readable, for example with `chmod -R go+rX {tree.path}`"
        )


def _may_enter(account: Account, directory: Path) -> bool:
    return bool(_mode_for(account, directory.stat()) & 1)


def _mode_for(account: Account, status: os.stat_result) -> int:
    """The three permission bits that the kernel looks at for this account (no supplementary groups)."""
    if status.st_uid == account.uid:
        return status.st_mode >> 6 & 7
    if status.st_gid == account.gid:
        return status.st_mode >> 3 & 7
    return status.st_mode & 7


# ---- in the process that becomes the program


def enter(account: Account, wanted: Plan) -> None:
    """Move this process into a mount namespace made by `wanted`."""
    _call("unshare", CLONE_NEWNS)
    # Slave: what the host unmounts later goes away here too, and nothing done here reaches the host.
    _mount(b"none", "/", MS_REC | MS_SLAVE)
    _drop_image_mounts(keep=[*wanted.needed, *SYSTEM_DIRECTORIES])
    # Opened first: once covered, the trees have no name.
    sources = [(tree, os.open(tree.path, os.O_PATH | os.O_CLOEXEC)) for tree in wanted.binds]
    for cover in wanted.covers:
        _mount(b"tmpfs", cover, MS_NOSUID | MS_NODEV, b"tmpfs", b"mode=755,size=1m")
    for tree, source in sources:
        _bind(source, tree)
        os.close(source)


def _bind(source: int, tree: Tree) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        tree.path.mkdir(parents=True, exist_ok=True)
    else:
        tree.path.parent.mkdir(parents=True, exist_ok=True)
        tree.path.touch()
    _mount(f"/proc/self/fd/{source}".encode(), tree.path, MS_BIND | MS_REC)
    if not tree.writable:
        _mount(b"none", tree.path, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def _drop_image_mounts(keep: Sequence[Path]) -> None:
    """Let go of layers, uppers and network namespaces.

    A copy of such a mount would keep its loop device or namespace alive as long as the role, after the node has
    unmounted its own.
    """
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        target = left.split()[4].encode().decode("unicode_escape")
        kind, source = right.split()[:2]
        mounts.append((Path(target), kind, source))
    for mounted_on, kind, source in reversed(mounts):
        needed = any(mounted_on == path or mounted_on in path.parents for path in keep)
        if not needed and (kind in IMAGE_FILE_SYSTEMS or source.startswith("/dev/loop")):
            # Gone already when it lay in one that was dropped before.
            _libc().umount2(os.fsencode(mounted_on), MNT_DETACH)


def raise_open_files() -> None:
    """Allow as many open files as the edge and the node can use, or as many as this host lets root have."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, max(OPEN_FILES, hard)))
    except ValueError:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))


def become(account: Account, *, low_ports: bool) -> None:
    """Give up root for good."""
    raise_open_files()
    os.setgroups([])
    os.setresgid(account.gid, account.gid, account.gid)
    if low_ports:
        _call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setresuid(account.uid, account.uid, account.uid)
    if low_ports:
        _keep_only(CAP_NET_BIND_SERVICE)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.umask(0o077)


def _keep_only(capability: int) -> None:
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    bits = 1 << capability
    data = struct.pack("6I", bits, bits, bits, 0, 0, 0)
    _call("capset", header, data)
    _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes) -> None:
    converted = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc(), name)(*converted) != 0:
        error = ctypes.get_errno()
        raise LaunchFailed(f"{name} failed: {os.strerror(error)}")


def _mount(source: bytes, target: Path | str, flags: int, kind: bytes | None = None, data: bytes | None = None) -> None:
    if _libc().mount(source, os.fsencode(target), kind, ctypes.c_ulong(flags), data) != 0:
        error = ctypes.get_errno()
        raise LaunchFailed(f"mounting on {target} failed: {os.strerror(error)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Become the program; returns only by raising."""
    parser = argparse.ArgumentParser(prog="emberbox.cli.launch", allow_abbrev=False)
    parser.add_argument("--user", required=True)
    parser.add_argument("--writable", action="append", default=[], type=Path)
    parser.add_argument("--readable", action="append", default=[], type=Path)
    parser.add_argument("--low-ports", action="store_true")
    parser.add_argument("program", nargs="+")
    asked = parser.parse_args(arguments)
    try:
        account = Account.named(asked.user)
        trees = [Tree(p, writable=True) for p in asked.writable] + [Tree(p) for p in asked.readable] + python_trees()
        enter(account, plan(account, trees))
        become(account, low_ports=asked.low_ports)
    except LaunchFailed as error:
        sys.exit(f"launch: {error}")
    os.chdir("/")
    os.execve(asked.program[0], asked.program, environment(os.environ))


if __name__ == "__main__":
    main()
