"""What one Emberbox has on this host, and its end. After `emberbox down` it must be nothing."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass, fields
from pathlib import Path

from tests.clients.support import instance
from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import Api
from tests.clients.support.timing import seconds


@dataclass(frozen=True)
class Holdings:
    """Everything host-global that carries an instance's tag or lies in its data directory."""

    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    cgroups: tuple[str, ...]
    processes: tuple[str, ...]
    links: tuple[str, ...]
    tables: tuple[str, ...]
    loops: tuple[str, ...]
    machines: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value:
                lines.append(f"{each.name} ({len(value)}): {', '.join(value[:12])}")
        return "\n".join(lines) or "nothing"

    def empty(self) -> bool:
        return not any(getattr(self, each.name) for each in fields(self))


def holdings(emberbox: Emberbox, tag: str) -> Holdings:
    assert emberbox.data_dir, "only an Emberbox on this host can be counted"
    data_dir = emberbox.data_dir
    return Holdings(
        namespaces=_namespaces(tag),
        mounts=_mounts(tag, data_dir),
        cgroups=_cgroups(tag),
        processes=_processes(tag, data_dir),
        links=_links(tag),
        tables=_tables(tag),
        loops=_loops(data_dir),
        machines=_machines(Path(data_dir)),
    )


def instance_tag(emberbox: Emberbox) -> str:
    from emberbox.settings import Settings

    return Settings(data_dir=Path(emberbox.data_dir or "")).instance


def end_and_count(emberbox: Emberbox, *, all_killed: bool) -> None:
    """End an Emberbox that the tests started and fail if anything of it is left on the host.

    `all_killed`: the tests had to kill every sandbox they made.
    """
    tag = instance_tag(emberbox)
    api = Api(emberbox)
    forgotten = [each["sandboxID"] for each in api.list_all()]
    for sandbox_id in forgotten:
        api.delete(f"/sandboxes/{sandbox_id}")
    running = holdings(emberbox, tag)
    # The check must be able to fail: an instance that runs does have processes.
    assert running.processes, "the leak check does not see the running instance"

    emberbox.down()

    # The kernel takes namespaces and links apart, and reaps processes, in its own time.
    deadline = time.monotonic() + seconds(30)
    while not (left := holdings(emberbox, tag)).empty() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left.empty(), f"left on the host after `emberbox down`:\n{left}"
    instance.remove(emberbox)
    assert not (all_killed and forgotten), f"sandboxes that no test killed: {forgotten}"


def _namespaces(tag: str) -> tuple[str, ...]:
    names = []
    for folder in (Path("/run/netns"), Path("/var/run/netns")):
        if folder.is_dir():
            names += [each.name for each in folder.iterdir() if tag in each.name]
    return tuple(sorted(set(names)))


def _mounts(tag: str, data_dir: str) -> tuple[str, ...]:
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].replace("\\040", " ")
        if point.startswith(data_dir) or tag in point:
            points.append(point)
    return tuple(sorted(points))


def _cgroups(tag: str) -> tuple[str, ...]:
    found = []
    for path, folders, _ in os.walk("/sys/fs/cgroup"):
        for folder in folders:
            if tag in folder:
                found.append(os.path.join(path, folder))
    return tuple(sorted(found))


def _processes(tag: str, data_dir: str) -> tuple[str, ...]:
    found = []
    for each in Path("/proc").iterdir():
        if not each.name.isdigit() or int(each.name) == os.getpid():
            continue
        try:
            command = (each / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            variables = (each / "environ").read_bytes().split(b"\0")
            groups = (each / "cgroup").read_text()
        except OSError:
            continue
        # Its roles know the data directory by their environment, their helpers by the command line; machines are in
        # a control group of the instance.
        if data_dir in command or f"EMBERBOX_DATA_DIR={data_dir}".encode() in variables or tag in groups:
            found.append(f"{each.name} {command[:80]}")
    return tuple(sorted(found))


def _links(tag: str) -> tuple[str, ...]:
    return tuple(sorted(each.name for each in Path("/sys/class/net").iterdir() if tag in each.name))


def _tables(tag: str) -> tuple[str, ...]:
    done = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return ()
    entries = json.loads(done.stdout or '{"nftables": []}')["nftables"]
    names = [f"{entry['table']['family']} {entry['table']['name']}" for entry in entries if "table" in entry]
    return tuple(sorted(name for name in names if tag in name))


def _loops(data_dir: str) -> tuple[str, ...]:
    found = []
    for device in Path("/sys/block").glob("loop*"):
        try:
            backing = (device / "loop" / "backing_file").read_text().strip()
        except OSError:
            continue
        if backing.startswith(data_dir):
            found.append(f"{device.name} {backing}")
    return tuple(sorted(found))


def _machines(data_dir: Path) -> tuple[str, ...]:
    folder = data_dir / "node" / "machines"
    return tuple(sorted(each.name for each in folder.iterdir())) if folder.is_dir() else ()
