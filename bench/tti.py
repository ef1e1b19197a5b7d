"""Time to interactive: from asking for a sandbox to the output of its first `echo`, through the Python SDK.

Three ways, as the field measures it: one after the other, one every 200 ms, and all at once. The floor is what
runc alone needs to run a static binary in a container without any of the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, Result, Row, an_emberbox, main, median_of_command, percentile, spread

STAGGER_SECONDS = 0.2
GIVE_UP_SECONDS = 60


@dataclass
class Samples:
    """Times of those that worked, and why the others did not."""

    seconds: list[float] = field(default_factory=list)
    creates: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def success_rate(self) -> float:
        return len(self.seconds) / max(1, len(self.seconds) + len(self.failures))

    def details(self) -> dict[str, float | int | str]:
        found: dict[str, float | int | str] = {
            **spread(self.seconds),
            "create p50": round(percentile(self.creates, 0.5) * 1000, 2),
            "succeeded": f"{len(self.seconds)}/{len(self.seconds) + len(self.failures)}",
        }
        if self.failures:
            found["first failure"] = self.failures[0]
        return found


def sequential(count: int) -> Samples:
    from e2b import Sandbox

    samples = Samples()
    for _ in range(count):
        started = time.perf_counter()
        try:
            sandbox = Sandbox.create(timeout=120)
            created = time.perf_counter()
            output = sandbox.commands.run("echo ready").stdout
            ended = time.perf_counter()
            if output != "ready\n":
                raise RuntimeError(f"echo gave {output!r}")
        except Exception as error:
            samples.failures.append(f"{type(error).__name__}: {error}")
            continue
        samples.seconds.append(ended - started)
        samples.creates.append(created - started)
        sandbox.kill()
    return samples


async def concurrent(count: int, *, every: float) -> Samples:
    """`count` sandboxes, started `every` seconds; 0 is all at once. They are killed when all are measured."""
    from e2b import AsyncSandbox

    samples = Samples()
    alive: list[AsyncSandbox] = []

    async def one(delay: float) -> None:
        await asyncio.sleep(delay)
        started = time.perf_counter()
        try:
            sandbox = await AsyncSandbox.create(timeout=120)
            alive.append(sandbox)
            created = time.perf_counter()
            output = (await sandbox.commands.run("echo ready")).stdout
            if output != "ready\n":
                raise RuntimeError(f"echo gave {output!r}")
        except Exception as error:
            samples.failures.append(f"{type(error).__name__}: {error}")
            return
        samples.seconds.append(time.perf_counter() - started)
        samples.creates.append(created - started)

    try:
        async with asyncio.timeout(GIVE_UP_SECONDS + count * every):
            await asyncio.gather(*(one(n * every) for n in range(count)))
    finally:
        await asyncio.gather(*(sandbox.kill() for sandbox in alive), return_exceptions=True)
    return samples


def runc_floor(repeat: int = 10) -> list[float]:
    """Seconds of `runc run` with a static binary and nothing else in the root file system."""
    emberd = ROOT / "agent" / "build" / "emberd"
    with tempfile.TemporaryDirectory(prefix="emberbox-bench-") as folder:
        bundle = Path(folder)
        (bundle / "rootfs").mkdir()
        shutil.copy(emberd, bundle / "rootfs" / "emberd")
        subprocess.run(["runc", "spec"], cwd=bundle, check=True, capture_output=True)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"] |= {"terminal": False, "args": ["/emberd", "--version"]}
        (bundle / "config.json").write_text(json.dumps(spec))
        name = f"emberbox-bench-{bundle.name}"
        return median_of_command(["runc", "run", "--bundle", folder, name], repeat=repeat)


def measure(arguments: argparse.Namespace) -> Result:
    cold = arguments.cold
    settings = {"EMBERBOX_WARM_MIN": "0", "EMBERBOX_WARM_MAX": "0"} if cold else {}
    target = 200.0 if cold else 60.0
    with an_emberbox(**settings):
        floor = runc_floor()
        sequential(3)  # The first ones load pages and fill the pool; they are not what is asked.
        time.sleep(2)
        rows = []
        one_by_one = sequential(arguments.count)
        rows.append(_row("one after the other", one_by_one, target))
        staggered = asyncio.run(concurrent(arguments.count, every=STAGGER_SECONDS))
        rows.append(_row("one every 200 ms", staggered, target))
        burst = asyncio.run(concurrent(arguments.count, every=0))
        rows.append(_row(f"{arguments.count} at once", burst, None))
        rows.append(Row("of these succeeded", 100 * burst.success_rate, "%", 100, higher_is_better=True))
    rows.append(Row("floor: runc run of a static binary", percentile(floor, 0.5) * 1000, "ms", details=spread(floor)))
    return Result(f"time to interactive, {'cold' if cold else 'warm'} (p50)", rows)


def _row(name: str, samples: Samples, target: float | None) -> Row:
    return Row(name, percentile(samples.seconds, 0.5) * 1000, "ms", target, details=samples.details())


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=100, help="sandboxes a way [default: 100]")
    parser.add_argument("--cold", action="store_true", help="without warm machines (needs an Emberbox of its own)")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
