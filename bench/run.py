"""Runs every benchmark, each against a fresh Emberbox, and writes the table of docs/benchmarks.md with `--write`."""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, Row, details, machine, number

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SCRIPTS = (
    ["tti.py"],
    ["tti.py", "--cold"],
    ["exec.py"],
    ["files.py"],
    ["density.py"],
    ["edge.py"],
    ["template.py"],
    ["code_interpreter.py"],
    ["mcp.py"],
)


def run(script: list[str]) -> dict[str, Any] | None:
    """One script's JSON; None when it failed, which it has said on stderr by itself."""
    print(f"bench: {' '.join(script)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, str(HERE / script[0]), *script[1:], "--json"], stdout=subprocess.PIPE, text=True
    )
    try:
        return json.loads(done.stdout)
    except ValueError:
        print(f"bench: {' '.join(script)} gave no result (exit code {done.returncode})", file=sys.stderr)
        return None


def page_part(results: list[dict[str, Any]]) -> str:
    about = machine()
    loads = [result["machine"]["load"] for result in results] or [about["load"]]
    lines = [
        BEGIN,
        f"Measured on {datetime.date.today():%Y-%m-%d}: {about['cpu']}, {about['cores']} cores, "
        f"{about['memory_gib']} GiB, Linux {about['kernel']}. Load average {min(loads):g} to {max(loads):g}: "
        "what exceeds the cores is other work, which stretches every figure, the floors too.",
    ]
    for result in results:
        lines += ["", f"### {result['title']}", "", "| figure | value | target | details |", "|---|---|---|---|"]
        for entry in result["rows"]:
            met = entry.pop("met")
            row = Row(**entry)
            sign = "≥" if row.higher_is_better else "≤"
            target = f"{sign} {number(row.target)}: {'met' if met else '**missed**'}" if row.target is not None else ""
            lines.append(f"| {row.name} | {number(row.value)} {row.unit} | {target} | {details(row)} |")
    return "\n".join([*lines, END])


def write(results: list[dict[str, Any]]) -> None:
    text = PAGE.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{PAGE} has no place for results: it needs the lines {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(head + page_part(results) + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the results into docs/benchmarks.md")
    parser.add_argument("only", nargs="*", help="names of scripts, e.g. tti.py [default: all]")
    arguments = parser.parse_args()
    wanted = [script for script in SCRIPTS if (HERE / script[0]).exists()]
    if arguments.only:
        wanted = [script for script in wanted if script[0] in arguments.only]
    results = [run(script) for script in wanted]
    found = [result for result in results if result is not None]
    print(page_part(json.loads(json.dumps(found))))
    if arguments.write:
        write(found)
    missed = [row["name"] for result in found for row in result["rows"] if row.get("met") is False]
    return 1 if len(found) < len(wanted) or missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
