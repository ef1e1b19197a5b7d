"""`emberbox skill install`: lay the Agent Skill down where an agent looks for skills."""

from __future__ import annotations

import shutil
from pathlib import Path

from emberbox.api.capabilities.skill import NAME, skill_files
from emberbox.cli.errors import CliError


def install(directory: Path) -> Path:
    """Write the skill into `directory`/emberbox, over an earlier version of it. Returns that folder.

    Raises:
        CliError: the folder cannot be written, or holds something that is not this skill.
    """
    target = directory / NAME
    if target.exists() and not (target / "SKILL.md").is_file():
        raise CliError(f"{target} is there and is not this skill; name another directory or move it away")
    try:
        for name, source in skill_files():
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
            place.chmod(0o755 if name.startswith("scripts/") else 0o644)
    except OSError as error:
        raise CliError(f"the skill cannot be written to {target}: {error.strerror or error}") from None
    return target
