"""One command in a running sandbox: `commands.run("true")` at the client.

Beside it: the same request by a bare HTTP client (what Emberbox answers without the SDK's own work), the agent's
health answer through the edge (the way without a process), and the login shell that the SDK always starts, on the host.
"""

from __future__ import annotations

import argparse
import base64
import json
import struct
import time
from collections.abc import Callable

from common import Result, Row, an_emberbox, main, median_of_command, percentile, spread


def times(what: Callable[[], object], repeat: int) -> list[float]:
    samples = []
    for _ in range(repeat):
        started = time.perf_counter()
        what()
        samples.append(time.perf_counter() - started)
    return samples


def measure(arguments: argparse.Namespace) -> Result:
    from e2b import Sandbox

    with an_emberbox() as emberbox:
        import httpx

        sandbox = Sandbox.create(timeout=600)
        headers = {
            "E2b-Sandbox-Id": sandbox.sandbox_id,
            "E2b-Sandbox-Port": "49983",
            "X-Access-Token": sandbox._envd_access_token or "",
            "Connect-Protocol-Version": "1",
        }
        with httpx.Client(base_url=emberbox.sandbox_url, headers=headers, timeout=30, trust_env=False) as http:

            def by_sdk() -> None:
                assert sandbox.commands.run("true").exit_code == 0

            def by_hand(command: list[str]) -> Callable[[], None]:
                process = {"cmd": command[0], "args": command[1:]}
                body = json.dumps({"process": process, "stdin": False}).encode()
                envelope = struct.pack(">BI", 0, len(body)) + body

                def call() -> None:
                    answer = http.post(
                        "/process.Process/Start",
                        content=envelope,
                        headers={
                            "Content-Type": "application/connect+json",
                            "Authorization": "Basic " + base64.b64encode(b"user:").decode(),
                        },
                    )
                    assert b'"exited":true' in answer.content.replace(b" ", b""), answer.content

                return call

            def health() -> None:
                assert http.get("/health").status_code == 204

            shell, plain = by_hand(["/bin/bash", "-l", "-c", "true"]), by_hand(["/bin/true"])
            for warm_up in (by_sdk, shell, plain, health):
                times(warm_up, 20)
            sdk = times(by_sdk, arguments.count)
            by_http = times(shell, arguments.count)
            without_shell = times(plain, arguments.count)
            healthy = times(health, arguments.count)
        sandbox.kill()
    host = median_of_command(
        ["/bin/bash", "-l", "-c", "true"], repeat=min(arguments.count, 100), env={"PATH": "/usr/bin:/bin"}
    )
    return Result(
        "commands.run (p50)",
        [
            _row('commands.run("true"), Python SDK', sdk, 12),
            _row("the same by a bare HTTP client", by_http, None),
            _row("/bin/true without the login shell", without_shell, None),
            _row("GET /health through the edge", healthy, None),
            _row("floor: bash -l -c true on the host", host, None),
        ],
    )


def _row(name: str, samples: list[float], target: float | None) -> Row:
    return Row(name, percentile(samples, 0.5) * 1000, "ms", target, details=spread(samples))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=300, help="commands [default: 300]")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
