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
import ctypes
import http.client
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common import ROOT, Result, Row, emulated, main, percentile

from emberbox.linux import netns, sparse, taps
from emberbox.linux.netlink import Netlink
from emberbox.linux.processes import ProcessId, end_and_wait, identify
from emberbox.node.firewall import CONNECTIONS_PER_SLOT
from emberbox.runtime.firecracker import snapshots
from emberbox.settings import Settings

AGENT_PORT = 49983
GIVE_UP_SECONDS = 120.0
DIRTIED_MIB = 20
"""What a machine has written to its memory when it is paused."""
CROWD = (1, 10, 30)
"""Sandboxes that run, this one among them, when a create is measured."""
FORKS = (1, 20)
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_AT_ONCE = 8
"""Bare machines that are started at the same time."""


@dataclass(frozen=True)
class Place:
    """A namespace for one bare machine, and both ends of the way to it."""

    number: int = 0

    @property
    def name(self) -> str:
        return f"ebfloor{self.number}"

    @property
    def host(self) -> IPv4Address:
        return IPv4Address("198.19.254.1") + 4 * self.number

    @property
    def machine(self) -> IPv4Address:
        return self.host + 1


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
        self._agent = http.client.HTTPConnection(self._edge, timeout=GIVE_UP_SECONDS)
        self._key = key

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"X-API-Key": self._key, "Content-Type": "application/json"}
        content = _exchange(self._connection, method, path, None if body is None else json.dumps(body), headers)
        return json.loads(content) if content else None

    def create(self) -> tuple[dict[str, Any], float]:
        """The answer, and the seconds it took."""
        began = time.perf_counter()
        made: dict[str, Any] = self.ask("POST", "/sandboxes", {"templateID": "base", "timeout": 3600, "secure": True})
        return made, time.perf_counter() - began

    def knows(self, sandbox: str) -> bool:
        """There is such a sandbox."""
        self._connection.request("GET", f"/sandboxes/{sandbox}", headers={"X-API-Key": self._key})
        answer = self._connection.getresponse()
        answer.read()
        return answer.status != 404

    def dirty(self, sandbox: dict[str, Any]) -> None:
        """Write to the memory of a sandbox that was just created, by the answer of its create."""
        _dirty(self._edge, _way_to(sandbox))

    def upload(self, sandbox: dict[str, Any], path: str, content: bytes) -> None:
        headers = {**_way_to(sandbox), "Content-Type": "application/octet-stream"}
        _exchange(self._agent, "POST", f"/files?path={path}", content, headers)

    def modified(self, sandbox: dict[str, Any], path: str) -> float:
        """When the guest last wrote a file, by its own clock: seconds since 1970."""
        headers = {**_way_to(sandbox), "Content-Type": "application/json"}
        body = json.dumps({"path": path})
        answer = json.loads(_exchange(self._agent, "POST", "/filesystem.Filesystem/Stat", body, headers))
        return datetime.fromisoformat(answer["entry"]["modifiedTime"]).timestamp()


def _way_to(sandbox: dict[str, Any]) -> dict[str, str]:
    """What leads to a sandbox's agent, by the answer of its create."""
    return {
        "E2b-Sandbox-Id": sandbox["sandboxID"],
        "E2b-Sandbox-Port": str(AGENT_PORT),
        "X-Access-Token": sandbox["envdAccessToken"],
    }


def run_here() -> Api:
    """The API of the Emberbox that runs on this host."""
    command = [str(ROOT / ".venv/bin/python"), "-m", "emberbox", "env", "--json"]
    variables = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return Api(variables["E2B_API_URL"], variables["E2B_SANDBOX_URL"], variables["E2B_API_KEY"])


def machine_pid(settings: Settings, sandbox: str) -> int:
    """The Firecracker of a sandbox that runs on this host."""
    record = json.loads((settings.node_dir / "records" / f"{sandbox}.json").read_text())
    return int(record["machine"]["facts"]["pid"])


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
def bare_namespace(place: Place) -> Iterator[None]:
    """What a slot is, without its firewall: made before the clock starts, as slots are."""

    def connect() -> None:
        with Netlink() as netlink:
            netlink.add_address("eth0", IPv4Interface(f"{place.machine}/30"))
            netlink.set_up("eth0")
            netlink.add_default_route(place.host)
        taps.add(place.machine, place.host, connections=CONNECTIONS_PER_SLOT)

    netns.create(place.name, lambda: None)
    try:
        with netns.opened(place.name) as namespace, Netlink() as netlink:
            netlink.add_veth(place.name, "eth0", namespace)
            netlink.add_address(place.name, IPv4Interface(f"{place.host}/30"))
            netlink.set_up(place.name)
        netns.run_in(place.name, connect)
        yield
    finally:
        with Netlink() as netlink:
            netlink.delete(place.name)
        netns.delete(place.name)


def lay_out(saved: SavedMachine, firecracker: Path, root: Path) -> None:
    """Put what a Firecracker needs below `root`."""
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


