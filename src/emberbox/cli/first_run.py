"""What the first `emberbox up` makes: the first team with its API key, and the `base` template."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import Any

import httpx

from emberbox.cli import launch
from emberbox.cli.errors import CliError
from emberbox.cli.reporters import Reporter
from emberbox.cli.roles import local_api_url
from emberbox.cli.state import StateDir, as_environment
from emberbox.settings import Settings

KEY_NAME = "emberbox env"
CONTROL_SECONDS = 120.0
BASE_SECONDS = 1800.0
POLL_SECONDS = 0.5


def ensure_key(settings: Settings, state_dir: StateDir) -> None:
    """See that there is an API key for `emberbox env`; the first is made together with the tables and the first team.

    The control plane's own program does it as the api's user, to whom the store belongs. A key that was lost cannot be
    read back, since only its hash is kept; then another one is made.

    Raises:
        CliError: the store cannot be prepared.
    """
    made = _control(settings, "-m", "emberbox.control.bootstrap")["api_key"]
    known = state_dir.read_key()
    if made is None and known is None:
        made = _control(settings, "-m", "emberbox.control.bootstrap", "--new-key", KEY_NAME)["api_key"]
    if made is not None:
        state_dir.write_key(made)


def _control(settings: Settings, *arguments: str) -> dict[str, Any]:
    """Run a program of the control plane as its user; returns the JSON object that it prints."""
    argv = launch.command(
        settings.api_user,
        [sys.executable, "-P", *arguments],
        writable=[settings.api_dir, settings.run_dir],
    )
    seconds = CONTROL_SECONDS * settings.time_scale
    try:
        done = subprocess.run(
            argv,
            env=launch.environment({**os.environ, **as_environment(settings)}),
            cwd="/",
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise CliError(f"preparing the database {_store(settings)} took longer than {seconds:.0f} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
        raise CliError(f"the database {_store(settings)} could not be prepared: {last[0]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _store(settings: Settings) -> str:
    """Its URL without the password."""
    from sqlalchemy import make_url  # a fifth of a second that only a failure is worth
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(settings.store_url).render_as_string(hide_password=True)
    except ArgumentError:
        return "of that URL"


async def ensure_base(settings: Settings, reporter: Reporter) -> None:
    """Wait until the `base` template is ready, showing how its build gets on.

    The api builds it by itself when there is none or its making changed, and tells about it at `GET /startup`:
    `{"base": {"status": "waiting"|"building"|"ready"|"error", "stage": str, "fraction": 0..1, "message": str}}`.

    Raises:
        CliError: the build failed or took too long.
    """
    end = asyncio.get_running_loop().time() + BASE_SECONDS * settings.time_scale
    async with httpx.AsyncClient(base_url=local_api_url(settings), timeout=10, trust_env=False) as api:
        while True:
            base = await _startup(api)
            if base["status"] == "ready":
                if base["message"]:
                    reporter.step(base["message"])
                return
            if base["status"] == "error":
                raise CliError(f"the base template could not be built: {base['message']}")
            reporter.progress(base["stage"] or "waiting for the node", base["fraction"])
            if asyncio.get_running_loop().time() > end:
                raise CliError(f"the base template is not ready after {BASE_SECONDS:.0f} s ({base['stage']})")
            await asyncio.sleep(POLL_SECONDS)


async def _startup(api: httpx.AsyncClient) -> dict[str, Any]:
    try:
        response = await api.get("/startup")
    except httpx.TransportError:
        # The supervisor brings a crashed api back; the build goes on or starts again with it.
        return {"status": "waiting", "stage": "waiting for the api", "fraction": 0.0, "message": ""}
    if response.status_code != 200:
        raise CliError(f"asked for the base template, the api answers {response.status_code}: {response.text[:200]}")
    base: dict[str, Any] = response.json()["base"]
    return base
