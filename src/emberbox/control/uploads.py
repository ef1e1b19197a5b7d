"""Files for COPY steps: archives that clients upload through signed links, kept for a team until nobody uses them.

An archive is named by the client's hash of what it copies. That hash cannot be recomputed from the archive: it covers
the step's source and destination, which an upload does not tell, and with some clients the sizes of directories, which
no archive holds. So a link is good for one hash, and what arrives must be complete and well-formed: its length is the
declared one, its checksum (gzip's) is right, and every member stays inside the folder it is unpacked into.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import hmac
import io
import os
import re
import secrets
import shutil
import tarfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

import structlog

from emberbox.control.clock import now_ms
from emberbox.control.errors import Forbidden, Invalid, StorageFull, TooLarge
from emberbox.control.plane import Plane
from emberbox.room import RESERVE_BYTES, mib
from emberbox.threads import to_thread_whole

log = structlog.get_logger()

LINK_SECONDS = 3600
"""A link is good for as long as clients take to upload: their own limit is an hour."""

_HASH = re.compile(r"[0-9a-f]{64}\Z")
_TEAM = re.compile(r"[0-9a-f-]{1,36}\Z")
_PURPOSE = "upload"
_CHUNK = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_UNPACKED_TIMES = 8
"""An archive may unpack to so many times the size limit of an upload; more is a bomb."""
_MEMBERS = 1_000_000
_EXTENSION_BYTES = 1024 * 1024
"""Of the headers in a row that extend one member's: long names, pax records. They are read into memory."""
_SPARSE_RECORDS = b"GNU.sparse."
_SPARSE_NAME = "GNU.sparse.name"
_RECORDS_THAT_COUNT = (b"path", b"linkpath", b"size", _SPARSE_NAME.encode())
_PARTIAL = ".part"
_IDLE_SECONDS = 120.0
"""An upload of which nothing arrives for so long is given up."""
_CHECKS_AT_ONCE = 2
"""Archives that are read through at the same time; each takes a thread."""
_LEFT_BEHIND_SECONDS = 2 * LINK_SECONDS
_FRESH_SECONDS = LINK_SECONDS
"""An archive that was used or asked for lately is kept: a client that was told it is there starts its build soon."""
_LEAST_BYTES = 64 * 1024
"""What an archive counts for at least, so that the limit of a team bounds their number too."""

_Key = tuple[str, str]
"""Of an archive: team and hash."""


@dataclass(frozen=True, slots=True)
class UploadLink:
    """Whether the archive is there, and where it can be (re)placed: path and query, below the API's address."""

    present: bool
    target: str


@dataclass(frozen=True, slots=True)
class _Rules:
    """Which archives are kept."""

    keep_seconds: int
    team_bytes: int
    in_use: Collection[_Key] | None
    """By builds that are not finished; None: not known yet, and so any may be."""
    asked: Mapping[_Key, float]
    """When a client was last told that it is there."""

    def keep(self, key: _Key, age: float, now: float) -> bool:
        """Whether an archive must stay that was last used `age` seconds ago. To be asked for does not make it young:
        one that is only ever asked for goes some time."""
        if self.in_use is None or key in self.in_use or age <= min(_FRESH_SECONDS, self.keep_seconds):
            return True
        return now - self.asked.get(key, 0) <= _FRESH_SECONDS and age <= self.keep_seconds + _FRESH_SECONDS


