"""The memory files behind one running machine, so that its next save can be a small one.

A machine that was restored, or saved once, needs to write only the pages dirtied since. What came before lies in a
folder of the machine as hard links to immutable pieces. `chain.json` there says in which order; the mark `unsure`
says that a save was begun and not finished, so that Firecracker's record of dirty pages cannot be relied on and the
next save must be a whole one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from emberbox.linux import sparse
from emberbox.linux.writing import write_file
from emberbox.runtime.firecracker.snapshots import WHOLE, Piece, merge_pieces

_LIST = "chain.json"
_UNSURE = "unsure"


class Chain:
    """Blocking and cheap: links and one small file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, pieces: tuple[Piece, ...] = (), source: Path | None = None) -> None:
        """Start anew with `pieces`, and `WHOLE` where it is, linked from the folder `source`; with none, the next save
        is a whole one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700)
        if source is not None:
            for piece in pieces:
                os.link(source / piece.name, self._folder / piece.name)
            if len(pieces) > 1:
                link_whole(source, self._folder)
        self._write(pieces)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What the next changes lie over; empty when the next save must be a whole one."""
        if (self._folder / _UNSURE).exists():
            return ()
        try:
            listed = json.loads((self._folder / _LIST).read_text())
            pieces = tuple(Piece(**piece) for piece in listed)
            # Summed up in another way by an older node process, whose machine this was.
            return pieces if all(sparse.checksum_kind(piece.checksum) for piece in pieces) else ()
        except (OSError, ValueError, TypeError):
            return ()

    @property
    def folder(self) -> Path:
        return self._folder

    def path(self, piece: Piece) -> Path:
        return self._folder / piece.name

    def mark_unsure(self) -> None:
        """Call before a save touches Firecracker's record of dirty pages; `replace` takes the mark away."""
        (self._folder / _UNSURE).touch()

    def replace(self, pieces: tuple[Piece, ...], source: Path) -> None:
        """Make `pieces` the chain, linking those that are new from `source`; drops what is no longer named.

        A whole save after one that failed has names of the old chain again, for other files: those are linked anew.
        """
        for piece in pieces:
            self._link(source / piece.name, self.path(piece))
        self._write(pieces)
        (self._folder / _UNSURE).unlink(missing_ok=True)
        kept = {_LIST, WHOLE, *(piece.name for piece in pieces)}
        for path in self._folder.iterdir():
            if path.name not in kept and path.is_file():
                path.unlink()

    def merge(self, pieces: tuple[Piece, ...]) -> Piece:
        """Make one piece of `pieces`, for `replace_merged`; the chain stays as it is and may grow meanwhile."""
        shutil.rmtree(self._merged, ignore_errors=True)
        self._merged.mkdir()
        return merge_pieces(self._folder, pieces, self._merged)

    def replace_merged(self, pieces: tuple[Piece, ...], merged: Piece) -> tuple[Piece, ...] | None:
        """Put `merged` where the chain has `pieces` and return the new chain; None when it has others by now."""
        now = self.pieces
        found = next((at for at in range(len(now)) if now[at : at + len(pieces)] == pieces), None)
        after = None
        if found is not None:
            after = (*now[:found], merged, *now[found + len(pieces) :])
            self.replace(after, self._merged)
        shutil.rmtree(self._merged, ignore_errors=True)
        return after

    @staticmethod
    def _link(source: Path, target: Path) -> None:
        if target.exists() and (not source.exists() or target.samefile(source)):
            return
        work = target.with_name(f"{target.name}.new")
        work.unlink(missing_ok=True)
        os.link(source, work)
        work.rename(target)

    @property
    def _merged(self) -> Path:
        return self._folder / "merged"

    def _write(self, pieces: tuple[Piece, ...]) -> None:
        data = json.dumps([asdict(piece) for piece in pieces]).encode()
        write_file(self._folder / _LIST, data, flush=False)


def link_whole(source: Path, target: Path) -> None:
    """Hard-link `WHOLE` from one folder into another where it is: what was merged once is not merged again."""
    with contextlib.suppress(FileNotFoundError):
        os.link(source / WHOLE, target / WHOLE)
