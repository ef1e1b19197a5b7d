"""From a node's settings to a Firecracker runtime that works here: programs, guest files, a trial boot."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import structlog

from emberbox.runtime.firecracker import binaries, guest, trial
from emberbox.runtime.firecracker.binaries import Binaries
from emberbox.runtime.firecracker.errors import FirecrackerError
from emberbox.runtime.firecracker.guest import GuestFiles
from emberbox.runtime.firecracker.jail import JailerSettings
from emberbox.runtime.firecracker.runtime import FirecrackerRuntime, FirecrackerSettings
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.runtime")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a node needs to run microVMs, on its disk."""

    programs: Binaries
    guest: GuestFiles


def parts_dir(settings: Settings) -> Path:
    return settings.node_dir / "firecracker"


def present(settings: Settings) -> bool:
    """Whether the parts were installed here before, or are named by settings."""
    if settings.firecracker is not None and settings.jailer is not None:
        return True
    return (parts_dir(settings) / "firecracker").exists() and (parts_dir(settings) / "jailer").exists()


def install(settings: Settings, source: Path | None = None) -> Parts:
    """Put the programs and the guest files in place; quick when they are there. Blocks while it downloads.

    Args:
        source: a folder with the pinned `firecracker` and `jailer`, instead of downloading them.

    Raises:
        FirecrackerError: a part cannot be had, or is not what it should be; says which and what to do.
    """
    folder = parts_dir(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Parts(_programs(settings, folder, source), _guest_files(settings, folder))


def renew_kernel(settings: Settings) -> str:
    """Fetch the distribution's newest guest kernel, which the node's next start uses; returns its release.

    Raises:
        FirecrackerError: it cannot be had; what was there stays.
    """
    return guest.renew_kernel(parts_dir(settings) / "guest")


async def open_runtime(settings: Settings) -> FirecrackerRuntime:
    """Install what is missing, boot a trial guest, and return the runtime.

    Raises:
        FirecrackerError: microVMs do not work here; says why.
    """
    parts = await asyncio.to_thread(install, settings)
    await try_guest(settings, parts)
    return await FirecrackerRuntime.open(
        FirecrackerSettings(
            binaries=JailerSettings(
                firecracker=parts.programs.firecracker,
                jailer=parts.programs.jailer,
                cgroup_parent=settings.instance,
            ),
            guest=parts.guest,
            machines_dir=settings.node_dir / "machines",
            first_user=settings.id_range_start,
            time_scale=settings.time_scale,
        )
    )


async def try_guest(settings: Settings, parts: Parts, *, again: bool = False) -> None:
    """Boot a trial guest, unless one booted since this host was started; with `again` in any case.

    Raises:
        FirecrackerError: this host's KVM does not run it.
    """
    mark = parts_dir(settings) / "tried"
    if again:
        await asyncio.to_thread(mark.unlink, missing_ok=True)
    await trial.boot_unless_passed(parts.programs.firecracker, parts.guest.kernel, mark, time_scale=settings.time_scale)


def _programs(settings: Settings, folder: Path, source: Path | None) -> Binaries:
    if settings.firecracker is not None and settings.jailer is not None:
        return Binaries(settings.firecracker, settings.jailer)
    if settings.firecracker is not None or settings.jailer is not None:
        raise FirecrackerError("EMBERBOX_FIRECRACKER and EMBERBOX_JAILER belong together: set both or none")
    if source is None and not present(settings):
        log.info("firecracker.downloading", version=binaries.VERSION)
    return binaries.install(folder, source)


def _guest_files(settings: Settings, folder: Path) -> GuestFiles:
    return guest.make_guest_files(folder / "guest", agent_path(settings), settings.guest_kernel)


def agent_path(settings: Settings) -> Path:
    """emberd: the configured one, the package's, or the one built in a checkout.

    Raises:
        FirecrackerError: there is none.
    """
    package = Path(__file__).resolve().parents[2]
    candidates = (package / "bin" / "emberd", package.parents[1] / "agent" / "build" / "emberd")
    for path in (settings.agent_path,) if settings.agent_path else candidates:
        if path.is_file():
            return path
    raise FirecrackerError(f"the agent is missing: {settings.agent_path or candidates[1]}; build it with 'make agent'")