def bare_restore(root: Path, place: Place) -> tuple[dict[str, float], ProcessId, Path]:
    """Measure spawn, load and the first answer of the agent, with what was laid out in `root`."""
    began = time.perf_counter()
    child = netns.run_in(place.name, lambda: _spawn(root))
    try:
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
        _until(lambda: _agent_answers(place))
        answered = time.perf_counter()
        identity = identify(child.pid)
        assert identity is not None
    except BaseException:
        child.kill()
        child.wait()
        raise
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
    """Without transparent huge pages, as Emberbox's machines are: with them each clone would have twice the memory."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    os.chroot(root)
    os.chdir("/")


def _put(socket: Path, method: str, path: str, body: Any) -> bool:
    connection = Unix(socket)
    try:
        _exchange(connection, method, path, None if body is None else json.dumps(body))
    finally:
        connection.close()
    return True


def _agent_answers(place: Place) -> bool:
    connection = http.client.HTTPConnection(str(place.machine), AGENT_PORT, timeout=1)
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
    place = Place()
    for _ in range(runs):
        with bare_namespace(place):
            lay_out(template, firecracker, work)
            times, identity, socket = bare_restore(work, place)
            times["memory"] = written_mib(identity.pid)
            _dirty(f"{place.machine}:{AGENT_PORT}", {})
            times["pause"] = bare_pause(socket)
            end_and_wait(identity, GIVE_UP_SECONDS)
        subprocess.run(["rm", "-rf", str(work)], check=True)
        for name, value in times.items():
            found[name].append(value)
    return found


def floor_of_paused(saved: SavedMachine, firecracker: Path, work: Path) -> float:
    """Seconds until a machine that was paused answers when it is restored bare."""
    with bare_namespace(Place()):
        lay_out(saved, firecracker, work)
        times, identity, _ = bare_restore(work, Place())
        end_and_wait(identity, GIVE_UP_SECONDS)
    subprocess.run(["rm", "-rf", str(work)], check=True)
    return times["whole"]


def floor_of_many(template: SavedMachine, firecracker: Path, work: Path, count: int, processors: set[int]) -> float:
    """Seconds until `count` bare machines, restored at once on these processors, have all answered."""
    places = [Place(number) for number in range(count)]
    with contextlib.ExitStack() as namespaces:
        for place in places:
            namespaces.enter_context(bare_namespace(place))
            lay_out(template, firecracker, work / place.name)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, processors)  # threads and processes inherit it
        try:
            began = time.perf_counter()
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                restores = [threads.submit(bare_restore, work / place.name, place) for place in places]
            whole = time.perf_counter() - began
        finally:
            os.sched_setaffinity(0, before)
        for restore in restores:
            if restore.exception() is None:
                end_and_wait(restore.result()[1], GIVE_UP_SECONDS)
        for restore in restores:
            restore.result()
    subprocess.run(["rm", "-rf", str(work)], check=True)
    return whole


def ours(
    api: Api, settings: Settings, runs: int, rest: float, bare_resume: Callable[[str], float] | None = None
) -> dict[str, list[float]]:
    """The same through Emberbox's API. In `rest` seconds between two steps the pool fills and memory is merged.

    Args:
        bare_resume: what measures the floor of a sandbox's resume; every other sandbox goes to it.
    """
    found: dict[str, list[float]] = {"create": [], "node's part": [], "pause": [], "resume": [], "bare resume": []}
    for number in range(runs if bare_resume is None else 2 * runs):
        time.sleep(rest)
        made, seconds = api.create()
        sandbox = made["sandboxID"]
        found["create"].append(seconds)
        found["node's part"].append(_of_the_node(settings, sandbox))
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
                alive.append(api.create()[0]["sandboxID"])
            times = []
            for _ in range(samples):
                made, seconds = api.create()
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
    source: str = api.create()[0]["sandboxID"]
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


def _of_the_node(settings: Settings, sandbox: str) -> float:
    """Seconds that the node took to make a sandbox, from its log."""
    for line in reversed((settings.data_dir / "logs" / "node.log").read_text().splitlines()):
        if sandbox in line and (entry := json.loads(line))["event"] == "sandbox.created":
            return float(entry["ms"]) / 1000
    raise RuntimeError(f"the node's log does not say that it created {sandbox}")


def _fork(api: Api, source: str, count: int) -> list[str]:
    answers = api.ask("POST", f"/sandboxes/{source}/fork", {"count": count, "timeout": 3600})
    failed = [answer["error"] for answer in answers if not answer.get("sandbox")]
    if failed:
        raise RuntimeError(f"{len(failed)} of {count} forks failed: {failed[0]}")
    return [answer["sandbox"]["sandboxID"] for answer in answers]


def idle_machine(api: Api, settings: Settings) -> tuple[float, set[int]]:
    """Of the Firecracker of a sandbox which nobody has used yet: MiB of its own, and the processors it may use."""
    sandbox = api.create()[0]["sandboxID"]
    try:
        pid = machine_pid(settings, sandbox)
        return written_mib(pid), os.sched_getaffinity(pid)
    finally:
        api.ask("DELETE", f"/sandboxes/{sandbox}")


def written_mib(pid: int) -> float:
    """What it has written, in MiB. Pages of a template's memory that nobody else maps just now are not its own."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


