"""`emberbox sandbox list|kill|logs` and `emberbox key create|list|delete`, through the REST API."""

from __future__ import annotations

from typing import Any

from emberbox.cli.api_client import Api
from emberbox.cli.errors import CliError
from emberbox.cli.output import err, print_json, printable, table
from emberbox.settings import Settings


def list_sandboxes(settings: Settings, *, as_json: bool) -> None:
    with Api(settings) as api:
        found = api.pages("/v2/sandboxes", state="running,paused")
    if as_json:
        print_json(found)
        return
    table(
        ("sandbox", "template", "state", "started", "ends", "metadata"),
        [
            (
                one["sandboxID"],
                one.get("alias") or one["templateID"],
                one["state"],
                one["startedAt"],
                one["endAt"],
                printable(", ".join(f"{k}={v}" for k, v in (one.get("metadata") or {}).items())),
            )
            for one in found
        ],
    )


def kill_sandboxes(settings: Settings, sandbox_ids: list[str], *, everything: bool) -> None:
    """End the named sandboxes, or all of the team.

    Raises:
        CliError: none was named, or one is unknown; the others are ended all the same.
    """
    if bool(sandbox_ids) == everything:
        raise CliError("say which sandboxes to end, or --all")
    failures = []
    with Api(settings) as api:
        if everything:
            sandbox_ids = [one["sandboxID"] for one in api.pages("/v2/sandboxes", state="running,paused")]
        for sandbox_id in sandbox_ids:
            try:
                api.call("DELETE", f"/sandboxes/{sandbox_id}")
                err.print(f"ended {sandbox_id}", markup=False)
            except CliError as error:
                failures.append(f"{sandbox_id}: {error.message}")
    if failures:
        raise CliError("\n".join(failures))


def show_logs(settings: Settings, sandbox_id: str, *, limit: int, level: str | None, as_json: bool) -> None:
    params: dict[str, Any] = {"limit": limit, "direction": "backward"}
    if level:
        params["level"] = level
    with Api(settings) as api:
        # The newest, shown oldest first.
        entries = api.call("GET", f"/v2/sandboxes/{sandbox_id}/logs", params=params)["logs"][::-1]
    if as_json:
        print_json(entries)
        return
    for entry in entries:
        fields = " ".join(f"{k}={v}" for k, v in (entry.get("fields") or {}).items())
        print(printable(f"{entry['timestamp']} {entry['level']:<5} {entry['message']} {fields}".rstrip()))


def create_key(settings: Settings, name: str, *, scopes: list[str] | None, limit: int | None, as_json: bool) -> None:
    body: dict[str, Any] = {"name": name}
    if scopes:
        body["scopes"] = scopes
    if limit is not None:
        body["sandboxLimit"] = limit
    with Api(settings) as api:
        made = api.call("POST", "/api-keys", json=body)
    if as_json:
        print_json(made)
        return
    print(made["key"])
    err.print("this key is shown only now; only its hash is kept", style="dim")


def list_keys(settings: Settings, *, as_json: bool) -> None:
    with Api(settings) as api:
        keys = api.call("GET", "/api-keys")
    if as_json:
        print_json(keys)
        return
    rows = []
    for key in keys:
        mask = key["mask"]
        shown = f"{mask['prefix']}{mask['maskedValuePrefix']}...{mask['maskedValueSuffix']}"
        may = " ".join(key.get("scopes", ["all"]))
        limit = str(key.get("sandboxLimit", ""))
        used = key.get("lastUsed") or "never"
        rows.append((key["id"], printable(key["name"]), shown, may, limit, key["createdAt"], used))
    table(("id", "name", "key", "scopes", "limit", "created", "last used"), rows)


def delete_key(settings: Settings, key_id: str) -> None:
    with Api(settings) as api:
        api.call("DELETE", f"/api-keys/{key_id}")
    err.print(f"deleted {key_id}", markup=False)
