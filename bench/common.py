"""What the benchmarks share: an Emberbox to measure, statistics, the machine's description, printing.

Each script measures one figure, its floor or peer in the same run, and prints a table, or JSON with `--json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.clients.support import instance  # noqa: E402 - the path has to be set first
from tests.clients.support.instance import Emberbox  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One line of a result: a figure, what it was measured against, and its target.

    `target` holds when `value <= target`, or `>=` when `higher_is_better`. No target: only a floor or a peer.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    higher_is_better: bool = False
    details: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target


@dataclass(frozen=True)
class Result:
    """What one script found."""

    title: str
    rows: list[Row]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value with at least `share` (0-1) of all at or below it."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, p95 and p99 of samples in seconds, in milliseconds."""
    return {name: round(percentile(samples, share) * 1000, 2) for name, share in _SHARES}


_SHARES = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))


def machine() -> dict[str, str | int | float]:
    """The machine a figure was measured on; `load` is its load average of five minutes, with this run's own share."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory_kib = int(Path("/proc/meminfo").read_text().split("MemTotal:", 1)[1].split()[0])
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "memory_gib": round(memory_kib / 1024 / 1024),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[1], 1),
    }


def emulated() -> bool:
    """Whether this machine's processor is software, as the lab's is."""
    return "QEMU TCG" in str(machine()["cpu"])


@contextlib.contextmanager
def an_emberbox(**settings: str) -> Iterator[Emberbox]:
    """The Emberbox that the environment names, or a fresh one with these settings that ends with the block."""
    given = instance.from_environment()
    if given is not None:
        yield given
        return
    own = instance.start(settings=settings)
    os.environ.update(own.client_env)
    try:
        yield own
    finally:
        for name in own.client_env:
            os.environ.pop(name, None)
        own.down()
        instance.remove(own)


def median_of_command(command: Sequence[str], *, repeat: int, env: Mapping[str, str] | None = None) -> list[float]:
    """Seconds that `command` took, `repeat` times. A failure is an error, not a sample."""
    import time

    samples = []
    for _ in range(repeat):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=env, stdin=subprocess.DEVNULL)
        samples.append(time.perf_counter() - started)
    return samples


def main(measure: Callable[[argparse.Namespace], Result], *, options: Callable[[argparse.ArgumentParser], None]) -> int:
    """Run one benchmark as a script. The exit code is 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options(parser)
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        print(json.dumps({"machine": machine(), **as_json(result)}, indent=2))
    else:
        show(result)
    return 1 if any(row.met is False for row in result.rows) else 0


def as_json(result: Result) -> dict[str, Any]:
    return {"title": result.title, "rows": [{**asdict(row), "met": row.met} for row in result.rows]}


def show(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    about = machine()
    table = Table(title=f"{result.title}\n{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}")
    for heading in ("figure", "value", "target", "", "details"):
        table.add_column(heading, justify="right" if heading in ("value", "target") else "left")
    for row in result.rows:
        sign = ">=" if row.higher_is_better else "<="
        verdict = {True: "met", False: "[red]missed[/red]", None: ""}[row.met]
        table.add_row(
            row.name,
            f"{number(row.value)} {row.unit}",
            f"{sign} {number(row.target)}" if row.target is not None else "",
            verdict,
            details(row),
        )
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def details(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.details.items())


def number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
