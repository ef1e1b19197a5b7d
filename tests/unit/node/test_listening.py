"""Who may connect to a node."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberbox.node.errors import BadValue
from emberbox.node.main import listen
from emberbox.node.server import NodeService
from emberbox.settings import Settings
from emberbox.wire import node_pb2 as wire
from emberbox.wire import node_pb2_grpc
from tests.support.ports import free_ports


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and one certificate for `localhost` that it signed."""
    folder = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, key = folder / "ca.pem", folder / "ca.key"
    openssl("req", "-x509", *curve, "-days", "2", "-subj", "/CN=authority", "-keyout", key, "-out", ca)
    request = folder / "side.csr"
    openssl("req", *curve, "-subj", "/CN=localhost", "-keyout", folder / "side.key", "-out", request)
    names = folder / "names"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    signed = ("-CA", ca, "-CAkey", key, "-CAcreateserial", "-days", "2", "-extfile", names)
    openssl("x509", "-req", "-in", request, *signed, "-out", folder / "side.pem")
    return folder


def settings_for(port: int, folder: Path) -> Settings:
    return Settings(
        node_address=f"127.0.0.1:{port}",
        node_tls_cert=folder / "side.pem",
        node_tls_key=folder / "side.key",
        node_tls_ca=folder / "ca.pem",
    )


async def describe(port: int, credentials: grpc.ChannelCredentials) -> wire.NodeDescription:
    options = (("grpc.ssl_target_name_override", "localhost"),)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        return await node_pb2_grpc.NodeStub(channel).Describe(wire.DescribeRequest(), timeout=60)


async def test_over_tcp_both_sides_show_a_certificate(make_world: Any, certificates: Path) -> None:
    world, (port,) = await make_world(), free_ports(1)
    server = grpc.aio.server()
    node_pb2_grpc.add_NodeServicer_to_server(NodeService(world.node), server)
    listen(server, settings_for(port, certificates))
    await server.start()
    authority = (certificates / "ca.pem").read_bytes()
    own = (certificates / "side.key").read_bytes(), (certificates / "side.pem").read_bytes()

    answer = await describe(port, grpc.ssl_channel_credentials(authority, *own))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await describe(port, grpc.ssl_channel_credentials(authority))

    await server.stop(0)
    assert answer.runtime == "fake"
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_tcp_without_certificates_is_refused() -> None:
    with pytest.raises(BadValue, match="mutual TLS only; set EMBERBOX_NODE_TLS_CERT"):
        listen(grpc.aio.server(), Settings(node_address="127.0.0.1:1"))


async def test_a_missing_certificate_is_named(certificates: Path) -> None:
    settings = settings_for(1, certificates).model_copy(update={"node_tls_key": Path("/nonexistent/key")})

    with pytest.raises(BadValue, match="/nonexistent/key"):
        listen(grpc.aio.server(), settings)


async def test_an_address_in_use_is_said_so(certificates: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        with pytest.raises(BadValue, match="cannot listen"):
            listen(grpc.aio.server(), settings_for(listener.getsockname()[1], certificates))


async def test_a_socket_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "node.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    server = grpc.aio.server()

    listen(server, Settings(node_address=f"unix:{path}"))
    await server.start()

    assert path.is_socket()
    await server.stop(0)
