"""One Emberbox for all the workers of a test run: the first starts it, the last ends it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.clients.support import instance
from tests.clients.support.instance import Emberbox


class SharedEmberbox:
    """A reference count in a locked file; `folder` is common to the workers of one run."""

    def __init__(self, folder: Path) -> None:
        self._lock = folder / "emberbox.lock"
        self._state = folder / "emberbox.json"

    def take(self) -> Emberbox:
        with self._locked():
            state = self._read()
            if state is None:
                state = {"users": 0, "emberbox": instance.start().to_json()}
            state["users"] += 1
            self._state.write_text(json.dumps(state))
            return Emberbox.from_json(state["emberbox"])

    def give_back(self) -> Emberbox | None:
        """The Emberbox when this was its last user, who now has to end it."""
        with self._locked():
            state = self._read()
            assert state is not None, "given back more often than taken"
            state["users"] -= 1
            if state["users"]:
                self._state.write_text(json.dumps(state))
                return None
            self._state.unlink()
            return Emberbox.from_json(state["emberbox"])

    def _read(self) -> dict | None:
        return json.loads(self._state.read_text()) if self._state.exists() else None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
