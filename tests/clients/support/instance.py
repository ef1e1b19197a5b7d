"""An Emberbox for tests: the one the environment names, or one of their own on free ports."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.clients.support.timing import seconds
from tests.support.ports import free_ports
from tests.support.scale import TIME_SCALE

ROOT = Path(__file__).resolve().parents[3]
ENV_NAMES = ("E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY")

# Slot networks for instances started by tests: 198.18.64.0/18 cut into /22 (250 slots each).
_SLOT_NETWORKS = [f"198.18.{third}.0/22" for third in range(64, 128, 4)]


@dataclass(frozen=True)
class Emberbox:
    """Where an Emberbox answers, and what is known of its insides.

    `data_dir` is None for one that somebody else started; then nothing may be assumed of the host it runs on.
    """

    api_url: str
    sandbox_url: str
    api_key: str
    data_dir: str | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def client_env(self) -> dict[str, str]:
        """The three variables with which unmodified clients find it."""
        return {"E2B_API_URL": self.api_url, "E2B_SANDBOX_URL": self.sandbox_url, "E2B_API_KEY": self.api_key}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Emberbox:
        return cls(**json.loads(text))

    def command(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Run `emberbox` for this instance."""
        return run_emberbox(*arguments, env=self.settings, timeout=timeout)

    def status(self) -> dict[str, Any]:
        done = self.command("status", "--json", *self._data_option())
        assert done.returncode == 0, f"emberbox status failed: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def down(self) -> None:
        done = self.command("down", *self._data_option(), timeout=seconds(400))
        assert done.returncode == 0, f"emberbox down failed: {done.stdout}{done.stderr}"

    def _data_option(self) -> list[str]:
        return ["--data", self.data_dir] if self.data_dir else []


def from_environment() -> Emberbox | None:
    """The Emberbox that the E2B variables name, if they are set."""
    if not all(os.environ.get(name) for name in ENV_NAMES):
        return None
    return Emberbox(*(os.environ[name] for name in ENV_NAMES))


def start(*, settings: Mapping[str, str] | None = None) -> Emberbox:
    """Start an Emberbox on free ports, with a data directory and a slot network of its own."""
    if os.geteuid() != 0:
        raise RuntimeError(
            "these tests start their own Emberbox, which needs root; "
            "or point E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY at one that runs"
        )
    data_dir = tempfile.mkdtemp(prefix="emberbox-test-")
    os.chmod(data_dir, 0o755)
    api_port, edge_port = free_ports(2)
    own = {
        "EMBERBOX_SLOT_NETWORK": claim_slot_network(data_dir),
        "EMBERBOX_DATA_DIR": data_dir,
        "EMBERBOX_TIME_SCALE": str(TIME_SCALE),
        **({"EMBERBOX_INHERIT_HOST_NETWORK": "true"} if has_custom_ca() else {}),
        **(settings or {}),
    }
    done = run_emberbox(
        "up", "--detach", "--data", data_dir, "--port", str(api_port), "--edge-port", str(edge_port),
        env=own, timeout=seconds(2000),
    )  # fmt: skip
    if done.returncode != 0:
        logs = _tail_of_logs(Path(data_dir))
        shutil.rmtree(data_dir, ignore_errors=True)
        raise RuntimeError(f"emberbox up failed ({done.returncode}):\n{done.stdout}\n{done.stderr}\n{logs}")
    exports = run_emberbox("env", "--data", data_dir, env=own, timeout=seconds(240))
    values = _parse_exports(exports.stdout)
    missing = [name for name in ENV_NAMES if name not in values]
    if missing:
        raise RuntimeError(f"`emberbox env` did not print {', '.join(missing)}:\n{exports.stdout}\n{exports.stderr}")
    return Emberbox(*(values[name] for name in ENV_NAMES), data_dir=data_dir, settings=own)


def remove(emberbox: Emberbox) -> None:
    """Delete the data directory of an ended Emberbox that tests started."""
    if emberbox.data_dir:
        shutil.rmtree(emberbox.data_dir)


def run_emberbox(
    *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("E2B_", "EMBERBOX_"))}
    keep = {name: os.environ[name] for name in os.environ if name.startswith("EMBERBOX_")}
    # Output goes through files: a detached child that keeps a pipe open would make us wait for ever.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "emberbox", *arguments],
            cwd=ROOT, env={**clean, **keep, **(env or {}), "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200"},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )  # fmt: skip
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = -9
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, code, out.read(), err.read())


def _parse_exports(text: str) -> dict[str, str]:
    values = {}
    for line in text.splitlines():
        if line.startswith("export ") and "=" in line:
            name, _, value = line.removeprefix("export ").partition("=")
            values[name.strip()] = value.strip().strip("'\"")
    return values


def claim_slot_network(owner: str) -> str:
    """A slot network that no other test run on this host uses. The claim dies with the owner's directory."""
    claims = Path(tempfile.gettempdir()) / "emberbox-test-slot-networks"
    claims.mkdir(exist_ok=True)
    deadline = time.monotonic() + seconds(900)
    while True:
        # One at a time: of two that find the same left claim, the slower would remove the new claim of the other.
        with (claims / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for network in _SLOT_NETWORKS:
                claim = claims / network.replace("/", "_")
                if claim.is_symlink() and not Path(os.readlink(claim)).exists():
                    claim.unlink(missing_ok=True)
                try:
                    claim.symlink_to(owner)
                except FileExistsError:
                    continue
                return network
        if time.monotonic() > deadline:
            raise RuntimeError(f"all slot networks for tests are taken, see {claims}")
        time.sleep(1)


def has_custom_ca() -> bool:
    return any(os.environ.get(name) for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"))


def _tail_of_logs(data_dir: Path, lines: int = 40) -> str:
    parts = []
    for path in sorted(data_dir.rglob("*.log")):
        text = path.read_text(errors="replace").splitlines()[-lines:]
        parts.append(f"--- {path}\n" + "\n".join(text))
    return "\n".join(parts)
