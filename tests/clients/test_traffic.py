"""A sandbox's ports from outside: host names, headers, WebSockets, tokens."""

from __future__ import annotations

import time

import httpx
import pytest
from e2b import Sandbox

from tests.clients.support import servers
from tests.clients.support.raw import host_request, websocket
from tests.clients.support.timing import eventually, seconds, whole_seconds


@pytest.fixture(scope="module")
def served(sandbox):
    """The shared sandbox with an HTTP server on 8000, one on loopback only on 8001, and a WebSocket echo on 8002."""
    servers.serve(sandbox, 8000)
    servers.serve(sandbox, 8001, address="127.0.0.1")
    servers.serve(sandbox, 8002, script=servers.WEBSOCKET_ECHO)
    return sandbox


def test_a_port_is_reached_by_its_host_name(served, emberbox):
    answer = host_request(emberbox, served.get_host(8000), "/hello?a=b%20c")

    assert answer.status_code == 200
    assert answer.json()["path"] == "/hello?a=b%20c"
    assert answer.json()["host"] == served.get_host(8000)


def test_a_port_is_reached_by_headers(served, agent_of):
    answer = agent_of(served, port=8000).get("/hello")

    assert answer.json()["path"] == "/hello"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_methods_bodies_and_headers_pass(served, emberbox, method):
    body = "" if method in ("GET", "DELETE", "OPTIONS") else "the body ü"

    answer = host_request(
        emberbox, served.get_host(8000), "/x", method=method, content=body.encode(), headers={"X-Custom": "kept"}
    )

    assert answer.json()["method"] == method
    assert answer.json()["body"].encode("latin-1").decode() == body
    assert answer.json()["headers"]["x-custom"] == "kept"


@pytest.mark.parametrize("status", [201, 301, 404, 418, 500, 502, 503])
def test_statuses_of_the_server_pass_unchanged(served, emberbox, status):
    answer = host_request(emberbox, served.get_host(8000), f"/status/{status}")

    assert (answer.status_code, answer.text) == (status, "as asked")


def test_a_server_on_loopback_only_is_reached_too(served, emberbox):
    answer = eventually(
        lambda: (a := host_request(emberbox, served.get_host(8001), "/")) and a.status_code == 200 and a,
        what="the agent forwards the port",
    )

    assert answer.json()["path"] == "/"


def test_answers_stream_without_being_collected(served, emberbox):
    arrivals = []
    with (
        httpx.Client(base_url=emberbox.sandbox_url, timeout=seconds(120), trust_env=False) as client,
        client.stream("GET", "/slow", headers={"Host": served.get_host(8000)}) as answer,
    ):
        for chunk in answer.iter_raw():
            arrivals.append((time.monotonic(), chunk))

    assert b"".join(chunk for _, chunk in arrivals) == b"part 0\npart 1\npart 2\n"
    assert arrivals[-1][0] - arrivals[0][0] > 0.5


@pytest.mark.parametrize("size", [5, 1000, 300_000])
def test_websockets_pass_both_ways(served, emberbox, size):
    uri = f"ws://{served.get_host(8002)}/socket"

    with websocket(emberbox, uri) as socket:
        socket.send("text ü")
        socket.send(b"\x00\xff" * size)
        received = [socket.recv(timeout=seconds(120)) for _ in range(2)]

    assert received == ["text ü", b"\x00\xff" * size]


def test_a_websocket_stays_open_while_idle(served, emberbox):
    with websocket(emberbox, f"ws://{served.get_host(8002)}/") as socket:
        time.sleep(3)
        socket.send("still there")

        assert socket.recv(timeout=seconds(60)) == "still there"


def test_a_closed_port_says_so(served, emberbox):
    answer = host_request(emberbox, served.get_host(9), "/")

    assert answer.status_code == 502
    assert "port is not open" in answer.json()["message"]
    assert answer.json()["port"] == 9
    assert answer.json()["sandboxId"] == served.sandbox_id


def test_a_sandbox_that_is_not_there_says_so(emberbox, served):
    missing = "i" + "0" * (len(served.sandbox_id) - 1)

    answer = host_request(emberbox, served.get_host(8000).replace(served.sandbox_id, missing), "/")

    assert answer.status_code == 502
    assert "was not found" in answer.json()["message"]
    assert answer.json()["sandboxId"] == missing


def test_browsers_get_a_page_instead_of_json(emberbox, served):
    missing = "i" + "0" * (len(served.sandbox_id) - 1)

    answer = host_request(
        emberbox, served.get_host(80).replace(served.sandbox_id, missing), "/", headers={"Accept": "text/html"}
    )

    assert answer.status_code == 502
    assert answer.headers["content-type"].startswith("text/html")
    assert missing in answer.text


