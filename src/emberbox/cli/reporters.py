"""Tells how `up` gets on: to a person, or through a pipe to the process that waits for `up --detach`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import IO, Any, Protocol

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from emberbox.cli.errors import CliError
from emberbox.cli.output import err


class Reporter(Protocol):
    """Who hears about the start."""

    def step(self, text: str) -> None:
        """Something was done, or begins."""

    def progress(self, stage: str, fraction: float) -> None:
        """The base template: what is being done, and how much of the whole is done (0..1)."""

    def ready(self) -> None:
        """Everything runs."""

    def failed(self, error: CliError) -> None:
        """The start was given up."""


class ConsoleReporter:
    """Writes to standard error, with a progress bar on a terminal and a line a stage elsewhere."""

    def __init__(self, *, on_ready: Callable[[], None] = lambda: None) -> None:
        self._on_ready = on_ready
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def step(self, text: str) -> None:
        self._end_bar()
        err.print(text, markup=False)

    def progress(self, stage: str, fraction: float) -> None:
        if not err.is_terminal:
            if stage != self._stage:
                err.print(f"base template: {stage}", markup=False)
            self._stage = stage
            return
        if self._bar is None or self._task is None:
            self._bar = Progress(
                TextColumn("base template"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(),
                TextColumn("{task.description}"), console=err, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(stage, total=1.0)
            self._bar.start()
        self._bar.update(self._task, description=stage, completed=fraction)

    def ready(self) -> None:
        self._end_bar()
        self._on_ready()

    def failed(self, error: CliError) -> None:
        self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class PipeReporter:
    """One JSON object a line into a pipe. A reader that has gone away is no reason to stop."""

    def __init__(self, descriptor: int) -> None:
        self._pipe: IO[str] | None = os.fdopen(descriptor, "w")

    def step(self, text: str) -> None:
        self._send({"step": text})

    def progress(self, stage: str, fraction: float) -> None:
        self._send({"stage": stage, "fraction": fraction})

    def ready(self) -> None:
        self._send({"ready": True})
        self._close()

    def failed(self, error: CliError) -> None:
        self._send({"failed": error.message, "code": error.code})
        self._close()

    def _send(self, message: dict[str, Any]) -> None:
        if self._pipe is None:
            return
        try:
            print(json.dumps(message), file=self._pipe, flush=True)
        except BrokenPipeError:
            self._pipe = None

    def _close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def relay(lines: Iterable[str], reporter: Reporter) -> bool:
    """Repeat what a `PipeReporter` sent. False when it ended without saying how the start went.

    Raises:
        CliError: the start failed.
    """
    for line in lines:
        message = json.loads(line)
        if "step" in message:
            reporter.step(message["step"])
        elif "stage" in message:
            reporter.progress(message["stage"], message["fraction"])
        elif "failed" in message:
            error = CliError(message["failed"], code=message["code"])
            reporter.failed(error)
            raise error
        elif "ready" in message:
            reporter.ready()
            return True
    return False