class Uploads:
    """The archives of all teams, in `data_dir`/api/files/<team>/<hash>.tar.gz."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._root = plane.settings.api_dir / "files"
        self._limit = plane.settings.max_upload_mb * 1024 * 1024
        self._idle_seconds = _IDLE_SECONDS * plane.settings.time_scale
        self._checking = asyncio.Semaphore(_CHECKS_AT_ONCE)
        self._admitting: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._in_use: frozenset[_Key] | None = None
        """As the last `tend` was told. What a build began to use since then is fresh."""
        self._asked: dict[_Key, float] = {}

    def folder(self, team_id: str) -> Path:
        """Where a team's archives lie."""
        if not _TEAM.match(team_id):
            raise Invalid(f"{team_id[:64]!r} is not a team's identifier")
        return self._root / team_id

    async def link(self, team_id: str, files_hash: str) -> UploadLink:
        """A link to upload an archive, good for `LINK_SECONDS`.

        Raises:
            Invalid: the hash is not one.
        """
        path = self._path(team_id, files_hash)
        present = await asyncio.to_thread(path.exists)
        if present:
            self._asked[team_id, files_hash] = time.time()
        expires = now_ms() // 1000 + LINK_SECONDS
        signature = self._signature(team_id, files_hash, str(expires))
        return UploadLink(present, f"/files/{team_id}/{files_hash}?expires={expires}&signature={signature}")

    async def present(self, team_id: str, hashes: Collection[str]) -> set[str]:
        """Which of the archives are there; their use is noted.

        Raises:
            Invalid: a hash is not one.
        """
        paths = {files_hash: self._path(team_id, files_hash) for files_hash in hashes}
        return await asyncio.to_thread(lambda: {files_hash for files_hash, path in paths.items() if _touch(path)})

    async def receive(
        self,
        team_id: str,
        files_hash: str,
        *,
        expires: str,
        signature: str,
        length: int | None,
        body: AsyncIterator[bytes],
    ) -> None:
        """Store an upload. Nothing of it is left when it fails or the client goes away.

        Raises:
            Forbidden: the link is forged or has expired.
            Invalid: the length is missing or wrong, or what arrived is not a well-formed archive.
            TooLarge: it is larger than the limit.
            StorageFull: the disk is nearly full, or the team's archives would be more than the limit.
        """
        wanted = self._signature(team_id, files_hash, expires)
        if not hmac.compare_digest(wanted.encode(), signature.encode()):
            raise Forbidden("this upload link is not valid; ask for a new one")
        if not expires.isdigit() or int(expires) < now_ms() // 1000:
            raise Forbidden("this upload link has expired; ask for a new one")
        path = self._path(team_id, files_hash)
        if length is None:
            raise Invalid("an upload needs a Content-Length header")
        if length > self._limit:
            raise TooLarge(f"the archive has {length} bytes; the limit is {self._limit} (EMBERBOX_MAX_UPLOAD_MB)")
        began = time.perf_counter()
        partial = _partial(path)
        try:
            # Or two would find room for the same bytes.
            async with self._admitting.setdefault(team_id, asyncio.Lock()):
                file = await to_thread_whole(_admit, partial, length, self._rules())
            received = await self._write(file, body, length)
            if received != length:
                raise Invalid(f"the upload ended after {received} of {length} bytes; upload it again")
            async with self._checking:
                await asyncio.to_thread(check_archive, partial, self._limit * _UNPACKED_TIMES)
            await asyncio.to_thread(os.replace, partial, path)
        except OSError as error:
            raise _storage_error(error) from error
        finally:
            await asyncio.shield(asyncio.to_thread(partial.unlink, missing_ok=True))
        log.info(
            "upload.stored",
            team_id=team_id,
            files_hash=files_hash,
            size_bytes=length,
            ms=round((time.perf_counter() - began) * 1000),
        )

    async def pack(self, team_id: str, files_hash: str, write: Callable[[Path], None]) -> None:
        """Store an archive that is made here: `write`, run in a thread, writes it to a new path.

        Raises:
            StorageFull: the disk is full.
        """
        path = self._path(team_id, files_hash)
        partial = _partial(path)

        def make() -> None:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)

        try:
            await asyncio.to_thread(make)
        except OSError as error:
            raise _storage_error(error) from error

    async def tend(self, in_use: Collection[tuple[str, str]]) -> None:
        """Remove what is old, what is too much, and what broken uploads left. `in_use`: (team, hash) of builds."""
        self._in_use = frozenset(in_use)
        now = time.time()
        self._asked = {key: at for key, at in self._asked.items() if now - at <= _FRESH_SECONDS}
        removed = await asyncio.to_thread(_tend, self._root, self._rules())
        if removed:
            log.info("uploads.removed", count=removed)

    def _path(self, team_id: str, files_hash: str) -> Path:
        if not _HASH.match(files_hash):
            raise Invalid(f"{files_hash[:80]!r} is not a hash of files; it has 64 hex digits")
        return self.folder(team_id) / f"{files_hash}.tar.gz"

    def _signature(self, team_id: str, files_hash: str, expires: str) -> str:
        return self._plane.tokens.sign(_PURPOSE, f"{team_id}/{files_hash}/{expires}")

    def _rules(self) -> _Rules:
        settings = self._plane.settings
        team_bytes = settings.uploads_mb_per_team * 1024 * 1024
        return _Rules(settings.uploads_keep_seconds, team_bytes, self._in_use, dict(self._asked))

    async def _write(self, file: IO[bytes], body: AsyncIterator[bytes], length: int) -> int:
        """Write the body to disk as it comes, up to `length`. Returns how much came, also when it is more.

        Raises:
            Invalid: nothing came for a long time, or not all within the time of a link. What takes longer would be
                removed as left behind while it still takes room.
        """
        clock = asyncio.get_running_loop().time
        end = clock() + LINK_SECONDS
        received = 0
        waiting = bytearray()
        try:
            async with asyncio.timeout(self._idle_seconds) as patience:
                async for chunk in body:
                    received += len(chunk)
                    if received > length:
                        break
                    waiting += chunk
                    if len(waiting) >= _CHUNK:
                        await asyncio.to_thread(file.write, bytes(waiting))
                        waiting.clear()
                    patience.reschedule(min(clock() + self._idle_seconds, end))
            await asyncio.to_thread(file.write, bytes(waiting))
        except TimeoutError:
            if clock() >= end:
                raise Invalid(f"the upload took longer than {LINK_SECONDS // 60} minutes and was given up") from None
            raise Invalid(f"nothing arrived for {self._idle_seconds:g} s; the upload was given up") from None
        finally:
            await asyncio.shield(asyncio.to_thread(file.close))
        return received