@pytest.mark.parametrize("host", ["not-a-sandbox.localhost", "99999-iabc.localhost", "80-.localhost", "-.localhost"])
def test_hosts_that_name_no_sandbox_are_a_bad_request(emberbox, host):
    answer = host_request(emberbox, host)

    assert answer.status_code in (400, 502)
    assert answer.json()["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"E2b-Sandbox-Id": "../../etc", "E2b-Sandbox-Port": "80"},
        {"E2b-Sandbox-Id": "i' or 1=1", "E2b-Sandbox-Port": "80"},
        {"E2b-Sandbox-Id": "iabcdef", "E2b-Sandbox-Port": "eighty"},
        {"E2b-Sandbox-Id": "iabcdef", "E2b-Sandbox-Port": "0"},
        {"E2b-Sandbox-Id": "iabcdef", "E2b-Sandbox-Port": "70000"},
        {"E2b-Sandbox-Id": "x" * 3000, "E2b-Sandbox-Port": "80"},
    ],
    ids=["path", "quote", "word-port", "port-0", "port-70000", "long-id"],
)
def test_bad_routing_headers_are_a_clear_error(emberbox, headers):
    with httpx.Client(base_url=emberbox.sandbox_url, timeout=seconds(120), trust_env=False) as client:
        answer = client.get("/", headers=headers)

    assert answer.status_code in (400, 502)
    assert answer.json()["message"]


def test_browsers_of_any_origin_may_call_the_agent(served, emberbox):
    preflight = host_request(
        emberbox,
        served.get_host(49983),
        "/process.Process/List",
        method="OPTIONS",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,connect-protocol-version,content-type,x-access-token",
        },
    )

    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert preflight.status_code in (200, 204)
    assert preflight.headers["access-control-allow-origin"] in ("*", "https://app.example")
    assert "*" in allowed or "x-access-token" in allowed


def test_browsers_of_any_origin_may_call_the_api(api):
    preflight = api.options(
        "/v2/sandboxes",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-api-key,content-type,idempotency-key",
        },
    )

    assert preflight.status_code in (200, 204)
    assert preflight.headers["access-control-allow-origin"] in ("*", "https://app.example")


def test_private_traffic_needs_its_token(make_sandbox, emberbox):
    sandbox = make_sandbox(network={"allow_public_traffic": False})
    servers.serve(sandbox, 8000)
    host = sandbox.get_host(8000)

    without = host_request(emberbox, host)
    wrong = host_request(emberbox, host, headers={"e2b-traffic-access-token": "wrong"})
    right = host_request(emberbox, host, headers={"e2b-traffic-access-token": sandbox.traffic_access_token})

    assert sandbox.traffic_access_token
    assert (without.status_code, wrong.status_code, right.status_code) == (403, 403, 200)


def test_the_host_a_server_sees_can_be_masked(make_sandbox, emberbox):
    sandbox = make_sandbox(network={"mask_request_host": "localhost:${PORT}"})
    servers.serve(sandbox, 8000)

    answer = host_request(emberbox, sandbox.get_host(8000))

    assert answer.json()["host"] == "localhost:8000"


def test_routes_go_with_their_sandbox(make_sandbox, emberbox):
    sandbox = make_sandbox()
    servers.serve(sandbox, 8000)
    host = sandbox.get_host(8000)
    before = host_request(emberbox, host).status_code

    sandbox.kill()
    after = host_request(emberbox, host)

    assert before == 200
    assert after.status_code == 502
    assert "was not found" in after.json()["message"]


def test_ports_answer_again_after_pause_and_resume(make_sandbox, emberbox):
    sandbox = make_sandbox()
    servers.serve(sandbox, 8000)

    sandbox.pause()
    paused = host_request(emberbox, sandbox.get_host(8000)).status_code
    Sandbox.connect(sandbox.sandbox_id, timeout=whole_seconds(600))
    resumed = eventually(
        lambda: (a := host_request(emberbox, sandbox.get_host(8000))) and a.status_code == 200 and a, what="the server"
    )

    assert paused in (403, 409, 502)
    assert resumed.json()["path"] == "/"


def test_many_requests_on_one_connection(served, emberbox):
    with httpx.Client(base_url=emberbox.sandbox_url, timeout=seconds(120), trust_env=False) as client:
        answers = [client.get(f"/{n}", headers={"Host": served.get_host(8000)}).json()["path"] for n in range(200)]

    assert answers == [f"/{n}" for n in range(200)]
