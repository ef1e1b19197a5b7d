"""A saved microVM on disk: its devices, its memory as a base with changes over it, and its upper.

One folder holds all of it, so that its parts live and go together:

    manifest.json   written last: a folder without it is half-made and is refused
    state           Firecracker's devices (carries a checksum of its own)
    memory.N        pieces of memory, lowest N first: a whole one, then the pages changed since
    upper           the writable disk at the same instant

    whole           all pieces in one, made when the changes are many, for a machine to be loaded from; derived, used
                    only in the boot of the host that made it

Pieces never change once written, and are hard links where several folders share them (a template's memory is in
every sandbox saved from it, and on the disk once).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from emberbox.linux import processes, sparse
from emberbox.linux.writing import write_file
from emberbox.runtime.errors import SavedDamaged

FORMAT = 2
STATE = "state"
UPPER = "upper"
WHOLE = "whole"
_MANIFEST = "manifest.json"
_NOTE = "user.emberbox.trusted"


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of memory."""

    name: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a saved machine must be restored with."""

    firecracker: str
    """Version that wrote it; another may not read it."""
    cpu_count: int
    memory_mb: int
    layers: int
    pieces: tuple[Piece, ...]
    state_checksum: str
    format: int = FORMAT

    def write(self, folder: Path, *, flush: bool = True) -> None:
        """Put the manifest in place in one step. When it is to be flushed, all that it names must be on the disk."""
        write_file(folder / _MANIFEST, json.dumps(asdict(self), indent=1).encode(), flush=flush)


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`.

    Raises:
        SavedDamaged: it is missing or broken, or of a format that this version does not know.
    """
    try:
        fields = json.loads((folder / _MANIFEST).read_text())
        if fields["format"] != FORMAT:
            raise SavedDamaged(f"the saved machine has format {fields['format']}, this version reads {FORMAT}")
        fields["pieces"] = tuple(Piece(**piece) for piece in fields["pieces"])
        manifest = Manifest(**fields)
    except FileNotFoundError:
        raise SavedDamaged("the saved machine is incomplete: it has no manifest") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SavedDamaged(f"the saved machine's manifest cannot be read: {error}") from error
    if not manifest.pieces:
        raise SavedDamaged("the saved machine's manifest names no memory")
    return manifest


@dataclass(frozen=True, slots=True)
class _Note:
    """What is known of a file: the checksum that it was found to have, or the pieces that it holds."""

    checksum: str = ""
    pieces: tuple[Piece, ...] = ()


