"""Firecracker sandboxes against a bare Firecracker that loads the same memory: ratios, which hold in the lab too.

The floor is what nobody can avoid: spawn Firecracker in a prepared namespace, load the same files, and wait for the
agent's first answer; no jailer, no API, no database. For a create these are the template's, for a resume those of a
sandbox that was paused alike and that nobody has restored yet: its memory is a file of its own, with nothing of it in
any cache of the processor, or of an emulation. Run it as root on the host of the running Emberbox. Ratios say what a
KVM host would show; milliseconds are the lab's own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import ROOT, Result, Row, main, percentile

from emberbox.linux import netns, sparse, taps
from emberbox.linux.netlink import Netlink
from emberbox.linux.processes import ProcessId, end_and_wait, identify
from emberbox.runtime.firecracker import snapshots
from emberbox.settings import Settings

NAME = "ebfloor"
HOST, MACHINE = IPv4Address("198.19.255.253"), IPv4Address("198.19.255.254")
AGENT_PORT = 49983
GIVE_UP_SECONDS = 120.0
DIRTIED_MIB = 20
"""What a machine has written to its memory when it is paused."""
CROWD = (1, 10, 30)
"""Sandboxes that run, this one among them, when a create is measured."""
FORKS = (1, 20)


@dataclass(frozen=True)
class SavedMachine:
    """A saved machine on the node, and the layers under it."""

    directory: Path
    layers: tuple[Path, ...]

    def lay_out_memory(self, target: Path) -> None:
        """Make one file of all its memory, safely on the disk: nobody else writes while the clock runs."""
        pieces = snapshots.read_manifest(self.directory).pieces
        if len(pieces) == 1:
            os.link(self.directory / pieces[0].name, target)
        else:
            merged = snapshots.merge_pieces(self.directory, pieces, target.parent)
            (target.parent / merged.name).rename(target)


class Unix(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=GIVE_UP_SECONDS)
        self._path = path

    def connect(self) -> None:
        import socket

        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class Api:
    """Plain requests to the control plane: the client's own time is not measured."""

    def __init__(self, url: str, edge_url: str, key: str) -> None:
        host = url.removeprefix("http://")
        self._connection = http.client.HTTPConnection(host, timeout=GIVE_UP_SECONDS)
        self._edge = edge_url.removeprefix("http://")
        self._key = key

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"X-API-Key": self._key, "Content-Type": "application/json"}
        content = _exchange(self._connection, method, path, None if body is None else json.dumps(body), headers)
        return json.loads(content) if content else None

    def dirty(self, sandbox: dict[str, Any]) -> None:
        """Write to the memory of a sandbox that was just created, by the answer of its create."""
        headers = {
            "E2b-Sandbox-Id": sandbox["sandboxID"],
            "E2b-Sandbox-Port": str(AGENT_PORT),
            "X-Access-Token": sandbox["envdAccessToken"],
        }
        _dirty(self._edge, headers)


def _dirty(host: str, headers: dict[str, str]) -> None:
    """Upload a file into a machine's memory file system, through its agent."""
    connection = http.client.HTTPConnection(host, timeout=GIVE_UP_SECONDS)
    try:
        headers = {**headers, "Content-Type": "application/octet-stream"}
        _exchange(connection, "POST", "/files?path=/dev/shm/dirt", os.urandom(DIRTIED_MIB << 20), headers)
    finally:
        connection.close()


def _exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: str | bytes | None,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> bytes:
    """Send a request and return the body of its answer; an error status is a `RuntimeError` with it."""
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status >= 400:
        raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()}")
    return content


@contextlib.contextmanager
def bare_namespace() -> Iterator[None]:
    """What a slot is, without its firewall: made before the clock starts, as slots are."""

    def connect() -> None:
        with Netlink() as netlink:
            netlink.add_address("eth0", IPv4Interface(f"{MACHINE}/30"))
            netlink.set_up("eth0")
            netlink.add_default_route(HOST)
        taps.add(MACHINE, HOST)

    netns.create(NAME, lambda: None)
    try:
        with netns.opened(NAME) as namespace, Netlink() as netlink:
            netlink.add_veth(NAME, "eth0", namespace)
            netlink.add_address(NAME, IPv4Interface(f"{HOST}/30"))
            netlink.set_up(NAME)
        netns.run_in(NAME, connect)
        yield
    finally:
        with Netlink() as netlink:
            netlink.delete(NAME)
        netns.delete(NAME)


