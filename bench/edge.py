"""The edge alone: requests a second, added latency, one-stream transfer, changes of routes, memory.

The machine behind it is an HAProxy of one thread that answers by itself for requests, and a bare socket server with
`sendfile` for transfers. The floor is the same client on the same machine without the edge, in the same run. Client,
edge and machine share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import ROOT, Result, Row, main, percentile, spread

from tests.support.edge import EDGE_PORT, EdgeProcess, Routes

assert ROOT
SANDBOX = "ibench"
REQUEST_PORT, TRANSFER_PORT = 8080, 8081
BLOCK = 1 << 20


@contextlib.contextmanager
def answering_machine(address: str) -> Iterator[None]:
    """An HAProxy that answers every request with five bytes."""
    config = f"""
global
    nbthread 1
    maxconn 2000
defaults
    mode http
    timeout client 1m
    timeout server 1m
    timeout connect 1s
frontend machine
    bind {address}:{REQUEST_PORT}
    http-request return status 200 content-type text/plain string hello
"""
    with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
        file.write(config)
        file.flush()
        process = subprocess.Popen(["haproxy", "-db", "-f", file.name], stderr=subprocess.DEVNULL)
        try:
            wait_for_port(address, REQUEST_PORT)
            yield
        finally:
            process.kill()
            process.wait()


def serve_transfers(address: str, size: int) -> None:
    """Answer GET with `size` bytes from a sparse file, and anything else after reading its body."""
    with tempfile.TemporaryFile() as file, socket.create_server((address, TRANSFER_PORT)) as server:
        file.truncate(size)
        while True:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                head = b""
                while b"\r\n\r\n" not in head and (part := connection.recv(65536)):
                    head += part
                if head.startswith(b"GET "):
                    connection.sendall(
                        f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode()
                    )
                    file.seek(0)
                    connection.sendfile(file, count=size)
                elif head:
                    body = len(head.partition(b"\r\n\r\n")[2])
                    read_all(connection, size - body)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")


@contextlib.contextmanager
def transferring_machine(address: str, size: int) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=serve_transfers, args=(address, size), daemon=True)
    process.start()
    try:
        wait_for_port(address, TRANSFER_PORT)
        yield
    finally:
        process.kill()
        process.join()


def wait_for_port(address: str, port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on {address}:{port}")


def read_all(connection: socket.socket, size: int) -> None:
    buffer = memoryview(bytearray(BLOCK))
    while size > 0:
        count = connection.recv_into(buffer[: min(size, BLOCK)])
        if not count:
            raise OSError("the stream ended early")
        size -= count


def wrk(address: str, port: int, *, connections: int, seconds: int) -> tuple[float, float]:
    """Requests a second, and the median latency in milliseconds."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency"]
    command += [
        "-H",
        f"E2b-Sandbox-Id: {SANDBOX}",
        "-H",
        f"E2b-Sandbox-Port: {REQUEST_PORT}",
        f"http://{address}:{port}/",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"wrk met errors:\n{output}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    half = re.search(r"50%\s+([\d.]+)(us|ms|s)", output)
    assert rate, output
    assert half, output
    return float(rate[1]), float(half[1]) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[half[2]]


def transfer(address: str, port: int, size: int, *, upload: bool) -> float:
    """One stream, in megabytes a second."""
    head = f"{'PUT' if upload else 'GET'} / HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: {SANDBOX}\r\n"
    head += f"E2b-Sandbox-Port: {TRANSFER_PORT}\r\n" + (f"Content-Length: {size}\r\n" if upload else "") + "\r\n"
    with socket.create_connection((address, port)) as connection, tempfile.TemporaryFile() as file:
        file.truncate(size)
        started = time.perf_counter()
        connection.sendall(head.encode())
        if upload:
            connection.sendfile(file, count=size)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        else:
            answer = connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            read_all(connection, size - len(answer.partition(b"\r\n\r\n")[2]))
        return size / 1e6 / (time.perf_counter() - started)


async def changes(target: str, address: str, count: int) -> tuple[list[float], list[float]]:
    """Seconds that setting and dropping a route took, with a thousand routes there."""
    routes = Routes(target)
    await routes.replace({f"iother{number}": address for number in range(1000)} | {SANDBOX: address})
    set_times, drop_times = [], []
    for number in range(count):
        for what, samples in ((routes.set(f"i{number}", address), set_times), (routes.drop(f"i{number}"), drop_times)):
            started = time.perf_counter()
            await what
            samples.append(time.perf_counter() - started)
    await routes.close()
    return set_times, drop_times


def resident_mib(pids: list[int]) -> float:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def measure(arguments: argparse.Namespace) -> Result:
    for program in ("haproxy", "wrk"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed: apt-get install {program}")
    if arguments.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    edge = EdgeProcess()
    size = arguments.megabytes * 1_000_000
    machine = edge.new_address()
    try:
        edge.start()
        with answering_machine(machine), transferring_machine(machine, size):
            set_times, drop_times = asyncio.run(changes(edge.settings.edge_target, machine, 200))
            rates: dict[str, list[float]] = {"edge": [], "direct": []}
            busy: dict[str, list[float]] = {"edge": [], "direct": []}
            quiet: dict[str, list[float]] = {"edge": [], "direct": []}
            ways = {"edge": (edge.address, EDGE_PORT), "direct": (machine, REQUEST_PORT)}
            for _ in range(arguments.rounds):
                for name, (address, port) in ways.items():
                    rate, half = wrk(address, port, connections=32, seconds=arguments.seconds)
                    rates[name].append(rate)
                    busy[name].append(half)
                    quiet[name].append(wrk(address, port, connections=1, seconds=arguments.seconds)[1])
            speeds: dict[tuple[str, bool], list[float]] = {}
            ways["direct"] = (machine, TRANSFER_PORT)
            for _ in range(arguments.rounds):
                for upload in (False, True):
                    for name, (address, port) in ways.items():
                        speeds.setdefault((name, upload), []).append(transfer(address, port, size, upload=upload))
        memory = resident_mib(list(edge.haproxies()))
    finally:
        edge.remove()
    added = [ours - floor for ours, floor in zip(quiet["edge"], quiet["direct"], strict=True)]
    added_busy = [ours - floor for ours, floor in zip(busy["edge"], busy["direct"], strict=True)]
    return Result(
        "Edge (HAProxy)",
        [
            _rate("requests a second, 32 connections", rates["edge"], "req/s", 15_000, direct=rates["direct"]),
            _added("added latency p50, 32 connections", added_busy, busy["edge"], busy["direct"]),
            _added("added latency p50, 1 connection", added, quiet["edge"], quiet["direct"]),
            _rate("one stream down", speeds["edge", False], "MB/s", 500, direct=speeds["direct", False]),
            _rate("one stream up", speeds["edge", True], "MB/s", 500, direct=speeds["direct", True]),
            Row("SetRoute, 1000 routes", percentile(set_times, 0.5) * 1000, "ms", details=spread(set_times)),
            Row("DropRoute, 1000 routes", percentile(drop_times, 0.5) * 1000, "ms", details=spread(drop_times)),
            Row("HAProxy's memory, master and worker", memory, "MiB"),
        ],
    )


def _rate(name: str, values: list[float], unit: str, target: float, *, direct: list[float]) -> Row:
    return Row(
        name,
        statistics.median(values),
        unit,
        target,
        higher_is_better=True,
        details={"worst": round(min(values)), "best": round(max(values)), "direct": round(statistics.median(direct))},
    )


def _added(name: str, added: list[float], ours: list[float], direct: list[float]) -> Row:
    return Row(
        name,
        statistics.median(added),
        "ms",
        1.0,
        details={
            "worst": round(max(added), 3),
            "edge": round(statistics.median(ours), 3),
            "direct": round(statistics.median(direct), 3),
        },
    )


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="times that each figure is taken [default: 5]")
    parser.add_argument("--seconds", type=int, default=3, help="seconds of each wrk [default: 3]")
    parser.add_argument(
        "--realtime", action="store_true", help="go before all other work on the machine, for one that is busy (root)"
    )
    parser.add_argument("--megabytes", type=int, default=1000, help="size of a transfer [default: 1000]")


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
