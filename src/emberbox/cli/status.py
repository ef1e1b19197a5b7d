"""`emberbox status`."""

from __future__ import annotations

from typing import Any

from emberbox import __version__
from emberbox.cli import node_client
from emberbox.cli.errors import NotRunning
from emberbox.cli.output import out, print_json, table
from emberbox.cli.state import effective_settings, running_state
from emberbox.settings import Settings


def status(settings: Settings, *, as_json: bool) -> int:
    """Show what runs. Returns the exit code: 3 when nothing does (as init scripts say it)."""
    report = collect(settings)
    if as_json:
        print_json(report)
    else:
        _show(report)
    return 0 if report["running"] else 3


def collect(settings: Settings) -> dict[str, Any]:
    """The instance as JSON values. `sandboxes` and `runtime` are null when the node does not answer."""
    report: dict[str, Any] = {
        "running": False,
        "phase": None,
        "version": __version__,
        "data_dir": str(settings.data_dir),
        "api_url": None,
        "sandbox_url": None,
        "runtime": None,
        "isolation": None,
        "processes": [],
        "sandboxes": None,
    }
    try:
        state = running_state(settings)
    except NotRunning:
        return report
    used = effective_settings(settings, state)
    view = node_client.look(used)
    processes = [{"name": "supervisor", "pid": state.supervisor.pid}] if state.supervisor.alive else []
    processes += [
        {"name": one.name, "pid": one.process.pid, "restarts": one.restarts}
        for one in state.processes
        if one.process.alive
    ]
    return report | {
        "running": True,
        "phase": state.phase if state.supervisor.alive else "unsupervised",
        "version": state.version,
        "api_url": used.api_url,
        "sandbox_url": used.edge_url,
        "runtime": view.runtime if view else None,
        "isolation": view.isolation if view else None,
        "processes": processes,
        "sandboxes": {"running": len(view.running), "paused": len(view.paused)} if view else None,
    }


def _show(report: dict[str, Any]) -> None:
    if not report["running"]:
        out.print(f"Emberbox does not run on {report['data_dir']}", markup=False)
        return
    sandboxes = report["sandboxes"]
    counts = (
        f"{sandboxes['running']} running, {sandboxes['paused']} paused" if sandboxes else "the node does not answer"
    )
    facts = {
        "phase": report["phase"],
        "version": report["version"],
        "runtime": f"{report['runtime']} ({report['isolation']})" if report["runtime"] else "unknown",
        "sandboxes": counts,
        "api": report["api_url"],
        "sandbox traffic": report["sandbox_url"],
        "data": report["data_dir"],
    }
    for name, value in facts.items():
        out.print(f"{name:<16} {value}", markup=False)
    out.print()
    table(
        ("process", "pid", "restarts"),
        [(p["name"], str(p["pid"]), str(p.get("restarts", 0))) for p in report["processes"]],
    )
