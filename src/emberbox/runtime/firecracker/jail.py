"""A machine's jail: its folder, user, control group and namespace, made by Firecracker's own jailer.

The jailer creates the device nodes, joins the network namespace and the control group, changes the root, drops to
the machine's user and starts Firecracker there with its system call filters on. Before that, what Firecracker must
read is linked into the new root; after the machine's end, everything is removed here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from emberbox.linux import processes
from emberbox.runtime.base import MIB, Limits
from emberbox.runtime.firecracker.errors import JailerError

SOCKET = "api.sock"
OUT = "out"
"""Folder in the jail that the machine's user may write: snapshots are put there."""

NOT_LINKED = (errno.EXDEV, errno.EMLINK, errno.EPERM)
"""What a hard link fails with when a mount would do."""

# Firecracker's own memory beside the guest's: code, device buffers, page tables, and the page cache of its files.
_OVERHEAD_MB = 128
_CONSOLE_BYTES = MIB
_CPU_PERIOD_US = 100_000
_MOUNTED = Path("/proc/self/mountinfo")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class JailerSettings:
    firecracker: Path
    jailer: Path
    cgroup_parent: str
    """Name of the control group under which every machine of this instance gets its own."""


@dataclass(frozen=True, slots=True)
class Jail:
    """Where one machine is locked in. Made from names alone, so that it can be found again and removed."""

    machine_id: str
    base: Path
    """A folder of this machine only."""
    user: int
    """User and group id, this machine's own."""
    cgroup_parent: str

    @property
    def root(self) -> Path:
        return self.base / "firecracker" / self.machine_id / "root"

    @property
    def out(self) -> Path:
        return self.root / OUT

    @property
    def console(self) -> Path:
        """What the guest's kernel and Firecracker print."""
        return self.base / "console.log"

    def create(self) -> None:
        """Make the root and the folder for snapshots."""
        self.root.mkdir(parents=True, mode=0o700)
        self.out.mkdir(mode=0o700)
        os.chown(self.out, self.user, self.user)

    def provide(self, source: Path, name: str, *, writable: bool = False, link_only: bool = False) -> str:
        """Make `source` visible in the jail as `/name` and return that path.

        A hard link where both lie on one file system, else a bind mount. A writable file is given to the machine's
        user; a read-only one must be readable for everybody (the folders above it are closed instead).

        Args:
            link_only: Firecracker runs already, with mounts of its own, and would not see a new one.

        Raises:
            OSError: it cannot be linked (see `NOT_LINKED`) and `link_only` is set, or it is not there.
            JailerError: it cannot be mounted.
        """
        target = self.root / name
        if writable:
            os.chown(source, self.user, self.user)
            os.chmod(source, 0o600)
        elif source.stat().st_mode & 0o004 == 0:
            os.chmod(source, source.stat().st_mode & 0o777 | 0o444)
        try:
            os.link(source, target)
        except OSError as error:
            if link_only or error.errno not in NOT_LINKED:
                raise
            target.touch()
            _mount("--bind", str(source), str(target))
            if not writable:
                _mount("-o", "remount,bind,ro", str(target))
        return f"/{name}"

    def take_out(self, name: str, into: Path) -> None:
        """Move a file that Firecracker wrote into the folder `into`, and make it root's and read-only.

        The folder it comes from is the machine's own: what lies there may be a link that a Firecracker that was taken
        over has put there. So it is moved first and then looked at, without following anything.

        Raises:
            JailerError: it is not a plain file of its own; it is removed.
        """
        target = into / name
        os.rename(self.out / name, target)
        descriptor = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != self.user:
                target.unlink()
                raise JailerError(f"the machine {self.machine_id} did not write '{name}' itself; nothing was saved")
            here = f"/proc/self/fd/{descriptor}"
            os.chown(here, 0, 0)
            os.chmod(here, 0o444)
        finally:
            os.close(descriptor)

    def spawn(
        self, settings: JailerSettings, netns: str, limits: Limits, *, background: bool = False
    ) -> processes.ProcessId:
        """Start Firecracker in the jail; returns at once, before its socket answers.

        Args:
            background: others that want the processor go first, until `come_forward`.

        Raises:
            JailerError: the jailer could not be started.
        """
        hierarchy = cgroup_version()
        command = [
            str(settings.jailer),
            *("--id", self.machine_id, "--exec-file", str(settings.firecracker)),
            *("--uid", str(self.user), "--gid", str(self.user)),
            *("--chroot-base-dir", str(self.base)),
            *("--netns", f"/var/run/netns/{netns}"),
            *("--cgroup-version", str(hierarchy), "--parent-cgroup", self.cgroup_parent),
        ]
        for setting in (*cgroup_settings(hierarchy, limits), _share(hierarchy, background=background)):
            command += ["--cgroup", setting]
        command += ["--", "--api-sock", f"/{SOCKET}", "--level", "Warn"]
        try:
            # Appending: the console file can be cut while Firecracker writes to it.
            console = os.open(self.console, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    start_new_session=True,
                    cwd="/",
                    env={},
                )
            finally:
                os.close(console)
        except OSError as error:
            raise JailerError(f"the jailer {settings.jailer} cannot be started: {error.strerror}") from error
        # The jailer becomes Firecracker by exec: same pid, same start time.
        identity = processes.identify(child.pid)
        child.returncode = 0  # Popen must not wait for it or warn about it: `process` owns it from here.
        if identity is None:
            processes.reap(child.pid)
            raise JailerError(f"the jailer ended at once: {self.last_words()}")
        return identity

    def set_limits(self, limits: Limits) -> None:
        """Change what the processes in the jail may use."""
        self._set(cgroup_settings(cgroup_version(), limits))

    def come_forward(self) -> None:
        """End being in the background."""
        self._set([_share(cgroup_version(), background=False)])

    def _set(self, settings: Iterable[str]) -> None:
        for setting in settings:
            name, _, value = setting.partition("=")
            for file in (folder / name for folder in self.cgroups()):
                if file.exists():  # on version 1 each controller has its own hierarchy
                    file.write_text(value)

    def cut_console(self) -> None:
        """Keep the console file small. Firecracker appends to it, so what it prints next lands at the new end."""
        with contextlib.suppress(FileNotFoundError):
            if self.console.stat().st_size > _CONSOLE_BYTES:
                os.truncate(self.console, 0)

    def last_words(self, size: int = 2000) -> str:
        """Return the end of what Firecracker and the guest's kernel printed."""
        try:
            with self.console.open("rb") as handle:
                handle.seek(max(0, self.console.stat().st_size - size))
                return handle.read().decode("utf-8", "replace").strip() or "it printed nothing"
        except OSError:
            return "it left no console output"

    def remove(self) -> None:
        """Remove the jail's mounts, control groups and files. The machine must have ended. Safe to repeat."""
        if not unmount_below(self.base):
            raise JailerError(f"something is still mounted below {self.base}; the jail is left as it is")
        for folder in self.cgroups():
            _remove_cgroup(folder)
        shutil.rmtree(self.base, ignore_errors=True)

    def cgroups(self) -> list[Path]:
        """Return this machine's control groups, one a hierarchy, that exist."""
        candidates = [folder / self.machine_id for folder in cgroup_parents(self.cgroup_parent)]
        return [folder for folder in candidates if folder.is_dir()]


