"""Names of images, as people write them: `debian:12`, `ghcr.io/me/app:v1`, `localhost:5000/x@sha256:...`."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass

from emberbox.images.errors import ImageError

HUB = "docker.io"

_REGISTRY = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?"
_PATH = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_WHOLE = re.compile(
    rf"(?:(?P<registry>{_REGISTRY})/)?(?P<path>{_PATH})(?::(?P<tag>{_TAG}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x"}


@dataclass(frozen=True, slots=True)
class Reference:
    """A whole name. A digest is stronger than a tag."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}"

    def at(self, digest: str) -> Reference:
        """The same repository's image of this digest."""
        return Reference(self.registry, self.repository, digest=digest)


def parse(text: str) -> Reference:
    """
    Raises:
        ImageError: it is not the name of an image.
    """
    text = text.strip().removeprefix("docker://")
    first, slash, rest = text.partition("/")
    # As Docker has it: the first word is a registry when it looks like a host.
    if not slash or not ("." in first or ":" in first or first == "localhost"):
        first, rest = HUB, text
    match = _WHOLE.fullmatch(f"{first}/{rest}")
    if match is None or match["registry"] is None:
        raise ImageError(f"'{text[:200]}' is not the name of an image such as 'debian:12' or 'ghcr.io/me/app:v1'")
    registry = HUB if match["registry"] in ("index.docker.io", "registry-1.docker.io") else match["registry"]
    path = match["path"]
    if registry == HUB and "/" not in path:
        path = f"library/{path}"
    digest = match["digest"] or ""
    return Reference(registry, path, "" if digest else match["tag"] or "latest", digest)


def host_architecture() -> str:
    """This host's architecture in the words of OCI."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)