def bare_restore(saved: SavedMachine, firecracker: Path, work: Path) -> tuple[dict[str, float], ProcessId, Path]:
    """Lay the files out, then measure spawn, load and the first answer of the agent."""
    root = work / "root"
    root.mkdir(parents=True)
    saved.lay_out_memory(root / "memory")
    os.link(saved.directory / snapshots.STATE, root / "state")
    for number, layer in enumerate(saved.layers):
        os.link(layer, root / f"layer{number}")
    sparse.clone(saved.directory / snapshots.UPPER, root / "upper")
    (root / "firecracker").write_bytes(firecracker.read_bytes())
    (root / "firecracker").chmod(0o755)
    (root / "dev").mkdir()
    (root / "dev" / "net").mkdir()
    for name, device in (("kvm", os.stat("/dev/kvm")), ("net/tun", os.stat("/dev/net/tun"))):
        os.mknod(root / "dev" / name, device.st_mode, device.st_rdev)
    os.mknod(root / "dev" / "urandom", os.stat("/dev/urandom").st_mode, os.stat("/dev/urandom").st_rdev)
    began = time.perf_counter()
    child = netns.run_in(NAME, lambda: _spawn(root))
    socket = root / "api.sock"
    _until(lambda: _put(socket, "GET", "/", None))
    spawned = time.perf_counter()
    body = {
        "snapshot_path": "/state",
        "mem_backend": {"backend_type": "File", "backend_path": "/memory"},
        "enable_diff_snapshots": True,
        "resume_vm": True,
    }
    _put(socket, "PUT", "/snapshot/load", body)
    loaded = time.perf_counter()
    _until(_agent_answers)
    answered = time.perf_counter()
    identity = identify(child.pid)
    assert identity is not None
    times = {"spawn": spawned - began, "load": loaded - spawned, "whole": answered - began}
    return times, identity, socket


def bare_pause(socket: Path) -> float:
    """Pause and write what was dirtied."""
    began = time.perf_counter()
    _put(socket, "PATCH", "/vm", {"state": "Paused"})
    _put(
        socket,
        "PUT",
        "/snapshot/create",
        {"snapshot_type": "Diff", "snapshot_path": "/state.new", "mem_file_path": "/memory.new"},
    )
    return time.perf_counter() - began


