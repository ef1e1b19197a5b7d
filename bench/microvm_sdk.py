"""Firecracker sandboxes as a user of the Python SDK sees them, against a running Emberbox that the environment names.

In the lab the client runs on the machine around it, at full speed.
"""

from __future__ import annotations

import argparse
import os
import time

from common import Result, Row, main, percentile, spread

PATIENCE = 450.0
CLOCK = """
import time
last = time.time()
while True:
    time.sleep(0.01)
    now = time.time()
    print(now - last, flush=True)
    last = now
"""


def first_output(count: int, rest: float) -> tuple[list[float], list[float]]:
    """Seconds from asking for a sandbox to its first command's output, and of the command after it."""
    from e2b import Sandbox

    first, following = [], []
    alive = []
    for _ in range(count):
        time.sleep(rest)
        began = time.perf_counter()
        sandbox = Sandbox.create(timeout=3600, request_timeout=PATIENCE)
        sandbox.commands.run("echo ready", request_timeout=PATIENCE)
        first.append(time.perf_counter() - began)
        began = time.perf_counter()
        sandbox.commands.run("echo again", request_timeout=PATIENCE)
        following.append(time.perf_counter() - began)
        alive.append(sandbox)
    for sandbox in alive:
        sandbox.kill(request_timeout=PATIENCE)
    return first, following


def live_forks(count: int) -> tuple[list[float], list[float]]:
    """Seconds of a fork with memory, and the longest time that a program in the source stood still in it."""
    from e2b import Sandbox

    took, stood = [], []
    source = Sandbox.create(timeout=3600, request_timeout=PATIENCE)
    source.files.write("/home/user/clock.py", CLOCK, request_timeout=PATIENCE)
    source.commands.run("python3 ~/clock.py > ~/gaps", background=True, timeout=0, request_timeout=PATIENCE)
    for _ in range(count):
        time.sleep(3)
        source.commands.run("truncate -s 0 ~/gaps", request_timeout=PATIENCE)
        began = time.perf_counter()
        (copy,) = source.fork(count=1, timeout=3600, request_timeout=PATIENCE)
        took.append(time.perf_counter() - began)
        gaps = source.commands.run("tr -d '\\0' < ~/gaps | sort -g | tail -1", request_timeout=PATIENCE).stdout
        stood.append(float(gaps))
        copy.kill(request_timeout=PATIENCE)
    source.kill(request_timeout=PATIENCE)
    return took, stood


def measure(arguments: argparse.Namespace) -> Result:
    first_output(1, 0)
    first, following = first_output(arguments.count, arguments.rest)
    took, stood = live_forks(arguments.count)
    in_lab = "EMBERBOX_TEST_SCALE" in os.environ
    if arguments.no_pool:
        how, target = "pool empty", 800 if in_lab else None
    else:
        how, target = "from the pool", 450 if in_lab else 50
    figures = (
        (f"create to first output, {how}", first, target),
        ("next command", following, 76 if in_lab else None),
        ("live fork with memory", took, 900 if in_lab else None),
        ("of it, the source stands still", stood, 300 if in_lab else None),
    )
    where = ", in the lab" if in_lab else ""
    return Result(f"Firecracker sandboxes through the Python SDK{where}", [_row(*figure) for figure in figures])


def _row(name: str, samples: list[float], target: float | None) -> Row:
    return Row(name, percentile(samples, 0.5) * 1000, "ms", target, details=dict(spread(samples)))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=8, help="sandboxes each way (default: %(default)s)")
    parser.add_argument("--no-pool", action="store_true", help="that Emberbox has none: EMBERBOX_WARM_MAX=0")
    parser.add_argument(
        "--rest", type=float, default=6.0, help="seconds in which the pool fills (default: %(default)s)"
    )


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
