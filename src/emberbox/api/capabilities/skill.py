"""The Agent Skill that we ship (`skills/emberbox`): where it lies, and as an archive."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import emberbox

NAME = "emberbox"


def skill_folder() -> Path:
    """The folder of the installed package, or of the checkout."""
    package = Path(emberbox.__file__).parent
    installed = package / "skills"
    return (installed if installed.is_dir() else package.parent.parent / "skills") / NAME


def skill_files() -> Iterator[tuple[str, Path]]:
    """Each file's name inside the skill, and where it lies."""
    folder = skill_folder()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(folder).as_posix(), path


@lru_cache(maxsize=1)
def skill_zip() -> bytes:
    """The skill as a zip with one folder in it. The same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in skill_files():
            entry = zipfile.ZipInfo(f"{NAME}/{name}", date_time=(2026, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if name.startswith("scripts/") else 0o644) << 16
            archive.writestr(entry, path.read_bytes())
    return buffer.getvalue()