def _spawn(root: Path) -> subprocess.Popen[bytes]:
    """Start Firecracker in `root` and in the namespace of the calling thread."""
    return subprocess.Popen(
        ["/firecracker", "--api-sock", "/api.sock", "--level", "Error"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: _enter(root),
    )


def _enter(root: Path) -> None:
    os.chroot(root)
    os.chdir("/")


def _put(socket: Path, method: str, path: str, body: Any) -> bool:
    connection = Unix(socket)
    try:
        _exchange(connection, method, path, None if body is None else json.dumps(body))
    finally:
        connection.close()
    return True


def _agent_answers() -> bool:
    connection = http.client.HTTPConnection(str(MACHINE), AGENT_PORT, timeout=1)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status < 500
    finally:
        connection.close()


def _until(check: Callable[[], bool]) -> None:
    end = time.monotonic() + GIVE_UP_SECONDS
    while True:
        try:
            if check():
                return
        except OSError:
            pass
        if time.monotonic() > end:
            raise TimeoutError(f"no answer within {GIVE_UP_SECONDS:g} s")
        time.sleep(0.002)


def floor(template: SavedMachine, firecracker: Path, work: Path, runs: int) -> dict[str, list[float]]:
    """Bare figures, in seconds and `memory` in MiB, of `runs` machines one after the other."""
    found: dict[str, list[float]] = {name: [] for name in ("spawn", "load", "whole", "memory", "pause")}
    for _ in range(runs):
        with bare_namespace():
            times, identity, socket = bare_restore(template, firecracker, work)
            times["memory"] = written_mib(identity.pid)
            _dirty(f"{MACHINE}:{AGENT_PORT}", {})
            times["pause"] = bare_pause(socket)
            end_and_wait(identity, GIVE_UP_SECONDS)
        subprocess.run(["rm", "-rf", str(work)], check=True)
        for name, value in times.items():
            found[name].append(value)
    return found


def floor_of_paused(saved: SavedMachine, firecracker: Path, work: Path) -> float:
    """Seconds until a machine that was paused answers when it is restored bare."""
    with bare_namespace():
        times, identity, _ = bare_restore(saved, firecracker, work)
        end_and_wait(identity, GIVE_UP_SECONDS)
    subprocess.run(["rm", "-rf", str(work)], check=True)
    return times["whole"]


def ours(api: Api, runs: int, rest: float, bare_resume: Callable[[str], float] | None = None) -> dict[str, list[float]]:
    """The same through Emberbox's API. In `rest` seconds between two steps the pool fills and memory is merged.

    Args:
        bare_resume: what measures the floor of a sandbox's resume; every other sandbox goes to it.
    """
    found: dict[str, list[float]] = {"create": [], "pause": [], "resume": [], "bare resume": []}
    for number in range(runs if bare_resume is None else 2 * runs):
        time.sleep(rest)
        made, seconds = _create(api)
        sandbox = made["sandboxID"]
        found["create"].append(seconds)
        time.sleep(rest)
        api.dirty(made)
        began = time.perf_counter()
        api.ask("POST", f"/sandboxes/{sandbox}/pause")
        found["pause"].append(time.perf_counter() - began)
        time.sleep(rest)
        if bare_resume is not None and number % 2:
            found["bare resume"].append(bare_resume(sandbox))
        else:
            began = time.perf_counter()
            api.ask("POST", f"/sandboxes/{sandbox}/connect", {"timeout": 3600})
            found["resume"].append(time.perf_counter() - began)
        api.ask("DELETE", f"/sandboxes/{sandbox}")
    return found


def crowd(api: Api, counts: tuple[int, ...], samples: int) -> dict[int, float]:
    """Median seconds of a create while each of `counts` sandboxes run, from `samples` creates around that number."""
    found: dict[int, float] = {}
    alive: list[str] = []
    try:
        for count in counts:
            while len(alive) < count - 1:
                alive.append(_create(api)[0]["sandboxID"])
            times = []
            for _ in range(samples):
                made, seconds = _create(api)
                times.append(seconds)
                api.ask("DELETE", f"/sandboxes/{made['sandboxID']}")
            found[count] = percentile(times, 0.5)
    finally:
        for sandbox in alive:
            api.ask("DELETE", f"/sandboxes/{sandbox}")
    return found


def forks(api: Api, counts: tuple[int, ...]) -> dict[int, float]:
    """Seconds of one request for so many forks of a sandbox that runs."""
    found: dict[int, float] = {}
    source: str = _create(api)[0]["sandboxID"]
    try:
        api.ask("DELETE", f"/sandboxes/{_fork(api, source, 1)[0]}")  # makes what later forks share
        for count in counts:
            began = time.perf_counter()
            made = _fork(api, source, count)
            found[count] = time.perf_counter() - began
            for sandbox in made:
                api.ask("DELETE", f"/sandboxes/{sandbox}")
    finally:
        api.ask("DELETE", f"/sandboxes/{source}")
    return found


def _fork(api: Api, source: str, count: int) -> list[str]:
    answers = api.ask("POST", f"/sandboxes/{source}/fork", {"count": count, "timeout": 3600})
    failed = [answer["error"] for answer in answers if not answer.get("sandbox")]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} forks failed: {failed[0]}")
    return [answer["sandbox"]["sandboxID"] for answer in answers]


def _create(api: Api) -> tuple[dict[str, Any], float]:
    """The answer, and the seconds it took."""
    began = time.perf_counter()
    made: dict[str, Any] = api.ask("POST", "/sandboxes", {"templateID": "base", "timeout": 3600, "secure": True})
    return made, time.perf_counter() - began


def idle_memory(api: Api, settings: Settings) -> float:
    """MiB of its own that the Firecracker of a sandbox has which nobody has used yet."""
    sandbox = _create(api)[0]["sandboxID"]
    try:
        record = json.loads((settings.node_dir / "records" / f"{sandbox}.json").read_text())
        return written_mib(record["machine"]["facts"]["pid"])
    finally:
        api.ask("DELETE", f"/sandboxes/{sandbox}")


