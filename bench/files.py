"""Moving 100 MB up to a sandbox and down again.

With the Python SDK (what users get) and with curl (what the edge and the agent do without the SDK's own work);
beside them dd inside the sandbox, which is the disk alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from pathlib import Path

from common import Result, Row, an_emberbox, main, percentile

MEGABYTE = 1_000_000


def measure(arguments: argparse.Namespace) -> Result:
    from e2b import Sandbox

    size = arguments.megabytes * MEGABYTE
    data = os.urandom(MEGABYTE) * arguments.megabytes
    speeds: dict[str, list[float]] = {}

    def timed(name: str, what: object) -> None:
        started = time.perf_counter()
        what()  # type: ignore[operator]
        speeds.setdefault(name, []).append(size / MEGABYTE / (time.perf_counter() - started))

    with an_emberbox() as emberbox, tempfile.TemporaryDirectory(prefix="emberbox-bench-") as folder:
        sandbox = Sandbox.create(timeout=900)
        local = Path(folder) / "data"
        local.write_bytes(data)
        url = f"{emberbox.sandbox_url}/files?path=/home/user/data"
        headers = [
            f"E2b-Sandbox-Id: {sandbox.sandbox_id}", "E2b-Sandbox-Port: 49983",
            f"X-Access-Token: {sandbox._envd_access_token}", "Expect:",
        ]  # fmt: skip
        curl = ["curl", "-sSf", "-o", "/dev/null", *(part for header in headers for part in ("-H", header))]
        octets = ["-H", "Content-Type: application/octet-stream"]

        def down_in_one() -> None:
            assert len(sandbox.files.read("data", format="bytes", request_timeout=300)) == size

        def down_as_stream() -> None:
            assert sum(len(chunk) for chunk in sandbox.files.read("data", format="stream")) == size

        for _ in range(arguments.count):
            timed(
                "up, SDK, octet-stream",
                lambda: sandbox.files.write("data", data, use_octet_stream=True, request_timeout=300),
            )
            timed("up, SDK, multipart", lambda: sandbox.files.write("data", data, request_timeout=300))
            timed("up, curl", lambda: subprocess.run([*curl, *octets, "-X", "POST", "-T", str(local), url], check=True))
            timed("down, SDK, stream", down_as_stream)
            timed("down, SDK, bytes", down_in_one)
            timed("down, curl", lambda: subprocess.run([*curl, url], check=True))
            timed(
                "floor: dd inside, written",
                lambda: sandbox.commands.run(
                    f"dd if=/dev/zero of=~/zero bs=1M count={size // 2**20} status=none", timeout=120
                ),
            )
            timed(
                "floor: dd inside, read",
                lambda: sandbox.commands.run("dd if=~/data of=/dev/null bs=1M status=none", timeout=120),
            )
        sandbox.kill()

    targets = {"up, SDK, octet-stream": 300.0, "up, curl": 300.0, "down, SDK, stream": 500.0, "down, curl": 500.0}
    rows = [
        Row(name, percentile(found, 0.5), "MB/s", targets.get(name), higher_is_better=True,
            details={"slowest": round(min(found)), "fastest": round(max(found))})
        for name, found in speeds.items()
    ]  # fmt: skip
    return Result(f"files of {arguments.megabytes} MB (median)", rows)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--count", type=int, default=7, help="transfers of each kind [default: 7]")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
