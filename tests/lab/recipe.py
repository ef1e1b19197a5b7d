"""The lab's disk image: a Debian with what Emberbox needs, made once and kept by its recipe's hash.

Stages, each in the cache under the hash of what went into it: the distribution (mmdebstrap), over it what
`make install` fetches (an overlay), over that the working tree, and the ext4 image of all. A changed source file
costs only the last two. Stages run natively, in a chroot: 15 times faster than in the lab, whose CPU is emulated.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emberbox.images.layers import link_or_copy
from emberbox.runtime.firecracker import initramfs, kernel
from tests.support import firecracker as parts

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent

PACKAGES = (
    "busybox-static",
    "ca-certificates",
    "curl",
    "e2fsprogs",
    "erofs-utils",
    "haproxy",
    "iproute2",
    "iputils-ping",
    "kmod",
    "lz4",
    "make",
    "mmdebstrap",
    "nftables",
    "openssh-server",
    "procps",
    "python3",
    "python3-venv",
    "runc",
    "skopeo",
    "umoci",
)

# What the lab host itself loads; Emberbox asks for what else it needs (nftables' parts load on demand).
HOST_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "loop", "overlay", "erofs", "tun", "veth")

# Files that say what `make install` fetches. The last stage runs it again, so the rest may change without them.
INSTALL_INPUTS = ("requirements.txt", "requirements-build.txt", "requirements-dev.txt", "agent/go.mod", "agent/go.sum")

AGENT = Path("agent/build/emberd")

# Ubuntu's releases among the suites. Debian does not have Ubuntu's keys.
UBUNTU = ("noble",)
UBUNTU_MIRROR = "https://archive.ubuntu.com/ubuntu"
UBUNTU_KEYS = (
    "pool/main/u/ubuntu-keyring/ubuntu-keyring_2023.11.28.1_all.deb",
    "36de43b15853ccae0028e9a767613770c704833f82586f28eb262f0311adb8a8",
)

# Part of every stage's hash; count it up when a change of this module changes what the stages hold.
REVISION = "2"

DISK_GIB = 40
KEEP = 2
_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


@dataclass(frozen=True, slots=True)
class LabImage:
    """Everything QEMU needs to boot the lab."""

    kernel: Path
    initrd: Path
    disk: Path


class RecipeError(Exception):
    """The image could not be made."""


class InstallFailed(RecipeError):
    """Emberbox could not be installed on a fresh system: a fault of its installer, unless nothing can be downloaded."""


def cache_dir() -> Path:
    chosen = os.environ.get("EMBERBOX_LAB_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "emberbox" / "lab"


def build(suite: str = "bookworm", *, install: bool = True) -> LabImage:
    """Return the image of this working tree on Debian `suite`, making the stages that the cache lacks.

    Raises:
        RecipeError: a tool is missing or a stage failed.
    """
    _require("mmdebstrap", "mke2fs", "dpkg-deb", "lz4", "git")
    if os.geteuid() != 0:
        raise RecipeError("making the lab's image needs root (chroot, overlay mounts); run it with sudo")
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock"):
        boot = _boot_stage(cache, suite)
        base = _base_stage(cache, suite, boot)
        disk = _disk_stage(cache, base, install=install)
        for used in (boot, base, disk):
            os.utime(used)
        _forget_old(cache)
    return LabImage(kernel=boot / "vmlinuz", initrd=boot / "initrd", disk=disk)


# ---- stages ----


def _boot_stage(cache: Path, suite: str) -> Path:
    """The lab host's kernel, its modules and the initramfs that mounts the disk."""
    stage = cache / f"boot-{_digest(REVISION, suite, *HOST_MODULES, _read('initrd-init.sh'))}"
    if stage.exists():
        return stage
    say("fetching the kernel")
    with _unfinished(stage) as work:
        unpacked = work / "tree"
        unpacked.mkdir()
        tree = kernel.unpack_packages(kernel.fetch_packages(work), unpacked)
        shutil.copy2(tree.vmlinuz, work / "vmlinuz")
        busybox = _busybox(work)
        archive = initramfs.cpio(
            [
                *initramfs.base_entries(),
                initramfs.folder("bin"),
                initramfs.file("bin/busybox", busybox, mode=0o755),
                *initramfs.module_entries(tree, HOST_MODULES),
                initramfs.file("init", _read("initrd-init.sh").encode(), mode=0o755),
            ]
        )
        (work / "initrd").write_bytes(archive)
    return stage


