"""How soon a microVM that dies is noticed: from SIGKILL to the first answer of the API that knows of it.

The floor is the answer itself: one request for the same sandbox while it runs. Run it as root on the host of the
running Emberbox.
"""

from __future__ import annotations

import argparse
import os
import signal
import time

from common import Result, Row, main, percentile, spread
from microvm import Api, machine_pid, run_here

from emberbox.settings import Settings


def noticed(api: Api, settings: Settings) -> tuple[float, float]:
    """Seconds until a killed machine's sandbox is gone from the API, and of one request before."""
    sandbox = api.create()[0]["sandboxID"]
    pid = machine_pid(settings, sandbox)
    began = time.perf_counter()
    api.ask("GET", f"/sandboxes/{sandbox}")
    request = time.perf_counter() - began
    os.kill(pid, signal.SIGKILL)
    began = time.perf_counter()
    while api.knows(sandbox):
        if time.perf_counter() - began > 60:
            raise RuntimeError(f"the end of {sandbox} was not noticed in a minute")
    return time.perf_counter() - began, request


def measure(arguments: argparse.Namespace) -> Result:
    settings = Settings()
    api = run_here()
    found = [noticed(api, settings) for _ in range(arguments.count)]
    seconds, requests = [each for each, _ in found], [each for _, each in found]
    return Result(
        "The end of a microVM that was killed",
        [
            Row("noticed", percentile(seconds, 0.5) * 1000, "ms", 1000, details=spread(seconds)),
            Row("one request", percentile(requests, 0.5) * 1000, "ms", details=spread(requests)),
        ],
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=8, help="machines that are killed (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
