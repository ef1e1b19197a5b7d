"""A machine's root file system: its upper over its layers, owned by its own id range.

    upper.ext4 --loop--> upper/            on the host, while the machine lives
    upper/     --idmap-> shown/            the upper with the machine's ids   } while it starts;
    layer      --idmap-> l0/, l1/, ...     the layers with the machine's ids  } the container keeps
    shown/u over l0, l1  -> rootfs/        overlayfs, mounted by the host     } its own copies

Ids on the disk are the same in every upper (`DISK_ID` is root inside), whatever range a machine has: an upper can be
saved and started again anywhere, and two machines never share an id. The idmap has a second line for the host's
root, without which overlayfs cannot make its work folder (and quietly becomes read-only).

When the container's processes end, its mounts go, overlayfs lets go of the upper, and the loop device detaches.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import struct
import threading
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from emberbox.linux import loops, mounts
from emberbox.linux.mounts import IdMap
from emberbox.runtime.container.bundle import ID_COUNT
from emberbox.runtime.errors import RuntimeFailure

DISK_ID = 1_000_000_000
"""Host id that stands for the machine's root on every upper. Never change it: saved uppers have it."""

_UPPER_OPTIONS = "noinit_itable,errors=remount-ro"
# Synced when it is saved; before that an upper is of no use to anybody after a crash of the host.
_OVERLAY_OPTIONS = "redirect_dir=on,metacopy=off,index=off,volatile"
_HOSTS_BYTES = 64 * 1024
"""Of /etc/hosts that a machine wrote: a larger one is not kept. It is read into the node's memory."""
_FIFREEZE, _FITHAW, _FITRIM = 0xC0045877, 0xC0045878, 0xC0185879


class IdMaps:
    """User namespaces for the mounts of an id range, kept: making one costs 3 ms."""

    _KEPT = 256

    def __init__(self) -> None:
        self._namespaces: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def of(self, first_id: int) -> tuple[int, int]:
        """Descriptors for layers and for the upper. A range belongs to one machine at a time."""
        with self._lock:
            known = self._namespaces.pop(first_id, None)
        if known is None:
            layers, upper = mounts.user_namespaces(
                [IdMap(0, first_id, ID_COUNT)], [IdMap(0, 0, 1), IdMap(DISK_ID, first_id, ID_COUNT)]
            )
            known = layers, upper
        with self._lock:
            self._namespaces[first_id] = known  # the latest is last, and the first goes first
            while len(self._namespaces) > self._KEPT:
                self._close(self._namespaces.pop(next(iter(self._namespaces))))
        return known

    def close(self) -> None:
        while self._namespaces:
            self._close(self._namespaces.popitem()[1])

    @staticmethod
    def _close(pair: tuple[int, int]) -> None:
        for descriptor in pair:
            os.close(descriptor)