def _base_stage(cache: Path, suite: str, boot: Path) -> Path:
    """The distribution, with the lab's own init and the kernel's modules."""
    texts = [_read(name) for name in ("host-init.sh", "inittab", "sshd_config")]
    stage = cache / f"base-{_digest(REVISION, boot.name, suite, *PACKAGES, *texts)}"
    if stage.exists():
        return stage
    say(f"making the {suite} system ({len(PACKAGES)} packages)")
    with _unfinished(stage) as work:
        root = work / "root"
        _run(
            "mmdebstrap",
            "--mode=root",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            *_sources(suite, root, work),
            log=work / "mmdebstrap.log",
        )
        _install_file(root, "usr/lib/emberbox-lab/host-init", _read("host-init.sh"), 0o755)
        _install_file(root, "usr/lib/emberbox-lab/sshd_config", _read("sshd_config"), 0o644)
        _install_file(root, "etc/inittab", _read("inittab"), 0o644)
        _install_file(root, "etc/hostname", "emberbox-lab\n", 0o644)
        _install_file(root, "etc/hosts", "127.0.0.1 localhost\n127.0.1.1 emberbox-lab\n", 0o644)
        modules = kernel.open_tree(boot / "tree").modules
        shutil.copytree(modules, root / "lib" / "modules" / modules.name, symlinks=True)
        _run("chroot", str(root), "depmod", modules.name)
        if _CA_BUNDLE.exists():
            # The machine may reach the package registries through a proxy with a certificate of its own.
            shutil.copy2(_CA_BUNDLE, root / "etc" / "ssl" / "certs" / _CA_BUNDLE.name)
    return stage


def _sources(suite: str, root: Path, work: Path) -> list[str]:
    """mmdebstrap's last arguments: what to make where, from what."""
    if suite not in UBUNTU:
        return [suite, str(root)]
    name, expected = UBUNTU_KEYS
    package = work / "keys.deb"
    with urllib.request.urlopen(f"{UBUNTU_MIRROR}/{name}", timeout=60) as answer:
        package.write_bytes(answer.read())
    if hashlib.sha256(package.read_bytes()).hexdigest() != expected:
        raise RecipeError(f"{UBUNTU_MIRROR}/{name} is not the file that was expected")
    _run("dpkg-deb", "-x", str(package), str(work / "keys"))
    keyring = work / "keys/usr/share/keyrings/ubuntu-archive-keyring.gpg"
    lines = [f"deb {UBUNTU_MIRROR} {pocket} main universe" for pocket in (suite, f"{suite}-updates")]
    return [f"--keyring={keyring}", suite, str(root), *lines]


def _tools_stage(cache: Path, base: Path, files: list[Path]) -> Path:
    """What `make install` adds to the distribution: an overlay's upper, kept while the lists it installs from stay."""
    inputs = [path for path in files if str(path) in INSTALL_INPUTS]
    stage = cache / f"tools-{_digest(REVISION, base.name, _files_digest(inputs))}"
    if stage.exists():
        return stage
    say("installing Emberbox's tools and packages (make install)")
    with _unfinished(stage) as work:
        with _overlay([base / "root"], work) as root:
            _install_tree(files, root, cache, "tools")
        for name in ("scratch", "merged"):
            shutil.rmtree(work / name)
    return stage


