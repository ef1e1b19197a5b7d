"""The Firecracker and jailer programs: the pinned release, where it comes from, and that it is what it should be."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from emberbox.linux.scratch import scratch
from emberbox.runtime.firecracker.errors import FirecrackerError

VERSION = "1.12.1"
_URL = (
    "https://github.com/firecracker-microvm/firecracker/releases/download/v{version}/firecracker-v{version}-x86_64.tgz"
)
_MEMBER = "release-v{version}-x86_64/{name}-v{version}-x86_64"
# SHA-256 of the programs themselves, not of the archive: they are checked wherever they came from.
DIGESTS = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
_DOWNLOAD_SECONDS = 120
_NO_ARCHIVE = (tarfile.TarError, zlib.error, EOFError, KeyError)
"""What a download that broke off, or is something else, is told by."""


@dataclass(frozen=True, slots=True)
class Binaries:
    firecracker: Path
    jailer: Path


def find(folder: Path) -> Binaries | None:
    """Return the pinned pair in `folder`; None when one is missing.

    Raises:
        FirecrackerError: a file there is another one than the pinned release's.
    """
    pair = Binaries(folder / "firecracker", folder / "jailer")
    if not (pair.firecracker.exists() and pair.jailer.exists()):
        return None
    verify(pair)
    return pair


def verify(pair: Binaries) -> None:
    """Compare both programs with the pinned release.

    Raises:
        FirecrackerError: one differs; says which, and both digests.
    """
    for name, path in (("firecracker", pair.firecracker), ("jailer", pair.jailer)):
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != DIGESTS[name]:
            raise FirecrackerError(
                f"{path} is not {name} {VERSION}: its SHA-256 is {found}, expected {DIGESTS[name]}; remove it and "
                "run 'emberbox setup' again"
            )


def install(into: Path, source: Path | None = None) -> Binaries:
    """Put the pinned pair into the folder `into`, from the folder `source` or else from the project's release.

    Blocks while it downloads. Nothing is put in place before both programs have been checked.

    Raises:
        FirecrackerError: the download failed, or a program is not what it should be.
    """
    present = find(into)
    if present is not None:
        return present
    try:
        with scratch(into) as work:
            if source is None:
                _download(work)
            else:
                for name in DIGESTS:
                    shutil.copyfile(source / name, work / name)
            verify(Binaries(work / "firecracker", work / "jailer"))
            for name in DIGESTS:
                (work / name).chmod(0o755)
                (work / name).rename(into / name)
    except (OSError, HTTPException, *_NO_ARCHIVE) as error:
        why = " ".join(str(error).split())[:300]
        raise FirecrackerError(
            f"Firecracker {VERSION} could not be installed: {why}; `emberbox setup --from FOLDER` has it too"
        ) from error
    return Binaries(into / "firecracker", into / "jailer")


def _download(into: Path) -> None:
    machine = os.uname().machine
    if machine != "x86_64":
        raise FirecrackerError(f"Firecracker {VERSION} is pinned for x86_64 only; this is {machine}")
    archive = into / "release.tgz"
    url = _URL.format(version=VERSION)
    with urllib.request.urlopen(url, timeout=_DOWNLOAD_SECONDS) as answer, archive.open("wb") as out:
        shutil.copyfileobj(answer, out)
    with tarfile.open(archive) as release:
        for name in DIGESTS:
            member = release.extractfile(_MEMBER.format(version=VERSION, name=name))
            if member is None:
                raise tarfile.ReadError(f"{name} in {url} is no file")
            with member, (into / name).open("wb") as out:
                shutil.copyfileobj(member, out)
