"""A real registry on loopback (Debian's docker-registry), and images to put into it.

Images are written as OCI layouts, layer by layer, so that a test can also have ones that no tool would make.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from emberbox.images.references import host_architecture
from tests.support.ports import free_ports

PROGRAMS = (
    *("bash", "sh", "cat", "chmod", "chown", "cp", "cut", "date", "dirname", "basename", "echo", "env", "false"),
    *("find", "grep", "gzip", "head", "id", "ln", "ls", "mkdir", "mv", "printf", "pwd", "readlink", "rm", "sed"),
    *("seq", "sleep", "sort", "stat", "tail", "tar", "test", "touch", "tr", "true", "uname", "wc"),
)
"""What `tiny_files` holds; all of it also without a package manager."""


_ZSTD = b"\x28\xb5\x2f\xfd"


def missing() -> str:
    """What this machine lacks for a registry; empty when nothing."""
    tools = ("docker-registry", "skopeo", "umoci", "htpasswd", "zstd")
    return ", ".join(tool for tool in tools if shutil.which(tool) is None)


@dataclass(frozen=True)
class File:
    """One entry of a layer: a file, or a folder, link or device by `kind`."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    kind: bytes = tarfile.REGTYPE
    target: str = ""
    device: tuple[int, int] = (0, 0)


def folder(name: str, mode: int = 0o755, uid: int = 0) -> File:
    return File(name, mode=mode, uid=uid, kind=tarfile.DIRTYPE)


def symlink(name: str, target: str) -> File:
    return File(name, mode=0o777, kind=tarfile.SYMTYPE, target=target)


def hardlink(name: str, target: str) -> File:
    return File(name, kind=tarfile.LNKTYPE, target=target)