def _disk_stage(cache: Path, base: Path, *, install: bool) -> Path:
    """The ext4 image: the distribution and the installed working tree."""
    files = working_tree_files() if install else []
    disk = cache / f"disk-{_digest(REVISION, base.name, _read('install.sh'), _files_digest(files))}.img"
    if disk.exists():
        return disk
    lowers = [base / "root"]
    if install:
        lowers.insert(0, _tools_stage(cache, base, files) / "upper")
    with _scratch(cache) as work:
        with _overlay(lowers, work) as root:
            if install:
                say(f"installing the working tree ({len(files)} files)")
                _install_tree(files, root, cache, "all")
            say("writing the disk image")
            unfinished = work / "disk.img"
            _run("mke2fs", "-q", "-t", "ext4", "-d", str(root), str(unfinished), f"{DISK_GIB}G")
        unfinished.rename(disk)
    return disk


def _install_tree(files: list[Path], root: Path, cache: Path, what: str) -> None:
    """Put the tree into the image, without what an earlier one left, and run `install.sh` with `what` in it."""
    place = root / "opt" / "emberbox"
    for old in place.glob("[!.]*"):  # .venv and .tools hold what was installed, and stay
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    for path in files:
        target = place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / path, target, follow_symlinks=False)
    _install_file(root, "usr/lib/emberbox-lab/install", _read("install.sh"), 0o755)
    _install_file(root, "usr/lib/emberbox-lab/environment", _read("environment.sh"), 0o644)
    images = _images(cache)
    downloads = cache / "downloads"
    downloads.mkdir(exist_ok=True)
    given = {
        "mnt/images": images,
        "mnt/firecracker": parts.pair().firecracker.parent,
        "root/.cache": downloads,  # of pip and of Go, which both find theirs below HOME
    }
    with _chroot_mounts(root, given):
        command = ("chroot", str(root), "/usr/lib/emberbox-lab/install", what)
        try:
            _try_twice(*command, log=cache / "install.log", env=_registry_environment())
        except RecipeError as error:
            raise InstallFailed(str(error)) from error


def _try_twice(*command: str, log: Path, env: dict[str, str]) -> None:
    """A download may fail once."""
    try:
        _run(*command, log=log, env=env)
    except RecipeError as error:
        say(f"once more: {error}")
        _run(*command, log=log, env=env)


# ---- the working tree ----


