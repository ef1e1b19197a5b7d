"""What an idle sandbox and Emberbox itself cost in memory.

A sandbox's cost is what the host has less available with many of them than with none, a machine; its control
group's own count stands beside it. Emberbox itself is the proportional memory (PSS) of its processes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from common import Emberbox, Result, Row, an_emberbox, main

MIB = 1024 * 1024


def available() -> float:
    """MiB that the host could still give out."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:", 1)[1].split()[0]) / 1024


def settled_available() -> float:
    """The median of some readings: other work on the host moves a single one."""
    readings = []
    for _ in range(9):
        readings.append(available())
        time.sleep(0.3)
    return sorted(readings)[4]


def proportional_memory(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("Pss:", 1)[1].split()[0]) / 1024


def descendants(pid: int) -> list[int]:
    """The process and its children, without those that left its process tree (machines)."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += descendants(int(child))
    return found


def own_processes(emberbox: Emberbox) -> dict[str, float]:
    """MiB of each role with its helpers (HAProxy belongs to the edge)."""
    cost: dict[str, float] = {}
    roles = {each["name"]: each["pid"] for each in emberbox.status()["processes"]}
    for name, pid in roles.items():
        family = [pid] if name == "supervisor" else descendants(pid)
        cost[name] = sum(proportional_memory(each) for each in family)
    return cost


def measure(arguments: argparse.Namespace) -> Result:
    from e2b import Sandbox

    with an_emberbox(EMBERBOX_WARM_MAX="2") as emberbox:
        # The first one brings shared pages of the template into the cache.
        Sandbox.create(timeout=60).kill()
        time.sleep(5)
        at_rest = own_processes(emberbox)
        before = settled_available()
        sandboxes = [Sandbox.create(timeout=900) for _ in range(arguments.count)]
        time.sleep(arguments.settle)
        after = settled_available()
        used = [int(sandbox.get_metrics()[-1].mem_used) / MIB for sandbox in sandboxes if sandbox.get_metrics()]
        for sandbox in sandboxes:
            sandbox.kill()
    control = sum(value for name, value in at_rest.items() if name in ("api", "node", "supervisor"))
    cost = (before - after) / arguments.count
    counted = sorted(used)[len(used) // 2] if used else float("nan")
    roles = {name: round(value) for name, value in at_rest.items()}
    return Result(
        f"memory, with {arguments.count} idle sandboxes",
        [
            Row("one idle sandbox, of the host's available memory", cost, "MiB", 12),
            Row("one idle sandbox, as its own metrics count", counted, "MiB"),
            Row("control plane and node at rest", control, "MiB", 200, details=roles),
        ],
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=50, help="sandboxes [default: 50]")
    parser.add_argument("--settle", type=float, default=12, help="seconds before counting [default: 12]")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
