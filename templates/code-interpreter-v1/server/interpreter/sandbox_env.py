"""The sandbox's environment variables, which the agent knows: this server started before the sandbox was created."""

from __future__ import annotations

import asyncio
import json
import urllib.request

_URL = "http://127.0.0.1:49983/envs"
_SECONDS = 2.0


class SandboxEnv:
    """Asked once for each access token: a sandbox gets its variables and its token together.

    A sandbox without a token is asked each time: it may be a copy of one with other variables.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, str]] = {}

    async def get(self, token: str) -> dict[str, str]:
        if token in self._known:
            return self._known[token]
        try:
            variables = await asyncio.to_thread(_ask, token)
        except (OSError, ValueError):
            return {}  # without the right token they are not this caller's
        if token:
            self._known[token] = variables
        return variables


def _ask(token: str) -> dict[str, str]:
    request = urllib.request.Request(_URL, headers={"X-Access-Token": token} if token else {})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return {str(name): str(value) for name, value in json.load(answer).items()}