class Layers:
    """Layers mounted on this node, each once. Machines have clones of their own; these can go at any time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._mounted: dict[str, Path] = {}
        self._lock = threading.Lock()

    def mount(self, image: Path) -> Path:
        """Where the layer is mounted."""
        with self._lock:
            return self._mount(image)

    def _mount(self, image: Path) -> Path:
        if image.suffix == ".ext4":
            raise RuntimeFailure(
                f"layer {image.stem[:12]} was written by a microVM, and this host never mounts it; build the template "
                "again for the container runtime"
            )
        target = self._directory / image.stem
        if image.stem in self._mounted and os.path.ismount(target):
            return target
        # A layer holds set-user-id programs of the real root, and a template may bring any: no other user of the host
        # reaches them, and the host's kernel would not heed the bit.
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        target.mkdir(mode=0o700, exist_ok=True)
        if not os.path.ismount(target):
            flags = mounts.MS_RDONLY | mounts.MS_NODEV | mounts.MS_NOSUID
            with loops.attach(image, read_only=True, direct=True) as device:
                mounts.mount(device.path, target, "erofs", flags)
        self._mounted[image.stem] = image
        return target

    def forget_unused(self) -> None:
        """Unmount layers whose image was deleted, so that its blocks become free with the last machine, and those
        that an earlier process mounted and this one has not asked for."""
        with self._lock:
            if not self._directory.is_dir():
                return
            for target in self._directory.iterdir():
                image = self._mounted.get(target.name)
                if image is None or not image.exists():
                    self._unmount(target)
                    self._mounted.pop(target.name, None)

    def close(self) -> None:
        if self._directory.is_dir():
            for target in self._directory.iterdir():
                self._unmount(target)
            self._directory.rmdir()
        self._mounted.clear()

    @staticmethod
    def _unmount(target: Path) -> None:
        mounts.unmount(target)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()


class Root:
    """The folder of one machine's mounts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.upper = directory / "upper"
        self.shown = directory / "shown"
        self.rootfs = directory / "rootfs"
        self.agent = directory / "emberd"

    @property
    def disk(self) -> int:
        """Device number of the mounted upper."""
        return self.upper.stat().st_dev

    def make(
        self, image: Path, layers: Sequence[Path], agent: Path, first_id: int, namespaces: tuple[int, int]
    ) -> None:
        """Mount everything. What was mounted is taken down again when a step fails.

        Args:
            layers: mounted layers, lowest first.
            namespaces: from `IdMaps`.
        """
        self.directory.mkdir(mode=0o710)
        # The container's first process looks the root up as root of its own user namespace.
        os.chown(self.directory, 0, first_id)
        try:
            self._mount_upper(image)
            lower = []
            for number, layer in enumerate(layers):
                target = self._folder(f"l{number}")
                mounts.mount_idmapped(layer, target, namespaces[0], read_only=True)
                lower.append(str(target))
            mounts.mount_idmapped(self.upper, self._folder("shown"), namespaces[1])
            self._mount_overlay(lower)
            self.agent.touch()
            mounts.bind(agent, self.agent)
        except BaseException:
            self.remove()
            raise

    def _mount_upper(self, image: Path) -> None:
        self._folder("upper")
        with loops.attach(image) as device:
            flags = mounts.MS_NOATIME | mounts.MS_NODEV | mounts.MS_NOSUID
            mounts.mount(device.path, self.upper, "ext4", flags, _UPPER_OPTIONS)
        for name in ("u", "w", "etc"):
            if not (self.upper / name).is_dir():
                (self.upper / name).mkdir(mode=0o755)
                os.chown(self.upper / name, DISK_ID, DISK_ID)
        # What overlayfs leaves in its work folder when it was not unmounted; with `volatile` it refuses to go on.
        shutil.rmtree(self.upper / "w" / "work", ignore_errors=True)

    def _mount_overlay(self, lower: list[str]) -> None:
        stack = ":".join(reversed(lower))
        options = f"lowerdir={stack},upperdir={self.shown}/u,workdir={self.shown}/w,{_OVERLAY_OPTIONS}"
        if len(options) >= os.sysconf("SC_PAGE_SIZE"):
            raise RuntimeFailure(f"{len(lower)} layers are too many; pack them into fewer")
        mounts.mount("overlay", self._folder("rootfs"), "overlay", mounts.MS_NODEV, options)

    def _folder(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(mode=0o755)
        return path

    def write_etc(self, hostname: str, resolvers: Sequence[IPv4Address]) -> Path:
        """Write what the machine needs to know of its network; returns the folder, with the machine's ids.

        Only root of the host writes names into this folder; the machine sees the files as bind mounts, and its root
        writes into them what it likes.
        """
        folder = self.upper / "etc"
        kept = _read_text(folder / "hosts", most=_HOSTS_BYTES)
        if kept is None:
            kept = "127.0.0.1\tlocalhost\n"
        if hostname not in kept.split():
            kept = kept.rstrip("\n") + f"\n127.0.1.1\t{hostname}\n"
        files = {
            "hosts": kept,
            "hostname": f"{hostname}\n",
            "resolv.conf": "".join(f"nameserver {address}\n" for address in resolvers),
        }
        for name, text in files.items():
            _write_text(folder / name, text)
        return self.shown / "etc"

    def open_log(self) -> int:
        """The agent's standard output: a file on the machine's own disk, so that it cannot fill the node's."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.upper / "agent.log", flags, 0o600)

    def let_go(self) -> None:
        """Unmount what only the start needed; the container has its own copies."""
        for point in reversed(mounts.mounted_below(self.directory)):
            if Path(point) != self.upper:
                mounts.unmount(Path(point))

    def remove(self) -> list[str]:
        """Unmount everything and remove the folder. Idempotent."""
        removed = mounts.unmount_below(self.directory)
        # Folders and mount points only: nothing below is on a disk any more.
        shutil.rmtree(self.directory, ignore_errors=True)
        return removed

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Everything is on the image, and nothing is written, until the end of the block."""
        descriptor = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _FIFREEZE, 0)
            try:
                yield
            finally:
                fcntl.ioctl(descriptor, _FITHAW, 0)
        finally:
            os.close(descriptor)

    def wake(self) -> None:
        """End a `quiet` that a crash left behind."""
        descriptor = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _FITHAW, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # it was not frozen
                raise
        finally:
            os.close(descriptor)

    def trim(self) -> None:
        """Give back the blocks of deleted files, so that a saved image has none of them."""
        request = ctypes.create_string_buffer(struct.pack("=QQQ", 0, 0xFFFFFFFFFFFFFFFF, 0), 24)
        descriptor = os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            fcntl.ioctl(descriptor, _FITRIM, request)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise
        finally:
            os.close(descriptor)


def _read_text(path: Path, *, most: int) -> str | None:
    """What a machine has left in a file; None when it is not an ordinary file of at most `most` bytes."""
    try:
        # A link would lead to the host's files, and a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size > most:
            return None
        return os.read(descriptor, most).decode(errors="replace")
    finally:
        os.close(descriptor)


def _write_text(path: Path, text: str) -> None:
    """Write a file that belongs to the machine's root. One that is there keeps its place on a disk that is full."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            path.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o644)
        os.fchown(file.fileno(), DISK_ID, DISK_ID)


@contextlib.contextmanager
def opened_upper(image: Path, directory: Path) -> Iterator[Path]:
    """Show what a machine wrote, read-only and with ordinary ids (0, 1000), to make a layer of it.

    The folder has overlayfs's own marks: devices 0/0 for what was removed, `trusted.overlay.*` attributes for replaced
    and renamed folders. A layer packed with them means the same again.

    Args:
        image: an upper that no machine uses.
        directory: an empty folder for the mounts.
    """
    plain, shown = directory / "plain", directory / "shown"
    try:
        for path in (plain, shown):
            path.mkdir(mode=0o700)
        with loops.attach(image, read_only=True) as device:
            mounts.mount(device.path, plain, "ext4", mounts.MS_RDONLY | mounts.MS_NODEV | mounts.MS_NOSUID)
        (namespace,) = mounts.user_namespaces([IdMap(DISK_ID, 0, ID_COUNT)])
        try:
            mounts.mount_idmapped(plain, shown, namespace, read_only=True)
        finally:
            os.close(namespace)
        yield shown / "u"
    finally:
        mounts.unmount_below(directory)
        for path in (plain, shown):
            with contextlib.suppress(FileNotFoundError):
                path.rmdir()
