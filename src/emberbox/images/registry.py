"""Asking registries and copying images from them, by skopeo.

Every call has a folder of its own with the credentials (0600) and the node's settings of registries, removed at its
end; nothing secret is on a command line or in the environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emberbox.commands import CommandFailed, CommandTimedOut, run
from emberbox.images.credentials import Credentials, auth_file
from emberbox.images.ecr import ecr_login
from emberbox.images.errors import ImageError
from emberbox.images.references import Reference, host_architecture

MIB = 1024 * 1024

_ASK_SECONDS = 60.0
_COPY_SECONDS = 3600.0
_POLL_SECONDS = 0.5
_INDEXES = (
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.index.v1+json",
)

# What skopeo says, and what that means for people.
_REFUSED = "refused"
_MEANINGS = (
    (
        r"toomanyrequests|too many requests",
        "the registry's rate limit is reached; give credentials or try again later",
    ),
    (
        r"gave HTTP response to HTTPS client",
        "the registry speaks plain HTTP; name it in EMBERBOX_INSECURE_REGISTRIES",
    ),
    (
        r"x509:|tls: ",
        "the registry's certificate is not trusted; add its authority to this host, or name the registry in "
        "EMBERBOX_INSECURE_REGISTRIES",
    ),
    (
        r"manifest unknown|name unknown|manifest for .* not found|repository .* not found|404 \(Not Found\)",
        "it does not exist",
    ),
    (
        r"invalid username/password|incorrect username or password|unauthorized: authentication failed",
        "the registry refused the credentials",
    ),
    (r"unauthorized|authentication required|denied|403 \(Forbidden\)|401 \(Unauthorized\)", _REFUSED),
    (r"no such host|server misbehaving|name resolution|lookup .* on ", "the registry's name does not resolve"),
    (
        r"connection refused|i/o timeout|no route to host|network is unreachable|deadline exceeded|"
        r"TLS handshake timeout|EOF$",
        "the registry cannot be reached",
    ),
    (r"digest did not match|does not match digest", "what the registry sent is not what its manifest says"),
    (r"no space left on device", "this node's disk is full"),
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One architecture's image, as its registry describes it."""

    digest: str
    """sha256:<hex>"""
    compressed_bytes: int
    """Of all layers."""


