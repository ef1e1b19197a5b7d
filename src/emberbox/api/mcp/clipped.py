"""Output that may be longer than an answer: its beginning and its end."""

from __future__ import annotations


class Clipped:
    """Holds at most `limit` bytes, however many are added."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.total = 0
        """Bytes that were added."""

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data[-self._half :]
        if len(self._tail) > self._half:
            del self._tail[: -self._half]

    @property
    def left_out(self) -> int:
        return self.total - len(self._head) - len(self._tail)

    def text(self) -> str:
        """What is held, with a mark where something is left out. Bytes that are no text are replaced."""
        if not self.left_out:
            return (self._head + self._tail).decode(errors="replace")
        head, tail = (part.decode(errors="replace") for part in (self._head, self._tail))
        return f"{head}\n... {self.left_out} bytes left out ...\n{tail}"