class Trusted:
    """Files whose contents this host's boot has checked or made, as long as nobody writes to them.

    A template's memory is read once to check it, not for each of its clones; what was just written is not read again.
    The next node process finds it noted in an extended attribute of the file, where the file system has those.
    After a reboot everything is read again: what was not flushed is gone, and damage is what checksums are for.
    """

    _MOST = 10_000

    def __init__(self, boot_id: str | None = None) -> None:
        self._boot_id = boot_id or processes.boot_id()
        self._known: dict[tuple[int, int, int], _Note] = {}

    def add(self, path: Path, checksum: str) -> None:
        """The file has this checksum."""
        self._add(path, _Note(checksum=checksum))

    def has(self, path: Path, checksum: str) -> bool:
        """Whether the file is known to have this checksum."""
        note = self._find(path)
        return note is not None and note.checksum == checksum

    def add_whole(self, path: Path, pieces: tuple[Piece, ...]) -> None:
        """The file holds all of `pieces`."""
        self._add(path, _Note(pieces=pieces))

    def rename_held(self, before: tuple[Piece, ...], after: tuple[Piece, ...], path: Path) -> None:
        """The pieces `before` that the file holds are now called `after`."""
        if self.held(path) == before:
            self.add_whole(path, after)

    def held(self, path: Path) -> tuple[Piece, ...]:
        """Return the pieces that the file `WHOLE` holds; none when that is not known, or somebody changed it."""
        note = self._find(path)
        return () if note is None else note.pieces

    def forget(self, path: Path) -> None:
        """The file is about to be changed. Its time of change alone would tell too, where clocks are fine enough."""
        mark = _mark(path)
        if mark is not None:
            self._known.pop(mark, None)
        with contextlib.suppress(OSError):
            os.removexattr(path, _NOTE)

    def _add(self, path: Path, note: _Note) -> None:
        mark = _mark(path)
        if mark is None:
            return
        self._remember(mark, note)
        text = json.dumps({"boot": self._boot_id, "modified": mark[2], **asdict(note)})
        with contextlib.suppress(OSError):
            os.setxattr(path, _NOTE, text.encode())

    def _find(self, path: Path) -> _Note | None:
        mark = _mark(path)
        if mark is None:
            return None
        if mark not in self._known and (noted := self._noted(path, mark[2])) is not None:
            self._remember(mark, noted)
        return self._known.get(mark)

    def _noted(self, path: Path, modified: int) -> _Note | None:
        try:
            note = json.loads(os.getxattr(path, _NOTE))
            if (note["boot"], note["modified"]) != (self._boot_id, modified):
                return None
            return _Note(str(note["checksum"]), tuple(Piece(**piece) for piece in note["pieces"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _remember(self, mark: tuple[int, int, int], note: _Note) -> None:
        if len(self._known) >= self._MOST:
            self._known.clear()
        self._known[mark] = note


def verify(folder: Path, manifest: Manifest, trusted: Trusted) -> None:
    """Compare the saved files with their checksums, except pieces that are trusted already.

    Raises:
        SavedDamaged: a file is missing or differs; says which.
    """
    _verify_file(folder / STATE, manifest.state_checksum)
    for piece in manifest.pieces:
        path = folder / piece.name
        if not trusted.has(path, piece.checksum):
            _verify_file(path, piece.checksum)
            trusted.add(path, piece.checksum)
    if not (folder / UPPER).exists():
        raise SavedDamaged("the saved machine is incomplete: its disk is missing")


def make_whole(folder: Path, pieces: tuple[Piece, ...], trusted: Trusted) -> Path:
    """Return one file with the memory of all `pieces`, to load a machine from: the only piece, or `WHOLE`.

    What is there of the last restore is brought up to date in place when nobody else has it: then the work is what
    changed since. Nothing is flushed or summed up here; after a reboot it is made anew from the pieces.
    """
    if len(pieces) == 1:
        return folder / pieces[0].name
    path = folder / WHOLE
    held = trusted.held(path)
    if held == pieces:
        return path
    own = bool(held) and held == pieces[: len(held)] and path.stat().st_nlink == 1
    try:
        if own:
            trusted.forget(path)
        else:
            path.unlink(missing_ok=True)
            sparse.clone(folder / pieces[0].name, path, mode=0o444)
        for piece in pieces[len(held) if own else 1 :]:
            sparse.overlay(folder / piece.name, path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    trusted.add_whole(path, pieces)
    return path


def merge_pieces(folder: Path, pieces: tuple[Piece, ...], into: Path) -> Piece:
    """Make one piece, in `into`, of neighbouring `pieces` in `folder`. Takes as long as copying their data."""
    merged = into / f"memory.{number_of(pieces[-1])}m"
    work = into / "merging"
    work.unlink(missing_ok=True)
    try:
        sparse.clone(folder / pieces[0].name, work, mode=0o444)
        for later in pieces[1:]:
            sparse.overlay(folder / later.name, work)
        sparse.flush(work)
        piece = Piece(merged.name, sparse.checksum(work))
        work.rename(merged)
    except BaseException:
        work.unlink(missing_ok=True)
        raise
    return piece


def merge_changes(folder: Path, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Return `pieces` with all that lie over the first made one, in `folder`, where the others are no longer."""
    merged = merge_pieces(folder, pieces[1:], folder)
    for piece in pieces[1:]:
        (folder / piece.name).unlink()
    return (pieces[0], merged)


def number_of(piece: Piece) -> int:
    """Return the N of `memory.N`, and of `memory.Nm`, in which the pieces up to N are merged."""
    return int(piece.name.partition(".")[2].removesuffix("m"))


def next_name(pieces: tuple[Piece, ...]) -> str:
    """Return the file name of the piece that comes after `pieces`."""
    return f"memory.{max(map(number_of, pieces), default=-1) + 1}"


def _verify_file(path: Path, expected: str) -> None:
    try:
        found = sparse.checksum(path, sparse.checksum_kind(expected) or sparse.LAYOUT)
    except FileNotFoundError:
        raise SavedDamaged(f"the saved machine is incomplete: {path.name} is missing") from None
    if found != expected:
        raise SavedDamaged(f"the saved machine is damaged: {path.name} should have {expected}, has {found}")


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return (facts.st_dev, facts.st_ino, facts.st_mtime_ns)