def written_mib(pid: int) -> float:
    """What it has written, in MiB. Pages of a template's memory that nobody else maps just now are not its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def measure(args: argparse.Namespace) -> Result:
    settings = Settings()
    printed = subprocess.run(
        [str(ROOT / ".venv/bin/python"), "-m", "emberbox", "env", "--json"], capture_output=True, text=True, check=True
    )
    variables = json.loads(printed.stdout)
    api = Api(variables["E2B_API_URL"], variables["E2B_SANDBOX_URL"], variables["E2B_API_KEY"])
    ours(api, 1, rest=args.rest)  # makes the template's memory when there is none, and warms every cache
    template = _template(settings)
    work = settings.node_dir / "bench"
    firecracker = settings.firecracker or settings.node_dir / "firecracker" / "firecracker"

    def bare_resume(sandbox: str) -> float:
        (directory,) = settings.node_dir.glob(f"saved/{sandbox}-*")
        return floor_of_paused(SavedMachine(directory, template.layers), firecracker, work)

    try:
        bare = floor(template, firecracker, work, args.runs)
        through = ours(api, args.runs, args.rest, bare_resume)
    finally:
        subprocess.run(["rm", "-rf", str(work)], check=True)
    bare["bare pause"] = bare.pop("pause")
    bare_memory = percentile(bare.pop("memory"), 0.5)
    middle = {name: percentile(values, 0.5) for name, values in {**bare, **through}.items()}
    late = {f"{name} p95": percentile(values, 0.95) for name, values in through.items()}
    details: dict[str, float | int | str] = {
        name: f"{value * 1000:.0f} ms" for name, value in {**middle, **late}.items()
    }
    whole = middle["whole"]
    rows = [
        Row("create / bare restore", middle["create"] / whole, "x", 0.75 if args.rest > 0 else 1.4, details=details),
        Row("resume / bare restore of what was paused", middle["resume"] / middle["bare resume"], "x", 1.4),
        Row("resume / bare restore of the template", middle["resume"] / whole, "x"),
        Row(
            f"pause with {DIRTIED_MIB} MiB dirtied / bare diff of as much",
            middle["pause"] / middle["bare pause"],
            "x",
            1.5,
        ),
    ]
    if args.crowd:
        rows += _crowd_rows(api, settings, bare_memory)
    return Result(
        f"Firecracker sandboxes against a bare restore ({'from the pool' if args.rest > 0 else 'pool empty'})", rows
    )


def _crowd_rows(api: Api, settings: Settings, bare_memory: float) -> list[Row]:
    own = idle_memory(api, settings)
    among = crowd(api, CROWD, samples=3)
    several = forks(api, FORKS)
    few, many = FORKS
    return [
        Row(
            "private memory of an idle sandbox beyond the floor's",
            own - bare_memory,
            "MiB",
            1.0,
            details={"sandbox": f"{own:.1f} MiB", "floor": f"{bare_memory:.1f} MiB"},
        ),
        Row(
            "slowest / fastest create as others run",
            max(among.values()) / min(among.values()),
            "x",
            1.3,
            details={f"with {count}": f"{seconds * 1000:.0f} ms" for count, seconds in among.items()},
        ),
        Row(
            f"{many} forks / {few}",
            several[many] / several[few],
            "x",
            4.0,
            details={f"{count} forks": f"{seconds * 1000:.0f} ms" for count, seconds in several.items()},
        ),
    ]


def _template(settings: Settings) -> SavedMachine:
    """The newest memory of a template on this node."""
    found = sorted(settings.node_dir.glob("memories/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RuntimeError("no template has its memory saved on this node; does it run the firecracker runtime?")
    directory = found[-1].parent
    layers = sorted((settings.node_dir / "layers").glob("*.erofs"), key=lambda path: path.stat().st_mtime)
    count = snapshots.read_manifest(directory).layers
    if count != len(layers):
        raise RuntimeError(f"the template has {count} layers and the node {len(layers)}: cannot tell which are its own")
    return SavedMachine(directory, tuple(layers))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=8, help="machines measured each way (default: %(default)s)")
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        help="seconds between steps, in which the pool fills; 0 with EMBERBOX_WARM_MAX=0 measures plain restores",
    )
    parser.add_argument(
        "--crowd", action="store_true", help="also memory, creates among many sandboxes, and many forks (minutes)"
    )


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
