"""With TLS and a wildcard name, clients need E2B_DOMAIN and a key and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.support import instance
from tests.clients.support.leaks import end_and_count
from tests.clients.support.timing import seconds
from tests.support.edge import make_certificate
from tests.support.ports import free_ports

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="a name server of its own needs root"),
    pytest.mark.timeout(seconds(1800)),
    pytest.mark.xdist_group("domain"),
]
NAME = "sandboxes.test"

SCRIPT = """
import json, sys, threading
import httpx
from e2b import Sandbox

sandbox = Sandbox.create(timeout=300)
said = {"domain": sandbox.sandbox_domain, "host": sandbox.get_host(8000)}
try:
    said["stdout"] = sandbox.commands.run("echo over TLS").stdout
    sandbox.files.write("note", "text")
    said["file"] = sandbox.files.read("note")
    said["listed"] = [each.sandbox_id for each in Sandbox.list().next_items()] == [sandbox.sandbox_id]
    with httpx.Client(http2=True, timeout=60) as client:
        answer = client.get(f"https://{sandbox.get_host(49983)}/health")
        said["health"] = [answer.status_code, answer.http_version]
    handle = sandbox.commands.run("sleep 1000", background=True, timeout=0)
    ended = []
    def wait():
        try:
            ended.append(f"exit {handle.wait().exit_code}")
        except Exception as error:
            ended.append(type(error).__name__)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
finally:
    sandbox.kill()
thread.join(60)
said["stream"] = ended
print(json.dumps(said))
"""


@contextlib.contextmanager
def name_server() -> Iterator[str]:
    """Answers every question for an IPv4 address with loopback's. Its address, on port 53."""
    address = f"127.{random.randint(100, 250)}.{random.randint(0, 255)}.53"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    asked, client = server.recvfrom(4096)
                    end = asked.index(b"\0", 12) + 5
                    is_ipv4 = asked[end - 4 : end - 2] == b"\0\1"
                    head = asked[:2] + struct.pack(">HHHHH", 0x8580, 1, int(is_ipv4), 0, 0)
                    record = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton("127.0.0.1")
                    server.sendto(head + asked[12:end] + (record if is_ipv4 else b""), client)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield address


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the unmodified client met."""
    folder: Path = tmp_path_factory.mktemp("domain")
    folder.chmod(0o755)
    cert, key = make_certificate(folder, f"*.{NAME}")
    (port,) = free_ports(1)
    domain = f"{NAME}:{port}"
    emberbox = instance.start(
        settings={
            "EMBERBOX_DOMAIN": domain,
            "EMBERBOX_TLS_CERT": str(cert),
            "EMBERBOX_TLS_KEY": str(key),
            "EMBERBOX_EDGE_TLS_PORT": str(port),
        }
    )
    try:
        with name_server() as address:
            resolver = folder / "resolv.conf"
            resolver.write_text(f"nameserver {address}\n")
            enter = f'mount --bind {resolver} "$(readlink -f /etc/resolv.conf)" && exec "$@"'
            kept = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith("E2B_") and "proxy" not in name.lower()
            }
            done = subprocess.run(
                ["unshare", "--mount", "sh", "-c", enter, "sh", sys.executable, "-c", SCRIPT],
                env={**kept, "E2B_DOMAIN": domain, "E2B_API_KEY": emberbox.api_key, "SSL_CERT_FILE": str(cert)},
                capture_output=True,
                text=True,
                timeout=seconds(900),
            )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)
    finally:
        end_and_count(emberbox, all_killed=True)


def test_commands_and_files_work(said: dict[str, Any]) -> None:
    assert said["stdout"] == "over TLS\n"
    assert said["file"] == "text"
    assert said["listed"]


def test_hosts_are_below_the_domain(said: dict[str, Any]) -> None:
    assert said["domain"].startswith(NAME)
    assert said["host"].startswith("8000-")
    assert said["host"].endswith(said["domain"])


def test_http2_is_spoken(said: dict[str, Any]) -> None:
    assert said["health"] == [204, "HTTP/2"]


def test_a_stream_ends_with_an_error_when_its_sandbox_is_killed(said: dict[str, Any]) -> None:
    """Over HTTP/2 too, where an older HAProxy cannot reset the stream: the agent's streams have an end of their own."""
    (ended,) = said["stream"]
    assert "exit 0" not in ended
