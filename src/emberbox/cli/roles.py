"""The three roles: how each is started, where it writes its log, and how it shows that it is ready."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from emberbox.cli import launch, node_client
from emberbox.cli.state import as_environment
from emberbox.control.shipped_folder import shipped_folder
from emberbox.settings import Settings

ROLE_NAMES = ("node", "edge", "api")
"""In the order of starting; they stop in the reverse order."""

_direct = build_opener(ProxyHandler({}))


@dataclass(frozen=True)
class Role:
    name: str
    argv: list[str]
    environment: dict[str, str]
    log: Path
    ready: Callable[[], bool]
    """Asks the role itself, waiting two seconds at most. Blocking."""


def role(name: str, settings: Settings) -> Role:
    """How to start one role of this instance. `emberbox up` and `emberbox api|edge|node` share it."""
    program = [sys.executable, "-P", "-m", "emberbox", name]
    environment = {**os.environ, **as_environment(settings)}
    if name == "node":
        argv = program
    else:
        own = settings.api_dir if name == "api" else settings.edge_dir
        ports = [settings.api_port] if name == "api" else [settings.edge_port, settings.edge_tls_port]
        argv = launch.command(
            settings.api_user,
            program,
            writable=[own, settings.run_dir],
            readable=_templates(settings) if name == "api" else [],
            low_ports=any(port < 1024 for port in ports),
        )
        environment = launch.environment(environment)
    return Role(
        name=name,
        argv=argv,
        environment=environment,
        log=log_path(settings, name),
        ready=lambda: READY[name](settings),
    )


def _templates(settings: Settings) -> list[Path]:
    """The folder of the shipped templates: in a checkout it lies beside the code, not in it."""
    folder = (settings.templates_dir or shipped_folder()).absolute()
    return [folder] if folder.is_dir() else []


def log_path(settings: Settings, name: str) -> Path:
    return settings.data_dir / "logs" / f"{name}.log"


def local_api_url(settings: Settings) -> str:
    """Where this host reaches its own API, whatever address it listens on."""
    host = _local(settings.api_host)
    return f"http://[{host}]:{settings.api_port}" if ":" in host else f"http://{host}:{settings.api_port}"


def api_answers(settings: Settings) -> bool:
    try:
        with _direct.open(f"{local_api_url(settings)}/health", timeout=2) as answer:
            return bool(answer.status < 400)
    except (URLError, OSError):
        return False


def edge_answers(settings: Settings) -> bool:
    try:
        with socket.create_connection((_local(settings.edge_host), settings.edge_port), timeout=2):
            return True
    except OSError:
        return False


def node_answers(settings: Settings) -> bool:
    target = settings.node_target
    if target.startswith("unix:") and not Path(target.removeprefix("unix:")).exists():
        return False  # a gRPC channel for each look would cost more than the role's own start on a slow host
    return node_client.describe(settings, timeout=2)


READY: dict[str, Callable[[Settings], bool]] = {"api": api_answers, "edge": edge_answers, "node": node_answers}


def _local(host: str) -> str:
    """An address of this host on which a server bound to `host` answers."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
