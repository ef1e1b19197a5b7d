"""What the first `emberbox up` makes: the first team with its API key, and the `base` template."""

from __future__ import annotations

import json
import subprocess
import sys

from emberbox.cli import launch
from emberbox.cli.errors import CliError
from emberbox.cli.reporters import Reporter
from emberbox.cli.state import StateDir, as_environment
from emberbox.settings import Settings

BOOTSTRAP_SECONDS = 120.0
BASE_SECONDS = 1800.0
POLL_SECONDS = 0.5


def ensure_key(settings: Settings, state_dir: StateDir) -> str:
    """The first team's API key; made, together with the team and the tables, when there is none yet.

    The control plane's own command does it as the api's user, since the store belongs to that user.

    Raises:
        CliError: the store cannot be prepared.
    """
    known = state_dir.read_key()
    program = [sys.executable, "-P", "-m", "emberbox.control.bootstrap"]
    argv = launch.command(settings.api_user, program, writable=[settings.api_dir, settings.run_dir])
    try:
        done = subprocess.run(
            argv,
            env=launch.environment(as_environment(settings)),
            cwd="/",
            input=json.dumps({"api_key": known}),
            capture_output=True,
            text=True,
            timeout=BOOTSTRAP_SECONDS * settings.time_scale,
        )
    except subprocess.TimeoutExpired:
        raise CliError(
            f"preparing the database {settings.store_url} took longer than {BOOTSTRAP_SECONDS:.0f} s"
        ) from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise CliError(f"the database {settings.store_url} could not be prepared: {last[0]}")
    key = str(json.loads(done.stdout)["api_key"])
    if key != known:
        state_dir.write_key(key)
    return key


async def ensure_base(settings: Settings, key: str, reporter: Reporter) -> None:
    """Wait until the `base` template is ready, showing how its build gets on.

    Raises:
        CliError: the build failed.
    """