def layer(files: Sequence[File]) -> bytes:
    """A gzipped tar of these entries, in this order, whatever they are."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            info = tarfile.TarInfo(file.name)
            info.type, info.mode, info.uid, info.gid = file.kind, file.mode, file.uid, file.uid
            info.devmajor, info.devminor = file.device
            info.linkname, info.size, info.mtime = file.target, len(file.data), 1_600_000_000
            tar.addfile(info, io.BytesIO(file.data))
    return gzip.compress(raw.getvalue(), 1, mtime=0)


@cache
def tiny_files() -> tuple[File, ...]:
    """A root with bash and the usual commands, copied from this machine: some 15 MB, and no package manager."""
    found: dict[str, File] = {}
    links = {"bin": "usr/bin", "sbin": "usr/sbin", "lib": "usr/lib", "lib64": "usr/lib64"}
    for name in ("usr", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "root", "home"):
        found[name] = folder(name)
    for name in ("tmp", "var", "var/tmp"):
        found[name] = folder(name, 0o1777 if name != "var" else 0o755)
    for name, target in links.items():
        found[name] = symlink(name, target)
    for program in PROGRAMS:
        path = shutil.which(program)
        if path is None:
            continue
        found[f"usr/bin/{program}"] = File(f"usr/bin/{program}", Path(path).read_bytes(), 0o755)
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for word in listed.split():
            if word.startswith("/") and Path(word).is_file():
                inside = word.lstrip("/")
                inside = inside if inside.startswith("usr/") else f"usr/{inside}"
                parent = Path(inside).parent
                for place in [*reversed(parent.parents), parent]:
                    if str(place) != ".":
                        found.setdefault(str(place), folder(str(place)))
                found.setdefault(inside, File(inside, Path(word).read_bytes(), 0o755))
    found["etc/passwd"] = File("etc/passwd", b"root:x:0:0:root:/root:/bin/bash\n")
    found["etc/group"] = File("etc/group", b"root:x:0:\n")
    return tuple(found.values())


def debian_layer() -> bytes:
    """A minimal Debian with apt and nothing else, as its own image has it; made once for this machine.

    Raises:
        subprocess.CalledProcessError: Debian's mirror cannot be reached.
    """
    path = Path("/var/cache/emberbox/tests/debian-bookworm.tar.gz")
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / "root.tar"
            source = "deb http://deb.debian.org/debian bookworm main"
            argv = ["nice", "-n", "10", "mmdebstrap", "--variant=apt", "--mode=root", "bookworm", str(made), source]
            subprocess.run(argv, check=True, capture_output=True, timeout=600)
            packed = Path(place) / "root.tar.gz"
            packed.write_bytes(gzip.compress(made.read_bytes(), 1, mtime=0))
            packed.rename(path)
    return path.read_bytes()


def in_zstd(layer: bytes) -> bytes:
    """The same layer, compressed with zstd."""
    return subprocess.run(["zstd", "-qc"], input=gzip.decompress(layer), capture_output=True, check=True).stdout


def _unpacked(layer: bytes) -> bytes:
    if layer.startswith(_ZSTD):
        return subprocess.run(["zstd", "-qdc"], input=layer, capture_output=True, check=True).stdout
    return gzip.decompress(layer)


def write_layout(
    place: Path, layers: Sequence[bytes], *, config: Mapping[str, Any] | None = None, arch: str = ""
) -> str:
    """Write an OCI layout with one image, tagged `image`; returns the digest of its manifest."""
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    described = {
        "architecture": arch or host_architecture(),
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(_unpacked(data)).hexdigest()}" for data in layers],
        },
        "history": [{"created_by": "tests"} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(described).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [
            blob(data, f"application/vnd.oci.image.layer.v1.tar+{'zstd' if data.startswith(_ZSTD) else 'gzip'}")
            for data in layers
        ],
    }
    entry = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "image"}
    (place / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (place / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return str(entry["digest"])


class LocalRegistry:
    """A registry that runs; from `local_registry`."""

    def __init__(self, address: str, host: str, user: str, password: str, blobs: Path) -> None:
        self.blobs = blobs
        """Where it keeps what was pushed, one folder a digest."""
        self._address = address
        self.host = host
        """What image names begin with, and what `insecure_registries` must list: `127.0.0.1:<port>`, or as it is seen
        from elsewhere."""
        self.user = user
        self.password = password

    def name(self, repository: str, tag: str = "latest") -> str:
        return f"{self.host}/{repository}:{tag}"

    def push(
        self,
        repository: str,
        layers: Sequence[bytes],
        *,
        tag: str = "latest",
        config: Mapping[str, Any] | None = None,
        arch: str = "",
    ) -> str:
        """Put an image into the registry; returns its name."""
        with tempfile.TemporaryDirectory(prefix="eb-layout-") as place:
            write_layout(Path(place), layers, config=config, arch=arch)
            self.push_layout(Path(place), repository, tag=tag)
        return self.name(repository, tag)

    def push_layout(self, place: Path, repository: str, *, tag: str = "latest") -> None:
        credentials = ["--dest-creds", f"{self.user}:{self.password}"] if self.user else []
        target = f"docker://{self._address}/{repository}:{tag}"
        argv = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *credentials]
        subprocess.run([*argv, f"oci:{place}:image", target], check=True, timeout=300)

    def put(self, path: str, data: bytes, kind: str) -> None:
        """PUT to the registry itself, for what skopeo would not push (indexes, odd manifests)."""
        request = urllib.request.Request(
            f"http://{self._address}{path}", data=data, headers={"Content-Type": kind}, method="PUT"
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            assert answer.status in (200, 201, 202)


@contextlib.contextmanager
def local_registry(*, user: str = "", password: str = "", seen_as: str = "") -> Iterator[LocalRegistry]:
    """Run an empty registry on a free port of loopback; with a user, it asks for that and the password.

    Args:
        seen_as: this machine's name where images are fetched, when that is not here.
    """
    place = Path(tempfile.mkdtemp(prefix="eb-registry-"))
    try:
        auth = ""
        if user:
            made = subprocess.run(
                ["htpasswd", "-niB", user], input=password, capture_output=True, text=True, check=True
            ).stdout
            (place / "htpasswd").write_text(made)
            auth = f"auth:\n  htpasswd:\n    realm: tests\n    path: {place}/htpasswd\n"
        with _running(place, auth) as address:
            host = f"{seen_as}:{address.rpartition(':')[2]}" if seen_as else address
            yield LocalRegistry(address, host, user, password, place / "data/docker/registry/v2/blobs")
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _running(place: Path, auth: str) -> Iterator[str]:
    host = f"127.0.0.1:{free_ports(1)[0]}"
    (place / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {place}/data}}\n"
        f"  delete: {{enabled: true}}\nhttp: {{addr: '{host}'}}\n{auth}"
    )
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(place / "config.yml")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        if not _answers(host, lambda: process.poll() is None):
            raise AssertionError(f"docker-registry does not start: {(place / 'log').read_text()[-2000:]}")
        yield host
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(host: str, alive: Callable[[], bool]) -> bool:
    name, _, port = host.partition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and alive():
        with contextlib.suppress(OSError), socket.create_connection((name, int(port)), timeout=1):
            return True
        time.sleep(0.05)
    return False