def check_archive(path: Path, unpacked_limit: int) -> None:
    """Read an archive from beginning to end: a tar, compressed with gzip or not.

    Raises:
        Invalid: it is damaged, cut off, unpacks to more than `unpacked_limit` bytes, has more or longer headers than
            are followed, or has a member that is sparse, is neither file, directory nor link, or lies outside.
    """
    members = 0
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            limited = _Limited(gzip.GzipFile(fileobj=file) if compressed else file, unpacked_limit)
            with _Archive.open(fileobj=limited, mode="r|", bufsize=_CHUNK) as archive:
                for member in archive:
                    members += 1
                    if members > _MEMBERS:
                        raise Invalid(f"the archive has more than {_MEMBERS} members, the limit")
                    # The next member is looked for behind this one, however far that is.
                    if not 0 <= member.size <= unpacked_limit:
                        raise Invalid(_too_much(unpacked_limit))
                    _check_member(member)
                    # A list of all members would only grow.
                    archive.members = []  # type: ignore[attr-defined]
            # The checksum comes at the very end.
            while limited.read(_CHUNK):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise _damaged(str(error)) from error
    except RecursionError:
        # `tarfile` reads the header behind one that extends it in a deeper call.
        raise Invalid("the archive has too many headers in a row that extend one member's") from None
    if not members:
        raise Invalid("the archive is empty")


class _Limited(io.RawIOBase):
    """Reads at most `limit` bytes of a file."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, limit: int) -> None:
        super().__init__()
        self._file = file
        self._limit = limit
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._count += len(data)
        if self._count > self._limit:
            raise Invalid(_too_much(self._limit))
        return data


class _Member(tarfile.TarInfo):
    """A header that is followed neither into memory without end nor for hours, whatever it says.

    `tarfile` would collect the maps of sparse files and global records as they come, and searches pax records with an
    expression whose time grows with the square of a run of digits, without letting other threads run.
    """

    def _proc_member(self, archive: _Archive) -> tarfile.TarInfo:
        """What `tarfile` calls with each header: reads what belongs to it, and returns the member.

        Raises:
            Invalid: it is a sparse file's, or extends another by too much.
        """
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise _sparse(self.name)
        if self.type in _EXTENSIONS:
            if not 0 <= self.size <= _EXTENSION_BYTES - archive.extension_bytes:
                raise Invalid(
                    f"the archive has a header of {self.size} bytes; one member's may have {_EXTENSION_BYTES} in all"
                )
            archive.extension_bytes += self.size
        else:
            archive.extension_bytes = 0
        if self.type in _PAX:
            return self._extended(archive)
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member

    def _extended(self, archive: _Archive) -> tarfile.TarInfo:
        """The member behind a pax header, with its records.

        Raises:
            Invalid: a record is malformed, is a sparse file's, or gives all members one name, link or size.
        """
        assert archive.fileobj is not None
        records = _records(archive.fileobj.read(_blocks(self.size))[: self.size], self.name)
        if records and self.type == tarfile.XGLTYPE:
            raise Invalid(f"the archive has a global header that sets {', '.join(records)}, which is not accepted")
        try:
            member = self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            # Of any other kind, it would mean the archive's end.
            raise tarfile.ReadError(str(error)) from None
        # An empty value takes a record back.
        member.name = records.get("path") or member.name
        member.linkname = records.get("linkpath") or member.linkname
        if "size" in records:
            if not records["size"].isdecimal():
                raise _damaged(f"a member's size is {records['size'][:40]!r}")
            member.size = int(records["size"])
            if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES:
                archive.offset = member.offset_data + _blocks(member.size)
        return member


class _Archive(tarfile.TarFile):
    tarinfo = _Member
    extension_bytes = 0
    """Of the headers that were read for the next member."""


_PAX = frozenset((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE))
_EXTENSIONS = _PAX | {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}


def _records(data: bytes, name: str) -> dict[str, str]:
    """Those of a pax header's records that say where a member lies and how long it is.

    A record is its length in bytes, a space, a key, `=`, a value and a line feed (POSIX.1-2008, pax).

    Raises:
        Invalid: a record is malformed, or a sparse file's; `name` is what the header calls itself.
    """
    found: dict[str, str] = {}
    sparse = False
    start = 0
    while start < len(data):
        digits, space, _ = data[start : start + len(str(_EXTENSION_BYTES)) + 1].partition(b" ")
        end = start + int(digits) if space and digits.isdigit() else 0
        key, equals, value = data[start + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not equals or data[end - 1 : end] != b"\n":
            raise _damaged("a pax header is malformed")
        sparse = sparse or key.startswith(_SPARSE_RECORDS)
        if key in _RECORDS_THAT_COUNT:
            found[key.decode()] = value.decode(errors="surrogateescape")
        start = end
    if sparse:
        raise _sparse(found.get(_SPARSE_NAME) or found.get("path") or name)
    return found


def _blocks(size: int) -> int:
    """What so many bytes take in an archive."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _damaged(why: str) -> Invalid:
    return Invalid(f"what was uploaded is not a tar archive, or is damaged: {why}")


