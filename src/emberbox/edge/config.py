"""HAProxy's configuration, written for this host and these settings. Loads on HAProxy 2.6 and newer.

The secret that the edge shares with the control plane is not in it: the Lua code reads its file.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import socket
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from pathlib import Path
from string import Template

from emberbox.edge.errors import BadConfiguration
from emberbox.edge.routes import GROUPS
from emberbox.settings import Settings

LANES = 1024
TLS_LANES = 16
"""How many lanes HAProxy has at first. They cost 7 KB each, TLS lanes more; a full pool doubles."""

AGENT_PORT = 49983
CONTROL_ROUTES = ("init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "logs")
"""What the agent answers to its node only."""

_SPARE_FILES = 400
_MOST_THREADS = 32
_LUA = ("json", "answers", "wake")


@dataclass(frozen=True)
class Paths:
    """Where the edge keeps its files, all of them in `Settings.edge_dir`."""

    home: Path

    @property
    def config(self) -> Path:
        return self.home / "haproxy.cfg"

    @property
    def routes(self) -> Path:
        return self.home / "routes.map"

    @property
    def lua(self) -> Path:
        return self.home / "lua"

    @property
    def admin_socket(self) -> Path:
        return self.home / "admin.sock"

    @property
    def master_socket(self) -> Path:
        return self.home / "master.sock"

    @property
    def pid(self) -> Path:
        return self.home / "haproxy.pid"

    @property
    def lock(self) -> Path:
        return self.home / "lock"

    @property
    def certificate(self) -> Path:
        """The certificate and its key, as HAProxy wants them."""
        return self.home / "tls.pem"


def write_lua(paths: Paths) -> None:
    """Copy the Lua code beside the configuration, so that HAProxy depends on no other directory."""
    paths.lua.mkdir(exist_ok=True)
    for name in _LUA:
        code = resources.files("emberbox.edge").joinpath("lua", f"{name}.lua").read_bytes()
        target = paths.lua / f"{name}.lua"
        if not target.exists() or target.read_bytes() != code:
            target.write_bytes(code)


def _lua_hash() -> str:
    """Changes when the Lua code does, so that a running HAProxy is reloaded for it."""
    digest = hashlib.sha256()
    for name in _LUA:
        digest.update(resources.files("emberbox.edge").joinpath("lua", f"{name}.lua").read_bytes())
    return digest.hexdigest()[:16]


class _Template(Template):
    delimiter = "@"


def render(settings: Settings, paths: Paths, *, lanes: int, tls_lanes: int) -> str:
    """The whole configuration: `haproxy.cfg.in`, filled in.

    Raises:
        BadConfiguration: a setting does not fit.
    """
    if any(character.isspace() for character in str(paths.home)):
        raise BadConfiguration(f"the path {paths.home} has a space in it, which HAProxy's admin socket cannot name")
    connections, pipes = _most_connections()
    template = resources.files("emberbox.edge").joinpath("haproxy.cfg.in").read_text()
    return _Template(template).substitute(
        admin_socket=paths.admin_socket,
        agent_port=AGENT_PORT,
        alive_seconds=math.ceil(settings.time_scale),
        api=_address(settings.api_host, settings.api_port),
        binds=_binds(settings, paths),
        connect_ms=math.ceil(2000 * settings.time_scale),
        connections_per_sandbox=settings.connections_per_sandbox,
        control="|".join(CONTROL_ROUTES),
        domain=settings.sandbox_domain.rsplit(":", 1)[0].lower(),
        lanes=_lanes(lanes),
        log_level="info" if settings.edge_access_log else "warning",
        log_option="option httplog" if settings.edge_access_log else "option dontlog-normal",
        lua=paths.lua,
        lua_hash=_lua_hash(),
        most_connections=connections,
        most_pipes=pipes,
        routes=paths.routes,
        secret_path=settings.edge_secret_path,
        threads=min(len(os.sched_getaffinity(0)), _MOST_THREADS),
        tls_lanes="\n".join(f"    server t{n} 0.0.0.0:0" for n in range(tls_lanes)),
        wake_ms=math.ceil(30_000 * settings.time_scale),
    )


def _most_connections() -> tuple[int, int]:
    """How many connections and splice pipes fit the limit of open files.

    A connection takes two files, with the one to the machine; a pipe two.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(hard, 1 << 20) if hard != resource.RLIM_INFINITY else 1 << 20
    if files < 1000:
        raise BadConfiguration(f"the limit of open files is {hard}; the edge needs at least 1000 (ulimit -n)")
    pipes = min(500, files // 20)
    return (files - _SPARE_FILES - 2 * pipes) // 2, pipes


def _binds(settings: Settings, paths: Paths) -> str:
    binds = [f"    bind {_address(settings.edge_host, settings.edge_port)}"]
    if settings.tls_cert and settings.tls_key:
        address = _address(settings.edge_host, settings.edge_tls_port)
        binds.append(f"    bind {address} ssl crt {paths.certificate} alpn h2,http/1.1")
    return "\n".join(binds)


def _lanes(lanes: int) -> str:
    groups = []
    for group in range(GROUPS):
        servers = [f"    server l{number} 0.0.0.0:0" for number in range(group, lanes, GROUPS)]
        groups.append("\n".join([f"backend lanes_{group}", "    use-server %[var(txn.lane)] if TRUE", *servers]))
    return "\n\n".join(groups)


def _address(host: str, port: int) -> str:
    """`host:port` with the host as an address: HAProxy's HTTP client asks the DNS, which may not know `localhost`."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise BadConfiguration(f"the host {host!r} cannot be resolved: {error}") from None
        address = ip_address(found[0][4][0])
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
