"""The three variables that point an E2B client at this instance."""

from __future__ import annotations

import shlex

from emberbox.cli.errors import CliError
from emberbox.cli.state import StateDir, effective_settings
from emberbox.settings import Settings


def client_variables(settings: Settings) -> dict[str, str]:
    """`E2B_API_URL`, `E2B_SANDBOX_URL` and `E2B_API_KEY`.

    Raises:
        CliError: Emberbox has not run here yet, or this is not root.
    """
    state_dir = StateDir(settings)
    key = state_dir.read_key()
    if key is None:
        raise CliError(f"there is no API key below {settings.data_dir} yet: `emberbox up` makes the first")
    used = effective_settings(settings, state_dir.read())
    return {"E2B_API_URL": used.api_url, "E2B_SANDBOX_URL": used.edge_url, "E2B_API_KEY": key}


def print_exports(settings: Settings) -> None:
    """Print the variables as shell commands, for `eval "$(emberbox env)"`."""
    for name, value in client_variables(settings).items():
        print(f"export {name}={shlex.quote(value)}", flush=True)