class Registry:
    """Calls to the registry of one image, with one set of credentials; from `registry`."""

    def __init__(self, reference: Reference, auth: Path, config: Path, has_credentials: bool, limit_mb: int) -> None:
        self._reference = reference
        self._auth = auth
        self._config = config
        self._has_credentials = has_credentials
        self._limit = limit_mb

    async def manifest(self) -> Manifest:
        """Look up the image for this host's architecture.

        Raises:
            ImageError: it does not exist, is not for this architecture, or the registry refuses or does not answer.
        """
        digest, found = await self._raw(self._reference)
        if found.get("mediaType") in _INDEXES or "manifests" in found:
            digest = self._choose(found)
            digest, found = await self._raw(self._reference.at(digest))
        layers = found.get("layers")
        if not isinstance(layers, list):
            raise ImageError(f"image '{self._reference}' has an old kind of manifest; push it again in OCI's format")
        size = sum(int(layer.get("size", 0)) for layer in layers)
        if size > self._limit * MIB:
            raise self._too_large(size)
        return Manifest(digest, size)

    async def copy(self, manifest: Manifest, into: Path, progress: Callable[[float], None]) -> None:
        """Copy the image to a new OCI layout in `into`, tagged `image`.

        Raises:
            ImageError
        """
        source = f"docker://{self._reference.at(manifest.digest)}"
        # Layers in gzip stay as they are; others (zstd) are compressed anew, for umoci before 0.5 knows gzip alone.
        words = ("--quiet", "--dest-compress-format", "gzip", source, f"oci:{into}:image")
        work = asyncio.create_task(self._skopeo("copy", *words, seconds=_COPY_SECONDS))
        try:
            while not work.done():
                await asyncio.wait((work,), timeout=_POLL_SECONDS)
                size = await asyncio.to_thread(folder_bytes, into)
                # A registry may send more than the manifest says.
                if size > self._limit * MIB + MIB:
                    raise self._too_large(size)
                progress(min(1.0, size / max(1, manifest.compressed_bytes)))
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _raw(self, reference: Reference) -> tuple[str, dict[str, Any]]:
        data = await self._skopeo("inspect", "--raw", f"docker://{reference}", seconds=_ASK_SECONDS)
        try:
            found = json.loads(data)
        except ValueError as error:
            raise ImageError(f"image '{reference}' has a manifest that cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise ImageError(f"image '{reference}' has a manifest that cannot be read")
        return f"sha256:{hashlib.sha256(data).hexdigest()}", found

    def _choose(self, index: Mapping[str, Any]) -> str:
        wanted = host_architecture()
        offered = []
        for entry in index.get("manifests", ()):
            place = entry.get("platform", {})
            if place.get("os", "linux") == "linux" and place.get("architecture") == wanted:
                return str(entry["digest"])
            offered.append(f"{place.get('os', '?')}/{place.get('architecture', '?')}")
        known = ", ".join(sorted({word for word in offered if "unknown" not in word})) or "nothing"
        raise ImageError(f"image '{self._reference}' is not there for linux/{wanted}; there is: {known}")

    def _too_large(self, size: int) -> ImageError:
        return ImageError(
            f"image '{self._reference}' has {size // MIB} MiB compressed, and {self._limit} MiB are allowed "
            "(EMBERBOX_IMAGE_MAX_COMPRESSED_MB)"
        )

    async def _skopeo(self, verb: str, *words: str, seconds: float) -> bytes:
        auth = ("--src-authfile" if verb == "copy" else "--authfile", self._auth)
        argv: tuple[str | Path, ...] = (
            "skopeo",
            "--insecure-policy",
            "--registries-conf",
            self._config,
            verb,
            *auth,
            *words,
        )
        try:
            return (await run(argv, timeout=seconds, dies_with_us=True)).stdout
        except CommandTimedOut as error:
            raise ImageError(f"the registry of '{self._reference}' did not answer within {seconds:g} s") from error
        except CommandFailed as error:
            if error.returncode is None:
                raise ImageError("skopeo is not installed; `apt install skopeo` (see `emberbox doctor`)") from error
            raise ImageError(f"image '{self._reference}': {self._meaning(error.stderr)}") from error

    def _meaning(self, said: str) -> str:
        for pattern, meaning in _MEANINGS:
            if re.search(pattern, said, re.IGNORECASE):
                if meaning is not _REFUSED:
                    return meaning
                if self._has_credentials:
                    return "the registry refused the credentials, or they do not open this image"
                return "it does not exist, or it is private and needs credentials"
        last = said.strip().splitlines()[-1:] or ["it could not be had"]
        return re.sub(r'^time=\S+ level=\w+ msg="?', "", last[0]).rstrip('"')[:500]


@contextlib.asynccontextmanager
async def registry(
    reference: Reference,
    credentials: Credentials | None,
    work_dir: Path,
    *,
    mirrors: Mapping[str, str],
    insecure: tuple[str, ...],
    limit_mb: int,
) -> AsyncIterator[Registry]:
    """
    Args:
        mirrors: where to look first, by registry.
        insecure: registries (and mirrors) that speak plain HTTP or have a certificate that nobody signed.
        limit_mb: largest image, compressed.
    """
    username, password = await _login(reference, credentials)
    with auth_file(work_dir, reference.registry, username, password) as auth:
        config = work_dir / f"{auth.name}.registries.conf"
        try:
            await asyncio.to_thread(config.write_text, registries_conf(reference.registry, mirrors, insecure))
            yield Registry(reference, auth, config, bool(username), limit_mb)
        finally:
            config.unlink(missing_ok=True)


async def _login(reference: Reference, credentials: Credentials | None) -> tuple[str, str]:
    if credentials is None:
        return "", ""
    match credentials.kind:
        case "gcp":
            return "_json_key", credentials.gcp_service_account_json
        case "aws":
            return await ecr_login(credentials)
        case "registry" | "":
            return credentials.username, credentials.password
    raise ImageError(f"credentials of the kind '{credentials.kind}' are unknown; use registry, aws or gcp")


def registries_conf(name: str, mirrors: Mapping[str, str], insecure: tuple[str, ...]) -> str:
    """containers-registries.conf(5) for one registry."""

    def flag(location: str) -> str:
        return "true" if location.partition("/")[0] in insecure or location in insecure else "false"

    lines = ["unqualified-search-registries = []", 'short-name-mode = "disabled"', "[[registry]]"]
    lines += [f"location = {json.dumps(name)}", f"insecure = {flag(name)}"]
    if mirror := mirrors.get(name):
        lines += ["[[registry.mirror]]", f"location = {json.dumps(mirror)}", f"insecure = {flag(mirror)}"]
    return "\n".join(lines) + "\n"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, which may change meanwhile; blocks.

    A file counts once, also when it is renamed into a place that is looked at later, as skopeo does with each layer.
    """
    sizes: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                sizes[facts.st_ino] = facts.st_size
    return sum(sizes.values())
