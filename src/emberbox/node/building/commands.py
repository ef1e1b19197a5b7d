"""Trying a template's start and ready commands, so that a template that never becomes ready is not made."""

from __future__ import annotations

import asyncio

from emberbox.node.building.journal import Journal
from emberbox.node.building.machine import BuildMachine, Finished, OutputLine, build_machine
from emberbox.node.building.model import StepFailed
from emberbox.node.hosting import Hosting
from emberbox.node.model import Image
from emberbox.runtime.base import Limits

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0


async def try_commands(hosting: Hosting, image: Image, limits: Limits, journal: Journal, seconds: float) -> None:
    """Start a machine of the image, run its start command, and return when its ready command succeeds.

    Raises:
        StepFailed: it is not ready within `seconds`, or the start command failed.
    """
    seconds *= hosting.time_scale
    journal.log(f"Starting: {image.start_command}" if image.start_command else "Starting a machine")
    journal.progress("Waiting until the template is ready", 0.95)
    async with build_machine(hosting, image, limits, None) as machine:
        start = asyncio.create_task(_start(machine, image, journal, seconds), name=f"start of {image.build_id}")
        ready = asyncio.create_task(_ready(machine, image, seconds), name=f"ready of {image.build_id}")
        try:
            async with asyncio.timeout(seconds):
                await asyncio.wait({start, ready}, return_when=asyncio.FIRST_COMPLETED)
                if not ready.done():
                    await start  # failed, or is one that goes on in the background
                await ready
        except TimeoutError:
            raise StepFailed(f"the ready command did not succeed within {seconds:g} s: {image.ready_command}") from None
        finally:
            for task in (start, ready):
                task.cancel()
            await asyncio.gather(start, ready, return_exceptions=True)
    journal.log("The template is ready")


async def _start(machine: BuildMachine, image: Image, journal: Journal, seconds: float) -> None:
    if not image.start_command:
        return
    user, workdir = image.default_user or "user", image.default_workdir
    async for event in machine.run(image.start_command, user=user, workdir=workdir, seconds=seconds + 60, tag="start"):
        if isinstance(event, OutputLine):
            journal.log(event.text, "warn" if event.error else "info")
        elif isinstance(event, Finished) and event.exit_code != 0:
            raise StepFailed(f"the start command ended with exit code {event.exit_code}: {image.start_command}")


async def _ready(machine: BuildMachine, image: Image, seconds: float) -> None:
    if not image.ready_command:
        return
    user, workdir = image.default_user or "user", image.default_workdir
    pause = _FIRST_PAUSE
    while True:
        async for event in machine.run(image.ready_command, user=user, workdir=workdir, seconds=seconds + 60):
            if isinstance(event, Finished) and event.exit_code == 0:
                return
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE)
