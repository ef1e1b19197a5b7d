"""Which requests reach which machine, what is refused, and in which words."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.support.edge import DOMAIN, EDGE_PORT, headers_for, make_certificate, raw_request

TOKEN = "a-traffic-token"
TOKEN_SHA256 = hashlib.sha256(TOKEN.encode()).hexdigest()
HTML = {"Accept": "text/html,application/xhtml+xml"}
PREFLIGHT = {
    "Origin": "https://app.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "x-access-token",
}


async def test_a_host_label_names_port_and_sandbox(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    answer = await world.client.get("/a?b=c", headers={"Host": f"8080-{sandbox_id}.{DOMAIN}"})

    assert answer.status_code == 200
    assert answer.json()["machine"] == machine.address
    assert answer.json()["target"] == "/a?b=c"
    assert answer.json()["headers"]["host"] == f"8080-{sandbox_id}.{DOMAIN}"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:3002", "localhost:3002", "[::1]:3002", f"sandbox.{DOMAIN}", "edge.internal"]
)
async def test_headers_name_the_sandbox_where_the_host_does_not(world: Any, host: str) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, Host=host))

    assert answer.json()["machine"] == machine.address


async def test_the_host_label_goes_before_the_headers(world: Any) -> None:
    by_label, machine = await world.sandbox(8080)
    by_header, _ = await world.sandbox(8080)

    answer = await world.client.get("/", headers=headers_for(by_header, Host=f"8080-{by_label}.{DOMAIN}"))

    assert answer.json()["machine"] == machine.address


async def test_older_clients_append_a_client_id(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    by_host = await world.client.get("/", headers={"Host": f"8080-{sandbox_id}-6532622b.{DOMAIN}"})
    by_header = await world.client.get("/", headers=headers_for(f"{sandbox_id}-6532622b"))

    assert by_host.json()["machine"] == by_header.json()["machine"] == machine.address


@pytest.mark.parametrize("port", [80, 6080, 8000, 49983, 49999, 65535])
async def test_any_port_is_reached(world: Any, port: int) -> None:
    sandbox_id, _ = await world.sandbox(port)

    answer = await world.client.get("/health", headers=headers_for(sandbox_id, port))

    assert answer.status_code == 200


async def test_the_api_is_reached_by_name(world: Any) -> None:
    answer = await world.client.get("/sandboxes", headers={"Host": f"api.{DOMAIN}", "X-API-Key": "k"})

    assert answer.json()["machine"] == world.control.address
    assert answer.json()["headers"]["x-api-key"] == "k"


@pytest.mark.parametrize("path", ["/edge/wake", "//edge/wake", "/%65dge/wake", "/./edge/wake", "/x/../edge/wake"])
async def test_the_control_planes_door_for_the_edge_is_closed_to_the_world(world: Any, path: str) -> None:
    request = f"POST {path} HTTP/1.1\r\nHost: api.{DOMAIN}\r\nContent-Length: 2\r\n\r\n{{}}"

    answer = await raw_request(world.edge.address, EDGE_PORT, request)

    assert b" 404 " in answer
    assert world.control.seen == []


async def test_an_address_without_a_sandbox_is_a_bad_request(world: Any) -> None:
    answer = await world.client.get("/")

    assert answer.status_code == 400
    assert answer.json()["code"] == 400
    assert "{port}-{sandboxID}" in answer.json()["message"]


@pytest.mark.parametrize("sandbox_id", ["UPPER", "a_b", "a.b", "%61bc", "x" * 65, "-", "é"])
async def test_a_malformed_sandbox_id_is_a_bad_request(world: Any, sandbox_id: str) -> None:
    headers = [(b"e2b-sandbox-id", sandbox_id.encode()), (b"e2b-sandbox-port", b"8080")]

    answer = await world.client.get("/", headers=headers)

    assert answer.status_code == 400
    assert world.control.questions == []


@pytest.mark.parametrize("port", ["", "0", "-1", "x", "65536", "99999999999999999999", "80x", "080", "8 0"])
async def test_a_malformed_port_is_a_bad_request(world: Any, port: str) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, port))

    assert answer.status_code == 400
    assert answer.json()["sandboxId"] == sandbox_id
    assert machine.seen == []


@pytest.mark.parametrize("label", ["8080-", "0-{id}", "65536-{id}", "{id}", "x-{id}", "8080-a_b"])
async def test_a_malformed_host_label_is_a_bad_request(world: Any, label: str) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    answer = await world.client.get("/", headers={"Host": f"{label.format(id=sandbox_id)}.{DOMAIN}"})

    assert answer.status_code == 400
    assert machine.seen == []


async def test_bytes_that_are_not_http_are_a_bad_request(world: Any) -> None:
    answer = await raw_request(world.edge.address, EDGE_PORT, "\x16\x03\x01 nonsense\r\n\r\n")

    assert b" 400 " in answer


async def test_an_unknown_sandbox_was_not_found(world: Any) -> None:
    sandbox_id = world.new_id()

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert answer.status_code == 502
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"sandboxId": sandbox_id, "message": "The sandbox was not found", "code": 502}


async def test_a_browser_gets_a_page(world: Any) -> None:
    sandbox_id = world.new_id()

    answer = await world.client.get("/", headers=headers_for(sandbox_id, **HTML))

    assert answer.status_code == 502
    assert answer.headers["content-type"].startswith("text/html")
    assert "was not found" in answer.text
    assert sandbox_id in answer.text


async def test_a_closed_port_is_told_with_its_number(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, 8081))

    assert answer.status_code == 502
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.json()["sandboxId"] == sandbox_id
    assert "port is not open" in answer.json()["message"]
    assert answer.json()["port"] == 8081
    assert answer.json()["code"] == 502


async def test_a_closed_port_is_a_page_for_a_browser(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, 8081, **HTML))

    assert answer.status_code == 502
    assert answer.headers["content-type"].startswith("text/html")
    assert "port is not open" in answer.text


async def test_a_programs_own_errors_go_through_as_they_are(world: Any) -> None:
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, lambda exchange: exchange.answer(b"mine", "503 Busy", "x-own: 1\r\n"))
    await world.routes.set(sandbox_id, machine.address)

    answer = await world.client.get("/", headers=headers_for(sandbox_id))

    assert (answer.status_code, answer.text, answer.headers["x-own"]) == (503, "mine", "1")
    assert "access-control-allow-origin" not in answer.headers


async def test_a_dropped_sandbox_was_not_found(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)
    before = await world.client.get("/", headers=headers_for(sandbox_id))

    await world.routes.drop(sandbox_id)

    after = await world.client.get("/", headers=headers_for(sandbox_id))
    assert (before.status_code, after.status_code) == (200, 502)
    assert "was not found" in after.json()["message"]


async def test_dropping_a_route_twice_is_fine(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)

    await world.routes.drop(sandbox_id)

    await world.routes.drop(sandbox_id)


CONTROL_PATHS = [
    *[f"/{name}" for name in ("init", "freeze", "unfreeze", "collapse", "fsfreeze", "fsthaw", "logs")],
    *["//init", "/init/", "/init?x=1", "/%69nit", "/%2569nit", "/./init", "/x/../init", "/%2finit", "/%2e/init"],
    *["/INIT", "/init;x", "/init/%2e%2e/init", "/\\init", "/init%2f", "/logs/x", "http://x/init"],
]


@pytest.mark.parametrize("path", CONTROL_PATHS)
async def test_the_agents_control_routes_are_refused_however_they_are_spelled(world: Any, path: str) -> None:
    sandbox_id, machine = await world.sandbox(49983)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nE2b-Sandbox-Id: {sandbox_id}\r\nE2b-Sandbox-Port: 49983\r\n"

    answer = await raw_request(world.edge.address, EDGE_PORT, head + "Content-Length: 0\r\n\r\n")

    assert b" 404 " in answer
    assert machine.seen == []


@pytest.mark.parametrize(
    "path", ["/files?path=/init", "/files?path=%2Flogs", "/process.Process/Start", "/health", "/initial"]
)
async def test_the_agents_other_routes_are_open(world: Any, path: str) -> None:
    sandbox_id, machine = await world.sandbox(49983)

    answer = await world.client.post(path, headers=headers_for(sandbox_id, 49983))

    assert answer.status_code == 200
    assert machine.seen == [f"POST {path}"]


async def test_a_users_port_may_have_any_route(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    answer = await world.client.get("/init", headers=headers_for(sandbox_id))

    assert answer.status_code == 200
    assert machine.seen == ["GET /init"]


@pytest.mark.parametrize(
    "given", [{}, {"e2b-traffic-access-token": "wrong"}, {"e2b-traffic-access-token": TOKEN_SHA256}]
)
async def test_without_the_traffic_token_a_private_sandbox_is_closed(world: Any, given: dict[str, str]) -> None:
    sandbox_id, machine = await world.sandbox(8080, traffic_token_sha256=TOKEN_SHA256)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, **given))

    assert answer.status_code == 403
    assert answer.json()["code"] == 403
    assert machine.seen == []


async def test_the_traffic_token_opens_and_stays_at_the_edge(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080, traffic_token_sha256=TOKEN_SHA256)

    answer = await world.client.get("/", headers=headers_for(sandbox_id, **{"e2b-traffic-access-token": TOKEN}))

    assert answer.status_code == 200
    assert "e2b-traffic-access-token" not in answer.json()["headers"]


async def test_the_agent_needs_no_traffic_token(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(49983, traffic_token_sha256=TOKEN_SHA256)

    answer = await world.client.get("/health", headers=headers_for(sandbox_id, 49983))

    assert answer.status_code == 200


async def test_a_browser_may_ask_before_it_sends_the_token(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080, traffic_token_sha256=TOKEN_SHA256)

    answer = await world.client.options("/", headers=headers_for(sandbox_id, **PREFLIGHT))

    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-methods"] == "POST"
    assert answer.headers["access-control-allow-headers"] == "x-access-token"
    assert machine.seen == []


async def test_a_browser_may_read_why_it_was_refused(world: Any) -> None:
    sandbox_id = world.new_id()

    preflight = await world.client.options("/", headers=headers_for(sandbox_id, **PREFLIGHT))
    answer = await world.client.post("/", headers=headers_for(sandbox_id, Origin="https://app.example"))

    assert preflight.status_code == 204
    assert answer.status_code == 502
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_a_running_programs_preflight_is_its_own(world: Any) -> None:
    sandbox_id, machine = await world.sandbox(8080)

    await world.client.options("/", headers=headers_for(sandbox_id, **PREFLIGHT))

    assert machine.seen == ["OPTIONS /"]


@pytest.mark.parametrize(
    ("mask", "host"),
    [("app.local", "app.local"), ("app.local:${PORT}", "app.local:8080"), ("${PORT}.${PORT}", "8080.8080")],
)
async def test_the_host_is_masked_where_the_route_says_so(world: Any, mask: str, host: str) -> None:
    sandbox_id, _ = await world.sandbox(8080, mask_request_host=mask)

    answer = await world.client.get("/", headers={"Host": f"8080-{sandbox_id}.{DOMAIN}"})

    assert answer.json()["headers"]["host"] == host
    assert answer.json()["headers"]["x-forwarded-host"] == f"8080-{sandbox_id}.{DOMAIN}"


async def test_a_port_that_speaks_tls_is_spoken_to_in_tls(world: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "whatever.test")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    sandbox_id, machine = world.new_id(), await world.machine(8080)
    await machine.listen(8443, ssl=context)
    await machine.listen(443)
    await world.routes.set(sandbox_id, machine.address, https_ports=[8443, 9443])

    tls = await world.client.get("/", headers=headers_for(sandbox_id, 8443))
    plain = await world.client.get("/", headers=headers_for(sandbox_id, 8080))
    other = await world.client.get("/", headers=headers_for(sandbox_id, 443))

    assert [tls.status_code, plain.status_code, other.status_code] == [200, 200, 200]


async def test_a_program_learns_who_asked(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080)

    answer = await world.client.get("/", headers={"Host": f"8080-{sandbox_id}.{DOMAIN}"})

    seen = answer.json()["headers"]
    assert seen["x-forwarded-for"].startswith("127.")
    assert seen["x-forwarded-proto"] == "http"
    assert seen["x-forwarded-host"] == f"8080-{sandbox_id}.{DOMAIN}"


async def test_routing_headers_reach_the_agent_and_no_other_program(world: Any) -> None:
    sandbox_id, _ = await world.sandbox(8080, 49983)

    program = await world.client.get("/", headers=headers_for(sandbox_id, 8080))
    agent = await world.client.get("/", headers=headers_for(sandbox_id, 49983))

    assert "e2b-sandbox-id" not in program.json()["headers"]
    assert "e2b-sandbox-port" not in program.json()["headers"]
    assert agent.json()["headers"]["e2b-sandbox-id"] == sandbox_id


async def test_a_route_that_is_none_is_refused_with_a_reason(world: Any) -> None:
    import grpc

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.routes.set("iabc", "not-an-address")

    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "not-an-address" in caught.value.details()