def working_tree_files() -> list[Path]:
    """Return the tree's files as git sees them: tracked or new, and not ignored. Paths are relative."""
    listed = subprocess.run(
        ["git", "-C", str(TREE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout.decode()
    paths = sorted({Path(name) for name in listed.split("\0") if name})
    files = [path for path in paths if (TREE / path).is_file()]
    return [*files, AGENT] if _agent_is_built(files) else files


def _agent_is_built(files: list[Path]) -> bool:
    """Whether emberd is newer than all it is made from: then `make` in the image takes it as it is."""
    sources = [path for path in files if path.parts[0] == "agent" or path.name == "__init__.py"]
    agent = TREE / AGENT
    return agent.is_file() and agent.stat().st_mtime > max((TREE / path).stat().st_mtime for path in sources)


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path).encode() + b"\0" + hashlib.sha256((TREE / path).read_bytes()).digest())
        digest.update(b"x" if os.access(TREE / path, os.X_OK) else b"-")
    return digest.hexdigest()


def _images(cache: Path) -> Path:
    """The lab's cache of base layers, with what Emberbox has built on this machine before."""
    images = cache / "images"
    images.mkdir(exist_ok=True)
    own = Path("/var/cache/emberbox")
    for path in own.glob("*.*") if own.is_dir() else ():
        if not (images / path.name).exists():
            link_or_copy(path, images / path.name)
    return images


def _registry_environment() -> dict[str, str]:
    """How package clients on this machine reach their registries; a contributor's proxy settings count inside too."""
    names = {"SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "PIP_INDEX_URL", "GOFLAGS", "GOPROXY", "GOSUMDB"}
    proxies = {"http_proxy", "https_proxy", "no_proxy"}
    kept = {key: value for key, value in os.environ.items() if key in names or key.lower() in proxies}
    return {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "GOMODCACHE": "/root/.cache/go-mod",
        "LC_ALL": "C.UTF-8",
        **kept,
    }


# ---- small helpers ----


def say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


def _read(name: str) -> str:
    return (HERE / name).read_text()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _busybox(work: Path) -> bytes:
    """A static busybox from its package: the machine's own may be linked dynamically."""
    _run("apt-get", "download", "-q", "busybox-static", cwd=work)
    package = next(work.glob("busybox-static_*.deb"))
    unpacked = work / "busybox"
    _run("dpkg-deb", "-x", str(package), str(unpacked))
    found = next(path for path in unpacked.rglob("busybox") if path.is_file() and os.access(path, os.X_OK))
    return found.read_bytes()


def _install_file(root: Path, name: str, text: str, mode: int) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _require(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        raise RecipeError(f"the lab needs {', '.join(missing)}; install them with apt-get and try again")


def _run(*command: str, log: Path | None = None, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    done = subprocess.run(
        ["nice", "-n", "5", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, cwd=cwd, check=False
    )
    if log is not None:
        log.write_bytes(done.stdout)
    if done.returncode != 0:
        tail = done.stdout.decode("utf-8", "replace")[-2000:]
        raise RecipeError(f"'{' '.join(command)}' failed ({done.returncode}):\n{tail}")


@contextlib.contextmanager
def _unfinished(stage: Path) -> Iterator[Path]:
    """A folder that becomes `stage` when the block ends well, and goes away when it does not."""
    work = Path(tempfile.mkdtemp(dir=stage.parent, prefix="work-"))
    work.chmod(0o755)
    try:
        yield work
        work.rename(stage)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder that goes when the block ends, unless something is still mounted in it."""
    work = Path(tempfile.mkdtemp(dir=cache, prefix="work-"))
    try:
        yield work
    finally:
        if unmounted(work):
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _overlay(lowers: list[Path], work: Path) -> Iterator[Path]:
    upper, scratch, merged = (work / name for name in ("upper", "scratch", "merged"))
    for path in (upper, scratch, merged):
        path.mkdir()
    options = f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={scratch}"
    _run("mount", "-t", "overlay", "overlay", "-o", options, str(merged))
    try:
        yield merged
    finally:
        _run("umount", "-R", "-l", str(merged))


@contextlib.contextmanager
def _chroot_mounts(root: Path, given: dict[str, Path]) -> Iterator[None]:
    """Give the chroot /proc, a few device nodes, the machine's resolver and the folders `given`."""
    resolver = root / "etc" / "resolv.conf"
    with contextlib.ExitStack() as undo:
        resolver.unlink(missing_ok=True)
        shutil.copy2("/etc/resolv.conf", resolver)
        undo.callback(resolver.unlink, missing_ok=True)
        for kind, name in (("proc", "proc"), ("tmpfs", "dev"), ("tmpfs", "tmp")):
            _run("mount", "-t", kind, kind, str(root / name))
            undo.callback(_run, "umount", "-l", str(root / name))
        for name, source in given.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            _run("mount", "--bind", str(source), str(root / name))
            undo.callback(_run, "umount", "-l", str(root / name))
        for name, minor in (("null", 3), ("zero", 5), ("full", 7), ("random", 8), ("urandom", 9)):
            os.mknod(root / "dev" / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
            os.chmod(root / "dev" / name, 0o666)
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")):
            os.symlink(target, root / "dev" / name)
        (root / "dev" / "shm").mkdir(mode=0o1777)
        yield


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One build of the image at a time; another waits for it and then finds its stages."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _forget_old(cache: Path) -> None:
    """Keep the newest few of each stage; a disk image alone is over a gigabyte."""
    for kind in ("disk-*", "tools-*", "base-*", "boot-*"):
        stages = sorted(cache.glob(kind), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in stages[KEEP:]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    for work in cache.glob("work-*"):  # left by a build that was killed; nobody else builds while the lock is ours
        if unmounted(work):
            shutil.rmtree(work, ignore_errors=True)


def unmounted(folder: Path) -> bool:
    """Unmount what is on `folder`; True when nothing is mounted there or below any more."""

    def below() -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        points = (line.split()[4] for line in lines)
        return [point for point in points if point == str(folder) or point.startswith(f"{folder}/")]

    for point in sorted(below(), key=len, reverse=True):
        subprocess.run(["umount", "-l", point], check=False, timeout=30)
    return not below()