@lru_cache(maxsize=1)
def cgroup_version() -> int:
    """Return 2 on a host with the unified hierarchy alone, else 1 (the jailer refuses version 2 on a mixed host)."""
    return 2 if (_CGROUPS / "cgroup.controllers").exists() else 1


def cgroup_settings(version: int, limits: Limits) -> Iterable[str]:
    memory = (limits.memory_mb + _OVERHEAD_MB) * MIB
    quota = limits.cpu_count * _CPU_PERIOD_US
    if version == 2:
        return (f"memory.max={memory}", f"cpu.max={quota} {_CPU_PERIOD_US}")
    return (
        f"memory.limit_in_bytes={memory}",
        f"cpu.cfs_period_us={_CPU_PERIOD_US}",
        f"cpu.cfs_quota_us={quota}",
    )


def _share(version: int, *, background: bool) -> str:
    """The setting for a machine's part of the processor while others want it, too: a fifth in the background."""
    if version == 2:
        return "cpu.weight=20" if background else "cpu.weight=100"
    return "cpu.shares=205" if background else "cpu.shares=1024"


def unmount_below(folder: Path) -> bool:
    """Unmount everything mounted in `folder`, deepest first; False when something stays."""
    prefix = f"{folder}/"
    points = [line.split()[4] for line in _MOUNTED.read_text().splitlines()]
    for point in sorted((point for point in points if point.startswith(prefix)), key=len, reverse=True):
        subprocess.run(["umount", "-l", point], capture_output=True, timeout=30, check=False)
    return not any(line.split()[4].startswith(prefix) for line in _MOUNTED.read_text().splitlines())


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, timeout=30, check=False)
    if done.returncode != 0:
        raise JailerError(f"mount {' '.join(arguments)}: {done.stderr.decode('utf-8', 'replace').strip()}")


def _remove_cgroup(folder: Path) -> None:
    # The kernel lets go of a dead process's group a moment after the process.
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                return
            time.sleep(0.01)


def cgroup_parents(name: str) -> list[Path]:
    """Return the instance's own control groups that exist, one a hierarchy."""
    candidates = [_CGROUPS / name] if cgroup_version() == 2 else [folder / name for folder in _CGROUPS.iterdir()]
    return [folder for folder in candidates if folder.is_dir()]


def machines_with_cgroups(parent: str) -> frozenset[str]:
    """Return the machine ids that have a control group under the instance's `parent`."""
    return frozenset(folder.name for group in cgroup_parents(parent) for folder in group.iterdir() if folder.is_dir())


def end_cgroup(parent: str, machine_id: str) -> None:
    """Kill every process in a machine's control groups, and remove the groups."""
    for group in cgroup_parents(parent):
        folder = group / machine_id
        with contextlib.suppress(FileNotFoundError):
            for line in (folder / "cgroup.procs").read_text().split():
                identity = processes.identify(int(line))
                if identity is not None:
                    processes.end_and_wait(identity, 10.0)
            _remove_cgroup(folder)


def remove_cgroup_parent(parent: str) -> None:
    """Remove the instance's own control group where no machine is left in it."""
    for folder in cgroup_parents(parent):
        with contextlib.suppress(OSError):
            folder.rmdir()
