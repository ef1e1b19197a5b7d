"""Building a shipped recipe: Debian's packages into a folder (mmdebstrap), the folder into a layer (EROFS).

What a recipe gives is kept in `settings.image_cache_dir` under the hash of everything that went in, so that a second
data directory on the host does not build again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import structlog

from emberbox.images.errors import BuildFailed, ImageError
from emberbox.images.host_network import HostNetwork, install_certificates, read_host_network
from emberbox.images.layers import Layer, LayerStore, file_digest, link_or_copy
from emberbox.images.recipes import Recipe, load_recipe
from emberbox.settings import Settings

log = structlog.get_logger("emberbox.images")

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction (0..1) of the whole."""

_BUILD_SECONDS = 3600.0
_TAIL_LINES = 12
_FORM = 2
"""Raised when the same recipe begins to give another layer, so that the cache does not give the old one."""

# What mmdebstrap says, what that means for people, and how far the whole is then (measured on a build of `base`).
_STAGES = (
    ("running apt-get update", "Reading package lists", 0.02),
    ("downloading packages with apt", "Downloading the first packages", 0.06),
    ("extracting archives", "Unpacking the first packages", 0.10),
    ("installing essential packages", "Installing the system", 0.14),
    ("installing remaining packages", "Installing packages", 0.25),
    ("cleaning package lists", "Cleaning up", 0.88),
)
_SETTING_UP = ("Setting up the user", 0.90)
_PACKING = ("Packing the layer", 0.92)


@dataclass(frozen=True, slots=True)
class Built:
    """What a recipe gave."""

    layers: tuple[str, ...]
    """Digests, lowest first."""
    size_bytes: int
    env: dict[str, str] = field(default_factory=dict)
    default_user: str = "user"
    default_workdir: str = "/home/user"
    key: str = ""
    """Hash of everything that went in."""


async def build_base(
    layers_dir: Path, settings: Settings, progress: Progress, *, name: str = "base", fresh: bool = False
) -> Built:
    """Make the layer of a shipped recipe, or find it in the cache.

    Args:
        fresh: build even when the cache has it, for newer packages.

    Raises:
        RecipeError: the recipe is missing or wrong.
        BuildFailed: a step failed; the message has the end of its output.
        ImageError: the layer could not be packed or kept.
    """
    recipe, host, key = await asyncio.to_thread(_ingredients, settings, name)
    store = LayerStore(layers_dir)
    cache = _Cache(settings.image_cache_dir)
    if not fresh:
        built = await cache.find(key, store)
        if built is not None:
            progress("Found in the image cache", 1.0)
            return built
    await asyncio.to_thread(layers_dir.mkdir, mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".build-", dir=layers_dir)))
        root = work / "root"
        await _bootstrap(recipe, work, root, progress)
        progress(*_SETTING_UP)
        await _customize(recipe, host, root)
        progress(*_PACKING)
        layer = await _pack(store, root, recipe.debian.source_date_epoch)
        await asyncio.to_thread(shutil.rmtree, root)
    built = Built(
        layers=(layer.digest,),
        size_bytes=layer.size_bytes,
        env={**recipe.env, **host.env},
        default_user=recipe.template.default_user,
        default_workdir=recipe.template.default_workdir,
        key=key,
    )
    await cache.keep(built, store)
    progress("Done", 1.0)
    log.info("image.built", recipe=name, layer=layer.digest, size_bytes=layer.size_bytes)
    return built


def base_key(settings: Settings, name: str = "base") -> str:
    """The `key` that a build of a recipe would have now; reads files.

    Raises:
        RecipeError: the recipe is missing or wrong.
    """
    return _ingredients(settings, name)[2]


def _ingredients(settings: Settings, name: str) -> tuple[Recipe, HostNetwork, str]:
    """What goes into a build, and its key."""
    recipe = load_recipe(name)
    host = read_host_network() if settings.inherit_host_network else HostNetwork()
    return recipe, host, _key(recipe, host)


def _key(recipe: Recipe, host: HostNetwork) -> str:
    content = f"{recipe.content_hash[:24]}-{host.fingerprint()[:12]}"
    return f"{recipe.name}-{platform.machine()}-{_FORM}-{content}"


async def _bootstrap(recipe: Recipe, work: Path, root: Path, progress: Progress) -> None:
    debian = recipe.debian
    sources = [f"deb {debian.mirror} {debian.suite} {' '.join(debian.components)}"]
    sources.append(f"deb {debian.mirror} {debian.suite}-updates {' '.join(debian.components)}")
    if debian.security_mirror:
        sources.append(f"deb {debian.security_mirror} {debian.suite}-security {' '.join(debian.components)}")
    argv: list[str | Path] = [
        "mmdebstrap",
        "--mode=root",
        "--format=directory",
        "--variant=minbase",
        f"--keyring={debian.keyring}",
        f"--components={','.join(debian.components)}",
        '--aptopt=Acquire::Languages "none"',
        '--aptopt=Acquire::Retries "3"',
        "--aptopt=APT::Install-Recommends false",
        *(f"--dpkgopt={option}" for option in _dpkg_options(recipe)),
        f"--include={','.join(debian.packages)}",
        debian.suite,
        root,
        *sources,
    ]
    environment = _environment(SOURCE_DATE_EPOCH=str(debian.source_date_epoch), TMPDIR=str(work))
    progress("Starting", 0.0)
    try:
        await _stream([str(word) for word in argv], environment, _report(progress))
    except FileNotFoundError as error:
        raise BuildFailed("mmdebstrap is not installed; `apt install mmdebstrap` (see `emberbox doctor`)") from error