def measure(args: argparse.Namespace) -> Result:
    settings = Settings()
    api = run_here()
    ours(api, settings, 1, rest=args.rest)  # makes the template's memory when there is none, and warms every cache
    template = _template(settings)
    work = settings.node_dir / "bench"
    firecracker = settings.firecracker or settings.node_dir / "firecracker" / "firecracker"

    def bare_resume(sandbox: str) -> float:
        (directory,) = settings.node_dir.glob(f"saved/{sandbox}-*")
        return floor_of_paused(SavedMachine(directory, template.layers), firecracker, work)

    def bare_many(count: int, processors: set[int]) -> float:
        return floor_of_many(template, firecracker, work, count, processors)

    try:
        bare = floor(template, firecracker, work, args.runs)
        bare_memory = percentile(bare.pop("memory"), 0.5)
        through = ours(api, settings, args.runs, args.rest, bare_resume)
        crowd_rows = _crowd_rows(api, settings, bare_memory, bare_many) if args.crowd else []
    finally:
        subprocess.run(["rm", "-rf", str(work)], check=True)
    bare["bare pause"] = bare.pop("pause")
    middle = {name: percentile(values, 0.5) for name, values in {**bare, **through}.items()}
    late = {f"{name} p95": percentile(values, 0.95) for name, values in through.items()}
    details: dict[str, float | int | str] = {
        name: f"{value * 1000:.0f} ms" for name, value in {**middle, **late}.items()
    }
    whole = middle["whole"]
    pooled = args.rest > 0 and settings.warm_max > 0
    rows = [
        Row("create / bare restore", middle["create"] / whole, "x", 0.75 if pooled else 1.4, details=details),
        Row(
            "the node's part of a create / bare restore",
            middle["node's part"] / whole,
            "x",
            0.5 if pooled else None,
        ),
        Row("resume / bare restore of what was paused", middle["resume"] / middle["bare resume"], "x", 1.4),
        Row("resume / bare restore of the template", middle["resume"] / whole, "x"),
        Row(
            f"pause with {DIRTIED_MIB} MiB dirtied / bare diff of as much",
            middle["pause"] / middle["bare pause"],
            "x",
            1.5,
        ),
        *_absolute_rows(middle, pooled=pooled),
    ]
    start = "from the pool" if pooled else "pool empty"
    return Result(f"Firecracker sandboxes against a bare restore ({start})", [*rows, *crowd_rows])


def _absolute_rows(middle: Mapping[str, float], *, pooled: bool) -> list[Row]:
    """Milliseconds, which say something where KVM is the processor's own."""
    target = None if emulated() else 25.0 if pooled else 60.0
    return [
        Row("POST /sandboxes", middle["create"] * 1000, "ms", target),
        *(Row(name, middle[name] * 1000, "ms") for name in ("resume", "pause")),
    ]


def _crowd_rows(
    api: Api, settings: Settings, bare_memory: float, bare_many: Callable[[int, set[int]], float]
) -> list[Row]:
    own, processors = idle_machine(api, settings)
    among = crowd(api, CROWD, samples=3)
    several = forks(api, FORKS)
    few, many = FORKS
    bare = {count: bare_many(count, processors) for count in FORKS}
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
        Row(
            f"{many} bare restores at once / {few}",
            bare[many] / bare[few],
            "x",
            details={f"{count} restores": f"{seconds * 1000:.0f} ms" for count, seconds in bare.items()},
        ),
    ]


def _template(settings: Settings) -> SavedMachine:
    """The newest memory of a template on this node."""
    found = sorted(settings.node_dir.glob("memories/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise RuntimeError("no template has its memory saved on this node; does it run the firecracker runtime?")
    directory = found[-1].parent
    build_id = re.match(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", directory.name)
    if build_id is None:
        raise RuntimeError(f"{directory} does not begin with the ID of a build")
    record = json.loads((settings.node_dir / "builds" / f"{build_id[0]}.json").read_text())
    layers = [path for digest in record["layers"] for path in (settings.node_dir / "layers").glob(f"{digest}.*")]
    return SavedMachine(directory, tuple(layers))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=8, help="machines measured each way (default: %(default)s)")
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        help="seconds between steps, in which the pool fills; with EMBERBOX_WARM_MAX=0 there is none",
    )
    parser.add_argument(
        "--crowd", action="store_true", help="also memory, creates among many sandboxes, and many forks (minutes)"
    )


if __name__ == "__main__":
    raise SystemExit(main(measure, options=options))
