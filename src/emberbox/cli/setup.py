"""`emberbox setup`: fetches what microVMs need, renews the guest kernel, and tries whether this host runs one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from emberbox.cli.errors import CliError
from emberbox.cli.output import err, note, out, warn
from emberbox.cli.requirements import require_root
from emberbox.runtime.firecracker import binaries
from emberbox.runtime.firecracker import setup as firecracker
from emberbox.runtime.firecracker.errors import FirecrackerError
from emberbox.settings import Settings


def setup(settings: Settings, *, source: Path | None) -> None:
    """Install Firecracker, its jailer and the guest's kernel, and boot a guest without a file system.

    A host whose KVM does not run it is not an error: the parts are there, and sandboxes are containers.
    """
    require_root()
    if settings.guest_kernel is None and firecracker.present(settings):
        with err.status("looking for a newer guest kernel"):
            _renew_kernel(settings)
    try:
        with err.status("fetching Firecracker and the guest kernel"):
            parts = firecracker.install(settings, source)
    except FirecrackerError as error:
        raise CliError(str(error)) from error
    note(f"Firecracker {binaries.VERSION} and the guest kernel are in {firecracker.parts_dir(settings)}")
    try:
        with err.status("booting a guest"):
            asyncio.run(firecracker.try_guest(settings, parts, again=True))
    except FirecrackerError as error:
        warn(f"microVMs do not run here: {error}. Sandboxes will be containers.")
        return
    out.print("a guest booted: sandboxes will be microVMs", markup=False)


def _renew_kernel(settings: Settings) -> None:
    try:
        release = firecracker.renew_kernel(settings)
    except FirecrackerError as error:
        warn(f"no newer guest kernel could be looked for: {error}")
    else:
        note(f"the guest kernel is {release}; a node that runs uses it after its next start")