def _sparse(name: str) -> Invalid:
    return Invalid(
        f"the archive has a sparse file {name[:200]!r}, which is not accepted; pack it with its holes written out "
        "(GNU tar: without --sparse)"
    )


def _too_much(limit: int) -> str:
    return f"the archive unpacks to more than {limit} bytes, the limit"


def _check_member(member: tarfile.TarInfo) -> None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        raise Invalid(f"the archive's member {member.name[:200]!r} lies outside; names must be relative, without '..'")
    if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        raise Invalid(f"the archive's member {member.name[:200]!r} is neither a file, a directory nor a link")
    if member.islnk() and (member.linkname.startswith("/") or ".." in member.linkname.split("/")):
        raise Invalid(f"the archive's hard link {member.name[:200]!r} points outside")


def _partial(path: Path) -> Path:
    """Where an archive is written before it is whole."""
    return path.with_name(f"{path.name}.{secrets.token_hex(8)}{_PARTIAL}")


def _touch(path: Path) -> bool:
    """Note that a file is used; whether it is there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _storage_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull("the server's disk is full; the upload was not kept")
    return error


def _admit(partial: Path, length: int, rules: _Rules) -> IO[bytes]:
    """Make the file of an upload, with the length and the blocks that it will have: others count them from now on.

    Raises:
        StorageFull: the team's archives would be more than the limit, or the disk is nearly full.
    """
    folder = partial.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    room = max(length, _LEAST_BYTES)
    going, held = _superfluous(folder, rules, room=room)
    if held + room > rules.team_bytes:
        raise StorageFull(
            f"the team's uploaded archives would come to {mib(held + room)}, and {mib(rules.team_bytes)} are allowed "
            "(EMBERBOX_UPLOADS_MB_PER_TEAM); upload less, or try again later: archives that no build has used for "
            f"{_FRESH_SECONDS // 60} minutes make room"
        )
    for path in going:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < length + RESERVE_BYTES:
        raise StorageFull(
            f"the server's disk has {mib(free)} free, and an upload of {mib(length)} must leave {mib(RESERVE_BYTES)}; "
            "delete templates or snapshots, or have the disk enlarged"
        )
    file = partial.open("xb")
    try:
        if length:
            os.posix_fallocate(file.fileno(), 0, length)
    except OSError:
        file.close()
        raise
    return file


def _tend(root: Path, rules: _Rules) -> int:
    removed = 0
    for folder in root.iterdir() if root.is_dir() else ():
        for path in _superfluous(folder, rules)[0]:
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _superfluous(folder: Path, rules: _Rules, *, room: int = 0) -> tuple[list[Path], int]:
    """What goes from a team's folder, and how much the rest takes.

    What is old goes, and then what was used longest ago, until the rest and `room` bytes are not too much.
    """
    now = time.time()
    removable: list[tuple[bool, float, int, Path]] = []
    held = 0
    for path in folder.iterdir():
        try:
            seen = path.stat()
        except FileNotFoundError:
            continue
        size = max(seen.st_size, _LEAST_BYTES)
        held += size
        age = now - seen.st_mtime
        if path.name.endswith(_PARTIAL):
            kept, old = age <= _LEFT_BEHIND_SECONDS, True
        else:
            kept, old = rules.keep((folder.name, path.name.split(".")[0]), age, now), age > rules.keep_seconds
        if not kept:
            removable.append((not old, seen.st_mtime, size, path))
    going = []
    for young, _, size, path in sorted(removable):
        if not young or held + room > rules.team_bytes:
            going.append(path)
            held -= size
    return going, held
