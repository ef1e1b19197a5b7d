"""`emberbox doctor`: every requirement, found or missing, and what to do."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

from emberbox.cli.errors import CliError
from emberbox.cli.output import err, out, print_json, table
from emberbox.cli.requirements import Finding, Verdict, examine
from emberbox.cli.state import running_state
from emberbox.settings import Settings

MARKS = {Verdict.FOUND: "[green]✓[/]", Verdict.MISSING: "[red]✗[/]", Verdict.ABSENT: "[yellow]–[/]"}


def doctor(settings: Settings, *, as_json: bool) -> int:
    """Check and show. Returns the exit code: 1 when something needed is missing."""
    findings = []
    with nullcontext() if as_json else err.status("checking"):
        for finding in examine(settings, running=_is_running(settings)):
            findings.append(finding)
    missing = [f for f in findings if f.verdict is Verdict.MISSING]
    if as_json:
        print_json({"ok": not missing, "findings": [asdict(f) for f in findings]})
    else:
        _show(findings, missing)
    return 1 if missing else 0


def _show(findings: list[Finding], missing: list[Finding]) -> None:
    rows = []
    for finding in findings:
        mark = MARKS[finding.verdict] if out.is_terminal else finding.verdict.value
        detail = finding.detail + (f" → {finding.remedy}" if finding.remedy else "")
        rows.append((mark, finding.name, detail))
    table(("", "requirement", "result") if out.is_terminal else ("verdict", "requirement", "result"), rows)
    if missing:
        out.print(f"\n{len(missing)} missing: " + ", ".join(f.name for f in missing), style="red", markup=False)
    else:
        out.print("\nEmberbox can run here", style="green")


def _is_running(settings: Settings) -> bool:
    try:
        running_state(settings)
    except CliError:
        return False
    return True
