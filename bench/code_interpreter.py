"""`run_code` through E2B's code interpreter client: the first after a create, the next ones, a create with one.

Beside them, in a sandbox of the same template: a bare `jupyter_client` that starts a kernel and runs the same code,
with no server, no edge and no client around it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from common import Result, Row, an_emberbox, main, percentile, spread

from tests.clients.support.shipped import ensure_built

FIRST_MS, NEXT_MS = 300.0, 20.0

FLOOR = """
import asyncio, json, sys, time
from jupyter_client.manager import AsyncKernelManager
async def main():
    began = time.perf_counter()
    manager = AsyncKernelManager(kernel_name="ipython")
    await manager.start_kernel()
    client = manager.client()
    client.start_channels(stdin=False)
    await client.wait_for_ready(timeout=60)
    samples = []
    for number in range(int(sys.argv[1]) + 1):
        started = time.perf_counter()
        message_id = client.execute("1 + 1")
        while True:
            message = await client.get_iopub_msg(timeout=30)
            if message["parent_header"].get("msg_id") == message_id and \\
                    message["content"].get("execution_state") == "idle":
                break
        samples.append(time.perf_counter() - started)
        if number == 0:
            first = time.perf_counter() - began
    await manager.shutdown_kernel(now=True)
    print(json.dumps({"first": first, "next": samples[1:]}))
asyncio.run(main())
"""


def measure(arguments: argparse.Namespace) -> Result:
    from e2b_code_interpreter import Sandbox

    with an_emberbox() as emberbox:
        ensure_built(emberbox, "code-interpreter-v1")

        def timed_run(sandbox: Any) -> float:
            started = time.perf_counter()
            assert sandbox.run_code("1 + 1").text == "2"
            return time.perf_counter() - started

        first, both = [], []
        for _ in range(arguments.sandboxes):
            began = time.perf_counter()
            sandbox = Sandbox.create(timeout=300)
            first.append(timed_run(sandbox))
            both.append(time.perf_counter() - began)
            sandbox.kill()
            time.sleep(arguments.pause)  # the warm pool refills; a burst past it starts a kernel

        sandbox = Sandbox.create(timeout=300)
        timed_run(sandbox)
        following = [timed_run(sandbox) for _ in range(arguments.count)]
        sandbox.files.write("/tmp/floor.py", FLOOR)
        bare = json.loads(
            sandbox.commands.run(
                f"JUPYTER_PATH=/opt/interpreter/share python3 /tmp/floor.py {arguments.count}", timeout=120
            ).stdout
        )
        sandbox.kill()
    return Result(
        "run_code of the code interpreter (p50)",
        [
            Row("first run_code after a create", percentile(first, 0.5) * 1000, "ms", FIRST_MS, details=spread(first)),
            Row("create and first run_code", percentile(both, 0.5) * 1000, "ms", details=spread(both)),
            Row("next run_code", percentile(following, 0.5) * 1000, "ms", NEXT_MS, details=spread(following)),
            Row("floor: bare kernel, started and run", bare["first"] * 1000, "ms"),
            Row(
                "floor: bare kernel, next run", percentile(bare["next"], 0.5) * 1000, "ms", details=spread(bare["next"])
            ),
        ],
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sandboxes", type=int, default=20, help="creates, each with a first run_code")
    parser.add_argument("--count", type=int, default=100, help="further calls in one sandbox")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two creates")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
