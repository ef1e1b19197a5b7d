"""What sandboxes need from a host that reaches the internet through a TLS-inspecting proxy.

Read here: the host's certificate bundle, its proxy variables, and the addresses in its pip, npm and apt settings.
Secrets are left out: whatever carries a user name, a password or a token is not copied into an image.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

IMAGE_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian's `update-ca-certificates` writes the bundle inside an image."""

_BUNDLES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Ubuntu, Alpine
    Path("/etc/pki/tls/certs/ca-bundle.crt"),  # Fedora, RHEL
    Path("/etc/ssl/ca-bundle.pem"),  # openSUSE
)
_BUNDLE_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
)
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_PIP_FILES = ("/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host")
_NPM_FILES = ("/etc/npmrc", "~/.npmrc")
_NPM_KEYS = ("registry", "strict-ssl", "noproxy", "proxy", "https-proxy")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """Files (path inside the image -> text) and environment variables that an image inherits."""

    certificates: tuple[str, ...] = ()
    """PEM, one a string."""
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Changes with anything that would go into an image."""
        parts = (*self.certificates, *(f"{k}={v}" for k, v in sorted({**self.files, **self.env}.items())))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_host_network(environment: Mapping[str, str] | None = None) -> HostNetwork:
    """Collect what this host's programs use."""
    environment = os.environ if environment is None else environment
    env = dict.fromkeys(_BUNDLE_VARIABLES, IMAGE_BUNDLE)
    for name in _PROXY_VARIABLES:
        value = environment.get(name, "")
        if value and not _has_secret(value):
            env[name] = value
    files = {}
    if pip := _pip_settings():
        files["etc/pip.conf"] = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(pip.items()))
    if npm := _npm_settings():
        files["etc/npmrc"] = "".join(f"{key}={value}\n" for key, value in sorted(npm.items()))
        env["NPM_CONFIG_GLOBALCONFIG"] = "/etc/npmrc"
    proxy = env.get("http_proxy") or env.get("HTTP_PROXY")
    if proxy:
        files["etc/apt/apt.conf.d/90host-proxy"] = (
            f'Acquire::http::Proxy "{proxy}";\nAcquire::https::Proxy "{proxy}";\n'
        )
    return HostNetwork(_host_certificates(environment), files, env)


def install_certificates(root: Path, certificates: tuple[str, ...]) -> int:
    """Put those certificates that the image does not have where `update-ca-certificates` looks; returns how many."""
    bundle = root / IMAGE_BUNDLE.lstrip("/")
    known = {_key(pem) for pem in _PEM.findall(bundle.read_text())} if bundle.is_file() else set()
    new = [pem for pem in certificates if _key(pem) not in known]
    folder = root / "usr/local/share/ca-certificates/host"
    if new:
        folder.mkdir(parents=True, exist_ok=True)
    for pem in new:
        (folder / f"{_key(pem)[:16]}.crt").write_text(pem.strip() + "\n")
    return len(new)


def _host_certificates(environment: Mapping[str, str]) -> tuple[str, ...]:
    named = environment.get("SSL_CERT_FILE")
    for path in (Path(named),) if named else _BUNDLES:
        if path.is_file():
            return tuple({_key(pem): pem for pem in _PEM.findall(path.read_text(errors="replace"))}.values())
    return ()


def _key(pem: str) -> str:
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip() + "\n")).hexdigest()
    except ValueError:
        return hashlib.sha256(pem.encode()).hexdigest()


def _pip_settings() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PIP_FILES:
        parser = configparser.RawConfigParser()
        try:
            parser.read(Path(name).expanduser())
        except configparser.Error:
            continue
        for key in _PIP_KEYS:
            value = parser.get("global", key, fallback="")
            if value and not _has_secret(value):
                found[key] = value
    return found


def _npm_settings() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _NPM_FILES:
        path = Path(name).expanduser()
        if not path.is_file():
            continue
        for line in path.read_text(errors="replace").splitlines():
            key, separator, value = (part.strip() for part in line.partition("="))
            if separator and key in _NPM_KEYS and not _has_secret(value):
                found[key] = value
    return found


def _has_secret(value: str) -> bool:
    """True when an address in `value` carries a user or a password, or cannot be read as addresses."""
    for word in value.split():
        try:
            parts = urlsplit(word if "://" in word else f"//{word}")
        except ValueError:
            return True
        if parts.username is not None or parts.password is not None:
            return True
    return False
