"""Loop devices: an image file as a block device.

Every device is attached with auto-clear: the kernel detaches it when its last user (a mount) is gone, so that a
crash leaves none behind.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR, _LO_FLAGS_DIRECT_IO = 1, 4, 16
_CONFIG_SIZE = 4 + 4 + 232 + 64
_ATTEMPTS = 64


class LoopDevice:
    """An attached device, held open until `close`; mount `path` before that."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> LoopDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(image: Path, *, read_only: bool = False, direct: bool = False) -> LoopDevice:
    """Attach `image` to a free loop device.

    Args:
        direct: use direct I/O where the file system below can. It keeps one copy of the data in memory (the mounted
            file system's), not two; an image that was just written goes to the disk first, which takes time.

    Raises:
        OSError: no device is free, or the image cannot be opened.
    """
    backing = os.open(image, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    flags = _LO_FLAGS_AUTOCLEAR
    flags |= _LO_FLAGS_READ_ONLY if read_only else 0
    flags |= _LO_FLAGS_DIRECT_IO if direct else 0
    try:
        for _ in range(_ATTEMPTS):
            device = _try_attach(backing, flags)
            if device is not None:
                return device
    finally:
        os.close(backing)
    raise OSError(errno.EBUSY, f"no loop device became free for {image}")


def _try_attach(backing: int, flags: int) -> LoopDevice | None:
    read_only = bool(flags & _LO_FLAGS_READ_ONLY)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    finally:
        os.close(control)
    path = f"/dev/loop{number}"
    try:
        device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO):
            return None
        raise
    try:
        fcntl.ioctl(device, _LOOP_CONFIGURE, _config(backing, flags))
    except OSError as error:
        os.close(device)
        if error.errno == errno.EBUSY:  # somebody else was faster
            return None
        raise
    return LoopDevice(path, device)


def _config(backing: int, flags: int) -> bytes:
    # struct loop_config: fd, block_size, struct loop_info64 (lo_flags at byte 52), reserved
    info = bytearray(232)
    struct.pack_into("=I", info, 52, flags)
    config = struct.pack("=II", backing, 0) + bytes(info)
    return config.ljust(_CONFIG_SIZE, b"\0")
