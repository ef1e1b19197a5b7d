"""How far the clock of a microVM is from its node's, after a create from the pool and after a resume.

A file that is uploaded has the time of the guest, and was written between the request and its answer: the clock is off
by no more than that allows. The floor is therefore the time of one such request. Run it as root on the host of the
running Emberbox.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from typing import Any

from common import Result, Row, main, percentile, spread
from microvm import Api, run_here

_UPLOADS = 20
_TARGET_MS = 50


def offset_at_most(api: Api, sandbox: dict[str, Any]) -> tuple[float, float]:
    """Seconds by which the guest's clock can be off at most, and what its quickest upload took."""
    bounds, took = [], []
    for _ in range(_UPLOADS):
        before = time.time()
        api.upload(sandbox, "/home/user/now", b"x")
        after = time.time()
        written = api.modified(sandbox, "/home/user/now")
        bounds.append(max(abs(written - before), abs(after - written)))
        took.append(after - before)
    return min(bounds), min(took)


def measure(arguments: argparse.Namespace) -> Result:
    api = run_here()
    created, resumed, took = [], [], []
    for _ in range(arguments.count):
        time.sleep(arguments.rest)
        sandbox, _ = api.create()
        bound, upload = offset_at_most(api, sandbox)
        created.append(bound)
        took.append(upload)
        api.ask("POST", f"/sandboxes/{sandbox['sandboxID']}/pause")
        try:
            _set_clock(arguments.hours)
            api.ask("POST", f"/sandboxes/{sandbox['sandboxID']}/connect", {"timeout": 3600})
            resumed.append(offset_at_most(api, sandbox)[0])
            api.ask("DELETE", f"/sandboxes/{sandbox['sandboxID']}")
        finally:
            _set_clock(-arguments.hours)
    return Result(
        "The clock of a microVM, off by at most",
        [
            Row("created", max(created) * 1000, "ms", _TARGET_MS, details=spread(created)),
            Row(f"resumed after {arguments.hours} h", max(resumed) * 1000, "ms", _TARGET_MS, details=spread(resumed)),
            Row("one upload", percentile(took, 0.5) * 1000, "ms", details=spread(took)),
        ],
    )


def _set_clock(hours: int) -> None:
    if hours:
        subprocess.run(["date", "--set", f"{hours:+d} hours"], check=True, stdout=subprocess.DEVNULL)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=4, help="sandboxes (default: %(default)s)")
    parser.add_argument(
        "--rest", type=float, default=8.0, help="seconds in which the pool fills (default: %(default)s)"
    )
    parser.add_argument(
        "--hours", type=int, default=0, help="let so much time pass while one is paused: sets this host's own clock"
    )


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