def _dpkg_options(recipe: Recipe) -> list[str]:
    options = []
    for rule in recipe.exclude:
        options.append(f"path-exclude={rule.path}")
        if rule.keep:
            options.append(f"path-include={rule.keep}")
    return options


async def _customize(recipe: Recipe, host: HostNetwork, root: Path) -> None:
    """The recipe's script, then what the host adds."""
    await _stream([str(recipe.customize), str(root)], _environment(), lambda _: None)
    await asyncio.to_thread(_add_host_files, host, root)
    if host.certificates:
        await _stream(["chroot", str(root), "update-ca-certificates"], _environment(), lambda _: None)


def _add_host_files(host: HostNetwork, root: Path) -> None:
    for name, text in host.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if host.env:
        # For programs that get no environment from Emberbox: cron, sudo, ssh.
        (root / "etc/environment").write_text("".join(f"{k}={v}\n" for k, v in sorted(host.env.items())))
    install_certificates(root, host.certificates)


def _environment(**more: str) -> dict[str, str]:
    """Ours, without what would leak from the building shell into the image."""
    leaks = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD", "LD_LIBRARY_PATH")
    return {**{k: v for k, v in os.environ.items() if k not in leaks}, "LC_ALL": "C.UTF-8", **more}


async def _pack(store: LayerStore, root: Path, newest: int) -> Layer:
    await asyncio.to_thread(_clamp_times, root, newest)
    return await store.pack(root)


def _clamp_times(root: Path, newest: int) -> None:
    """Give everything newer than `newest` (seconds since 1970) that date.

    Older dates stay: Python compares the date of a module with the one in its compiled file.
    """
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files, "."):
            path = os.path.join(folder, name)
            if os.lstat(path).st_mtime > newest:
                os.utime(path, (newest, newest), follow_symlinks=False)


class _Cache:
    """Finished builds of this host, each a layer file and a description."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    async def find(self, key: str, store: LayerStore) -> Built | None:
        """The build of this key, its layers in the store; None when the cache does not have it whole."""
        try:
            data = json.loads((self.directory / f"{key}.json").read_text())
            built = Built(**{**data, "layers": tuple(data["layers"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            log.warning("image.cache_entry_unreadable", key=key, error=str(error))
            return None
        for digest in built.layers:
            if store.path(digest) is not None:
                continue
            source = self.directory / f"{digest}.erofs"
            if not source.is_file() or await asyncio.to_thread(file_digest, source) != digest:
                log.warning("image.cache_entry_damaged", key=key, layer=digest)
                return None
            await store.take_copy(source)
        return built

    async def keep(self, built: Built, store: LayerStore) -> None:
        """Remember a build. A cache that cannot be written costs the next build time, nothing else."""
        try:
            await asyncio.to_thread(self._keep, built, store)
        except OSError as error:
            log.warning("image.cache_not_written", directory=str(self.directory), error=str(error))

    def _keep(self, built: Built, store: LayerStore) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for digest in built.layers:
            source, target = store.path(digest), self.directory / f"{digest}.erofs"
            if source is None:
                raise ImageError(f"layer {digest[:12]} is not in the store")
            if not target.exists():
                draft = target.with_suffix(f".{os.getpid()}.part")
                try:
                    link_or_copy(source, draft)
                    draft.rename(target)
                finally:
                    draft.unlink(missing_ok=True)
        entry = self.directory / f"{built.key}.json"
        draft = entry.with_suffix(f".{os.getpid()}.part")
        draft.write_text(json.dumps(asdict(built), indent=1))
        draft.rename(entry)


def _report(progress: Progress) -> Callable[[str], None]:
    def line(text: str) -> None:
        for words, stage, fraction in _STAGES:
            if words in text:
                progress(stage, fraction)

    return line


async def _stream(argv: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
    """Run a build command at low priority, handing on what it says; killed with its children on cancellation."""
    process = await asyncio.create_subprocess_exec(
        "nice",
        "-n",
        "10",
        *argv,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        limit=1024 * 1024,
    )
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        async with asyncio.timeout(_BUILD_SECONDS):
            async for raw in process.stdout:
                text = raw.decode(errors="replace").rstrip()
                last.append(text)
                on_line(text)
            await process.wait()
    except TimeoutError:
        raise BuildFailed(f"{argv[0]} ran longer than {_BUILD_SECONDS:g} s and was killed") from None
    finally:
        if process.returncode is None:
            # SIGTERM first: mmdebstrap unmounts what it mounted.
            for sig, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sig)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), seconds)
                    break
    if process.returncode != 0:
        tail = "\n".join(last)
        raise BuildFailed(f"{argv[0]} ended with exit code {process.returncode}:\n{tail}")
