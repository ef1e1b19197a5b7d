"""Starts the small servers of `inside/` in a sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.clients.support.timing import eventually

INSIDE = Path(__file__).resolve().parents[1] / "inside"
HTTP = "http_echo.py"
WEBSOCKET_ECHO = "websocket_echo.py"


def serve(sandbox: Any, port: int, *, script: str = HTTP, address: str = "0.0.0.0") -> Any:
    """Start `script` on `port` inside and return its command once the port listens."""
    path = f"/tmp/{port}-{script}"
    sandbox.files.write(path, (INSIDE / script).read_text())
    handle = sandbox.commands.run(f"exec python3 {path} {address} {port}", background=True, timeout=0)
    eventually(lambda: _listens(sandbox, port), within=120, what=f"a server on port {port}")
    return handle


def _listens(sandbox: Any, port: int) -> bool:
    # State 0A is LISTEN; the second column is address:port in hexadecimal.
    table = sandbox.commands.run("cat /proc/net/tcp /proc/net/tcp6 2>/dev/null || true").stdout
    return any(f":{port:04X} " in line and " 0A " in line for line in table.splitlines())
