"""`emberbox template list|show|build|delete|publish`, through the REST API."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from emberbox.cli.api_client import Api
from emberbox.cli.errors import CliError
from emberbox.cli.output import err, note, out, print_json, printable, table
from emberbox.settings import Settings

_POLL_SECONDS = 0.4
_LEVEL_STYLES = {"debug": "dim", "warn": "yellow", "error": "red"}
_BASE = "base"
_RATES = {"diskMBPerSecond": "MiB/s", "diskOperationsPerSecond": "op/s", "networkMbitPerSecond": "Mbit/s"}


def list_templates(settings: Settings, *, as_json: bool) -> None:
    """The team's templates, then those that ship with Emberbox and are not built yet."""
    with Api(settings) as api:
        found = api.pages("/v2/templates")
        shipped = api.call("GET", "/shipped-templates")
    if as_json:
        print_json(found)
        return
    built = {alias for one in found for alias in one["aliases"]}
    rows = [
        (
            ", ".join(one["names"]) or one["templateID"],
            one["buildStatus"],
            "public" if one["public"] else "private",
            str(one["cpuCount"]),
            f"{one['memoryMB']} MiB",
            str(one["buildCount"]),
            one["updatedAt"],
        )
        for one in found
    ]
    rows += [(name, "built on first use", "public", "", "", "0", "") for name in shipped if name not in built]
    table(("template", "status", "access", "cpus", "memory", "builds", "updated"), rows)


def show_template(settings: Settings, name: str, *, as_json: bool) -> None:
    """A template with its tags and builds."""
    with Api(settings) as api:
        path = f"/templates/{quote(name, safe='')}"
        builds = api.call("GET", path)
        tags = api.call("GET", f"{path}/tags")
    if as_json:
        print_json({**builds, "tags": tags})
        return
    by_build: dict[str, list[str]] = {}
    for tag in tags:
        by_build.setdefault(tag["buildID"], []).append(tag["tag"])
    print(f"template  {', '.join(builds['names']) or '-'}")
    print(f"id        {builds['templateID']}")
    print(f"access    {'public' if builds['public'] else 'private'}")
    print(f"used      {builds['spawnCount']} times, last {builds['lastSpawnedAt'] or 'never'}")
    table(
        ("build", "status", "tags", "cpus", "memory", "rates", "created"),
        [
            (
                build["buildID"],
                build["status"],
                ", ".join(sorted(by_build.get(build["buildID"], []))),
                str(build["cpuCount"]),
                f"{build['memoryMB']} MiB",
                _rates_of(build),
                build["createdAt"],
            )
            for build in builds["builds"]
        ],
    )


def build_template(
    settings: Settings, name: str, *, image: str | None, rates: Mapping[str, int | None], force: bool, as_json: bool
) -> None:
    """Build a shipped template, or one from an image, and show the log while it is built.

    Args:
        rates: of its sandboxes, by the API's names; None: the installation's default.

    Raises:
        CliError: there is nothing to build under this name, or the build failed.
    """
    asked = {key: value for key, value in rates.items() if value is not None}
    with Api(settings) as api:
        if image is not None:
            made = api.call("POST", "/v3/templates", json={"name": name, **asked})
            path = f"/v2/templates/{made['templateID']}/builds/{made['buildID']}"
            api.call("POST", path, json={"fromImage": image, "force": force})
        else:
            made = _start_shipped(api, name, asked, force=force)
        try:
            ended = _follow(api, made["templateID"], made["buildID"], as_json=as_json)
        except KeyboardInterrupt:
            note(f"build {made['buildID']} goes on; see it with `emberbox template show {name}`")
            raise
    if as_json:
        summary = {key: ended[key] for key in ("templateID", "buildID", "status", "reason") if key in ended}
        print(json.dumps(summary))
    if ended["status"] == "error":
        reason = ended.get("reason") or {}
        where = f" at step {reason['step']}" if reason.get("step") else ""
        raise CliError(f"the build failed{where}: {printable(reason.get('message', 'no reason was given'))}")
    if not as_json:
        out.print(f"template {name} is ready", style="green" if out.is_terminal else "", markup=False)


def delete_templates(settings: Settings, names: list[str]) -> None:
    """Delete templates; sandboxes that run from them go on.

    Raises:
        CliError: one could not be; the others are deleted all the same.
    """
    failures = []
    with Api(settings) as api:
        for name in names:
            try:
                api.call("DELETE", f"/templates/{quote(name, safe='')}")
                err.print(f"deleted {name}", markup=False)
            except CliError as error:
                failures.append(f"{name}: {error.message}")
    if failures:
        raise CliError("\n".join(failures))


def publish_template(settings: Settings, name: str, *, public: bool) -> None:
    """Let every team use a template, or its own team alone."""
    with Api(settings) as api:
        changed = api.call("PATCH", f"/v2/templates/{quote(name, safe='')}", json={"public": public})
    if public:
        err.print(f"published as {', '.join(changed['names']) or name}", markup=False)
    else:
        err.print(f"{name} is private", markup=False)


def _rates_of(build: Mapping[str, Any]) -> str:
    """What a build asks for; the installation's defaults are not known here."""
    shown = [(words, build[key]) for key, words in _RATES.items() if key in build]
    return ", ".join(f"{rate} {words}" if rate else f"any {words}" for words, rate in shown)


def _start_shipped(api: Api, name: str, rates: Mapping[str, int], *, force: bool) -> dict[str, Any]:
    shipped = api.call("GET", "/shipped-templates")
    if name != _BASE and name not in shipped:
        known = f"those that do: {', '.join(shipped)}" if shipped else "none does"
        raise CliError(
            f"no template {name!r} ships with Emberbox ({known}). Give --image to build one from an image; with files "
            "and commands, build it with the E2B SDK (Template.build) or `e2b template create`: see docs/templates.md"
        )
    answer: dict[str, Any] = api.call(
        "POST", f"/shipped-templates/{name}/builds", params={**rates, "force": "true" if force else "false"}
    )
    return answer


def _follow(api: Api, template_id: str, build_id: str, *, as_json: bool) -> dict[str, Any]:
    """Show the log of a build until it ends; returns its last status."""
    path = f"/templates/{template_id}/builds/{build_id}/status"
    offset = 0
    live = err.status("waiting for its turn") if err.is_terminal and not as_json else None
    if live is not None:
        live.start()
    try:
        while True:
            status: dict[str, Any] = api.call("GET", path, params={"logsOffset": offset})
            entries = status["logEntries"]
            offset += len(entries)
            for entry in entries:
                _show(entry, as_json=as_json)
            if live is not None and status["status"] == "building":
                live.update(f"building, step {entries[-1].get('step', '')}" if entries else "building")
            if entries:
                # There may be more; after the end, all of it is shown.
                continue
            if status["status"] in ("ready", "error"):
                return status
            time.sleep(_POLL_SECONDS)
    finally:
        if live is not None:
            live.stop()


def _show(entry: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(entry), flush=True)
        return
    step = entry.get("step", "")
    style = _LEVEL_STYLES.get(entry["level"], "") if err.is_terminal else ""
    err.print(f"{step:>8} | {printable(entry['message'])}", style=style, markup=False)
