"""Template builds: `base` and three RUN steps, cold and from the cache, and a COPY of 200 MB.

Times are from registering a build to seeing it ready, as E2B's SDK sees it (it asks every 200 ms) and by a bare client
that asks every 20 ms. Beside them: the same three commands in a running sandbox, and the client's own packing of the
200 MB, which no server can make faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from common import Result, Row, an_emberbox, main

COMMANDS = (
    "mkdir -p /home/user/app && seq 10000 > /home/user/app/numbers",
    "cp -r /usr/lib/python3/dist-packages /home/user/app/packages",
    "find /home/user/app | sort > /home/user/app/files",
)


def timed(what: Callable[[], object]) -> float:
    started = time.perf_counter()
    what()
    return time.perf_counter() - started


def median(what: Callable[[], object], repeat: int) -> float:
    return statistics.median(timed(what) for _ in range(repeat))


def measure(arguments: argparse.Namespace) -> Result:
    from e2b import Sandbox, Template
    from e2b.template.utils import tar_file_stream

    name = f"bench-{uuid.uuid4().hex[:8]}"
    with an_emberbox() as emberbox:

        def template(salt: str = "") -> Any:
            builder = Template().from_template("base")
            for command in COMMANDS:
                builder.run_cmd(command + (f" # {salt}" if salt else ""))
            return builder

        with httpx.Client(
            base_url=emberbox.api_url, headers={"X-API-Key": emberbox.api_key}, timeout=60, trust_env=False
        ) as http:
            steps = [{"type": "RUN", "args": [command], "force": False} for command in COMMANDS]

            def by_hand() -> float:
                """Seconds from the start of a registered build to `ready`."""
                made = http.post("/v3/templates", json={"name": name}).json()
                started = time.perf_counter()
                path = f"/templates/{made['templateID']}/builds/{made['buildID']}"
                http.post(f"/v2{path}", json={"fromTemplate": "base", "steps": steps}).raise_for_status()
                while (status := http.get(f"{path}/status").json()["status"]) not in ("ready", "error"):
                    time.sleep(0.02)
                assert status == "ready", http.get(f"{path}/status").json()
                return time.perf_counter() - started

            cold = median(lambda: Template.build(template(uuid.uuid4().hex), name), arguments.count)
            Template.build(template(), name)
            cached = median(lambda: Template.build(template(), name), arguments.count)
            by_hand()
            after_register = statistics.median(by_hand() for _ in range(arguments.count))

            sandbox = Sandbox.create("base", timeout=600)
            floor = timed(lambda: [sandbox.commands.run(command, timeout=300) for command in COMMANDS])
            sandbox.kill()

            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder, "data")
                data.mkdir()
                for number in range(arguments.megabytes):
                    (data / f"{number:04}").write_bytes(os.urandom(1024 * 1024))

                def copying() -> Any:
                    return Template(file_context_path=folder).from_template("base").copy("data", "/opt/data")

                packing = timed(lambda: tar_file_stream("data", folder, [], False, True).close())
                copied = timed(lambda: Template.build(copying(), name))
                copied_again = timed(lambda: Template.build(copying(), name))
            http.delete(f"/templates/{name}").raise_for_status()
    size = f"{arguments.megabytes} MB"
    return Result(
        "template builds",
        [
            Row("base + 3 RUN, cold, Python SDK", cold, "s"),
            Row("floor: the 3 commands in a running sandbox", floor, "s"),
            Row("the same again, cached, Python SDK", cached, "s"),
            Row("cached, from start to ready", after_register, "s", target=1.0),
            Row(f"COPY of {size}, upload and build", copied, "s"),
            Row(f"COPY of {size} again, cached", copied_again, "s"),
            Row(f"floor: the client packs {size}", packing, "s"),
        ],
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=3, help="builds of each kind")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the copied files")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
