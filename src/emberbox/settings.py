"""The one place that reads configuration.

Values come from the command line (which sets environment variables for the roles it starts), from `EMBERBOX_*`
environment variables, and from the defaults below, in this order.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, lru_cache
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

RuntimeName = Literal["auto", "firecracker", "container"]


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="EMBERBOX_", extra="ignore", frozen=True)

    # where things are
    data_dir: Path = Path("/var/lib/emberbox")
    image_cache_dir: Path = Path("/var/cache/emberbox")
    """Built base images, shared by all data directories of the host; root's alone."""
    instance_name: str = ""
    """Tag in every host-global name (netns, cgroup, nft table). Empty: derived from `data_dir`."""

    # what users see
    domain: str = ""
    """Base domain of sandbox addresses. Empty: `localhost:<edge port>`."""
    api_host: str = "127.0.0.1"
    api_port: int = Field(3000, ge=0, le=65535)
    edge_host: str = "127.0.0.1"
    edge_port: int = Field(3002, ge=0, le=65535)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    edge_tls_port: int = Field(3443, ge=0, le=65535)
    """Used when `tls_cert` and `tls_key` are set."""
    edge_access_log: bool = False
    """A line on the edge's standard error for every request."""

    # roles
    api_user: str = "emberbox"
    """The unprivileged user that api and edge run as."""
    database_url: str = ""
    """SQLAlchemy async URL. Empty: SQLite in `data_dir`/api."""
    node_address: str = ""
    """gRPC target of the node. Empty: the unix socket in `data_dir`/run."""
    node_tls_cert: Path | None = None
    node_tls_key: Path | None = None
    node_tls_ca: Path | None = None
    """Mutual TLS between api and node at a TCP `node_address`: each side's certificate and key, and who signs them."""
    edge_address: str = ""
    """gRPC target of the edge. Empty: the unix socket in `data_dir`/run."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "text"] = "auto"

    # runtime
    runtime: RuntimeName = "auto"
    runc: str = "runc"
    """Name or path of the OCI runtime of the `container` runtime: runc, or runsc where it is installed."""
    firecracker: Path | None = None
    jailer: Path | None = None
    guest_kernel: Path | None = None
    agent_path: Path | None = None
    """emberd. Empty: the one in the package."""

    # network
    slot_network: IPv4Network = IPv4Network("198.18.0.0/16")
    """Addresses of slots, four a slot. Two instances on one host need different ones."""
    slots_ready: int = Field(4, ge=0, le=256)
    """Slots kept prepared."""
    spares: int = Field(2, ge=0, le=64)
    """Machines' processes kept started, before it is known what they will run; for microVMs, about 2 MB each."""
    inherit_host_network: bool = False
    """Give sandboxes and builds the host's CA bundle, resolver and package settings.

    For hosts behind a TLS-inspecting proxy.
    """
    dns_upstreams: tuple[str, ...] = ()
    """Resolvers that the node's forwarder asks. Empty: those of the host's resolv.conf."""
    deny_networks: tuple[str, ...] = ()
    """Further networks that sandboxes never reach."""

    # machines
    warm_min: int = Field(1, ge=0)
    """Warm machines kept per template in use."""
    warm_max: int = Field(8, ge=0)
    warm_idle_seconds: int = Field(600, ge=1)
    default_cpu_count: int = Field(2, ge=1)
    default_memory_mb: int = Field(1024, ge=128)
    default_disk_size_mb: int = Field(10240, ge=512)
    default_disk_mb_per_second: int = Field(0, ge=0, le=100_000)
    """MiB a second that a sandbox may read, and write, where its template does not say. 0: no limit."""
    default_disk_operations_per_second: int = Field(0, ge=0, le=10_000_000)
    """Likewise, reads and writes a second."""
    default_network_mbit_per_second: int = Field(0, ge=0, le=30_000)
    """Likewise, million bits a second that it may send, and receive."""
    max_machines: int = Field(1000, ge=1)
    id_range_start: int = Field(1_000_000_000, ge=65536)
    """First host id of the containers' user namespaces; each takes 65536."""

    admin_token: str = ""
    """Authorises the admin routes (`X-Admin-Token`). Empty: they answer 401."""

    # limits of a new team
    max_timeout_seconds: int = 24 * 3600
    max_sandboxes: int = 200
    rate_per_second: int = 100
    rate_burst: int = 300
    connections_per_sandbox: int = 1000

    # template builds
    builds_at_once: int = Field(2, ge=1)
    """Builds that run at the same time; more wait."""
    builds_per_team: int = Field(2, ge=1)
    """Of them, those of one team."""
    builds_waiting_per_team: int = Field(50, ge=1)
    """Builds of a team that may wait; above it, a start is refused."""
    build_seconds: int = Field(3600, ge=1)
    """How long a build may run."""
    builds_kept_per_template: int = Field(0, ge=0)
    """Builds kept of a template besides those that its tags mean; the oldest go. 0: all."""
    max_cpu_count: int = Field(32, ge=1)
    """Most CPUs that a template may ask for."""
    max_memory_mb: int = Field(65536, ge=128)
    max_disk_size_mb: int = Field(102400, ge=512)
    max_disk_mb_per_second: int = Field(0, ge=0, le=100_000)
    """The most that any sandbox or build may read, and write, whatever its template says. 0: no ceiling."""
    max_disk_operations_per_second: int = Field(0, ge=0, le=10_000_000)
    max_network_mbit_per_second: int = Field(0, ge=0, le=30_000)
    max_upload_mb: int = Field(2048, ge=1)
    """Largest archive of files for a build."""
    uploads_mb_per_team: int = Field(10240, ge=1)
    """Uploaded archives kept for a team; the least recently used go first."""
    uploads_keep_seconds: int = Field(7 * 24 * 3600, ge=1)
    """How long an uploaded archive is kept after its last use."""
    first_build_wait_seconds: float = Field(30.0, ge=0)
    """How long a create waits for a template that ships with Emberbox and is built on first use."""
    ready_seconds: float = Field(120.0, gt=0)
    """How long a template's ready command may take to succeed."""
    build_cache_max_mb: int = Field(20480, ge=0)
    """What steps left and images that no template stands on are kept up to this size; the least recently used go."""
    registry_mirrors: dict[str, str] = {}
    """Where to look for images first, by registry, as JSON: `{"docker.io": "mirror.example:5000"}`."""
    insecure_registries: tuple[str, ...] = ()
    """Registries that speak plain HTTP or have a certificate that no authority signed, as JSON: `["host:5000"]`."""
    allowed_registries: tuple[str, ...] = ()
    """The only registries that images come from, as JSON: `["docker.io", "ghcr.io"]`. Empty: any that a build names."""
    image_max_compressed_mb: int = Field(8192, ge=1)
    """Largest image to pull, compressed."""
    image_max_mb: int = Field(20480, ge=64)
    """Largest image to pull, unpacked."""
    templates_dir: Path | None = None
    """The templates that ship with Emberbox. Empty: those of the package."""

    mcp_bind_sandboxes: bool = False
    """End the sandboxes that an MCP session made when the session ends."""
    mcp_session_idle_seconds: int = Field(1800, ge=1)
    """An MCP session that is not used for this long ends."""

    # keeping
    metrics_keep_seconds: int = 24 * 3600
    logs_keep_seconds: int = 24 * 3600

    time_scale: float = Field(1.0, gt=0)
    """Multiplies every internal time-out, for hosts that are slow (the lab)."""

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @cached_property
    def instance(self) -> str:
        """`eb` and six hex digits, at most 8 characters: fits into interface names."""
        return self.instance_name or "eb" + hashlib.sha256(str(self.data_dir).encode()).hexdigest()[:6]

    @property
    def run_dir(self) -> Path:
        return self.data_dir / "run"

    @property
    def api_dir(self) -> Path:
        return self.data_dir / "api"

    @property
    def node_dir(self) -> Path:
        return self.data_dir / "node"

    @property
    def edge_dir(self) -> Path:
        return self.data_dir / "edge"

    @property
    def node_target(self) -> str:
        return self.node_address or f"unix:{self.run_dir / 'node.sock'}"

    @property
    def edge_target(self) -> str:
        return self.edge_address or f"unix:{self.run_dir / 'edge.sock'}"

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.api_dir / 'emberbox.db'}"

    @property
    def sandbox_domain(self) -> str:
        return self.domain or f"localhost:{self.edge_port}"

    @property
    def api_url(self) -> str:
        return f"http://{_reachable(self.api_host)}:{self.api_port}"

    @property
    def edge_url(self) -> str:
        return f"http://{_reachable(self.edge_host)}:{self.edge_port}"

    @property
    def edge_secret_path(self) -> Path:
        """Shared by edge and api: authorises the edge's questions (`/edge/wake`). Written by `emberbox up`."""
        return self.run_dir / "edge.secret"


def _reachable(host: str) -> str:
    return "localhost" if host in ("0.0.0.0", "::", "127.0.0.1") else host


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    return Settings()
