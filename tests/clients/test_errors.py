"""Every error class of the client, and input that nobody should send."""

from __future__ import annotations

import uuid

import e2b
import httpx
import pytest
from e2b import AsyncSandbox, Sandbox

from tests.clients.support.raw import Api
from tests.clients.support.teams import new_team
from tests.clients.support.timing import seconds, whole_seconds

MISSING = "i" + "0" * 19


def test_no_key_is_refused_by_the_client_itself(emberbox, monkeypatch):
    monkeypatch.delenv("E2B_API_KEY")

    with pytest.raises(e2b.AuthenticationException):
        Sandbox.create()


@pytest.mark.parametrize("key", ["e2b_" + "0" * 40, "e2b_" + "f" * 39, "not-a-key", "e2b_" + "g" * 40])
def test_a_wrong_key_is_unauthorized(emberbox, key):
    with pytest.raises(e2b.AuthenticationException):
        Sandbox.create(api_key=key)


def test_no_key_at_the_api_is_unauthorized(emberbox):
    answer = httpx.get(f"{emberbox.api_url}/v2/sandboxes", timeout=seconds(60))

    assert answer.status_code == 401
    assert answer.json()["code"] == 401


@pytest.mark.parametrize("key", [b"e2b_\xc3\xa9", b"\xff", b"x" * 5000], ids=["utf8", "binary", "long"])
def test_keys_that_are_no_text_are_unauthorized(emberbox, key):
    answer = httpx.get(f"{emberbox.api_url}/v2/sandboxes", headers={b"X-API-KEY": key}, timeout=seconds(60))

    assert answer.status_code == 401


def test_an_unknown_template_is_named_in_the_error(emberbox):
    with pytest.raises(e2b.SandboxException, match="no-such-template") as unknown:
        Sandbox.create("no-such-template")

    assert unknown.value.status_code == 404


def test_a_misspelt_template_gets_a_hint(emberbox):
    with pytest.raises(e2b.SandboxException, match="base"):
        Sandbox.create("bsae")


@pytest.mark.parametrize("template", ["", "base:no-such-tag", "UPPER", "a/b/c", "../base", "base\x00", "x" * 10_000])
def test_names_that_are_no_template_are_refused(api, template):
    answer = api.post("/v2/sandboxes", json={"templateID": template})

    assert answer.status_code in (400, 404)
    assert answer.json()["message"]


@pytest.mark.parametrize("timeout", [24 * 3600 + 1, 10**9, 10**18, -1, "soon", 1.5, None, True])
def test_timeouts_out_of_range_are_a_bad_request(api, timeout):
    answer = api.post("/v2/sandboxes", json={"templateID": "base", "timeout": timeout})

    assert answer.status_code == 400
    assert "timeout" in answer.json()["message"]


def test_a_too_long_timeout_is_an_error_of_the_client(sandbox):
    with pytest.raises(e2b.SandboxException, match=r"(?i)timeout"):
        Sandbox.create(timeout=24 * 3600 + 1)
    with pytest.raises(e2b.SandboxException, match=r"(?i)timeout"):
        sandbox.set_timeout(24 * 3600 + 1)


def test_a_missing_sandbox_is_not_found_everywhere(emberbox):
    for call in (Sandbox.get_info, Sandbox.connect, Sandbox.pause, Sandbox.create_snapshot, Sandbox.get_metrics):
        with pytest.raises(e2b.SandboxNotFoundException):
            call(MISSING)
    with pytest.raises(e2b.SandboxNotFoundException):
        Sandbox.set_timeout(MISSING, 60)
    with pytest.raises(e2b.SandboxNotFoundException):
        Sandbox.update_network(MISSING, {"deny_out": ["1.1.1.1"]})
    assert Sandbox.kill(MISSING) is False


@pytest.mark.parametrize("sandbox_id", ["../teams", "a b", "i%2e%2e", "é", "x" * 3000, "'; drop table sandboxes; --"])
def test_odd_sandbox_ids_are_not_found(api, sandbox_id):
    from urllib.parse import quote

    answer = api.get("/sandboxes/" + quote(sandbox_id, safe=""))

    assert answer.status_code in (400, 404)
    assert answer.json()["code"] == answer.status_code


def test_a_killed_sandbox_is_not_running_for_its_client(make_sandbox):
    sandbox = make_sandbox()
    sandbox.kill()

    with pytest.raises(e2b.SandboxNotRunningException):
        sandbox.commands.run("echo")
    with pytest.raises(e2b.SandboxNotRunningException):
        sandbox.files.read("/etc/hostname")
    with pytest.raises(e2b.SandboxNotRunningException):
        sandbox.files.list("/")
    with pytest.raises(e2b.SandboxNotRunningException):
        sandbox.pty.create(e2b.PtySize(rows=24, cols=80))
    with pytest.raises(e2b.SandboxNotFoundException):
        sandbox.get_info()


async def test_a_killed_sandbox_is_not_running_for_its_async_client(make_async_sandbox):
    sandbox = await make_async_sandbox()
    await sandbox.kill()

    with pytest.raises(e2b.SandboxNotRunningException):
        await sandbox.commands.run("echo")
    with pytest.raises(e2b.SandboxNotFoundException):
        await AsyncSandbox.get_info(sandbox.sandbox_id)


def test_a_wrong_agent_token_is_an_authentication_error(sandbox):
    stolen = Sandbox.connect(sandbox.sandbox_id)
    stolen.connection_config.sandbox_headers  # noqa: B018 - the property is built from the private headers below
    stolen.connection_config._ConnectionConfig__extra_sandbox_headers["X-Access-Token"] = "wrong"
    stolen = Sandbox(
        sandbox_id=stolen.sandbox_id, sandbox_domain=stolen.sandbox_domain, envd_version=stolen._envd_version,
        envd_access_token="wrong", traffic_access_token=None, connection_config=stolen.connection_config,
    )  # fmt: skip

    with pytest.raises(e2b.AuthenticationException):
        stolen.commands.run("echo")
    with pytest.raises(e2b.AuthenticationException):
        stolen.files.read("/etc/hostname")


MALFORMED = {
    "empty": b"",
    "cut": b"{",
    "list": b"[]",
    "null": b"null",
    "string": b'"text"',
    "binary": b"\xff\xfe\x00",
    "no-name": b"{}",
    "number-name": b'{"templateID": 5}',
    "string-metadata": b'{"templateID": "base", "metadata": "x"}',
    "number-in-metadata": b'{"templateID": "base", "metadata": {"a": 5}}',
    "list-envs": b'{"templateID": "base", "envVars": ["a"]}',
    "nan": b'{"templateID": "base", "timeout": NaN}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bodies_are_a_bad_request(api, body):
    answer = api.post("/v2/sandboxes", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert answer.json()["code"] == 400
    assert answer.json()["message"]


def test_deeply_nested_json_is_a_bad_request(api):
    answer = api.post("/v2/sandboxes", content=b"[" * 100_000, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400


def test_a_megabyte_of_metadata_is_refused_or_kept_whole(api):
    metadata = {"large": "x" * 1_000_000}

    answer = api.post("/v2/sandboxes", json={"templateID": "base", "timeout": whole_seconds(60), "metadata": metadata})
    if answer.status_code == 201:
        kept = api.get(f"/sandboxes/{answer.json()['sandboxID']}").json()["metadata"]
        Sandbox.kill(answer.json()["sandboxID"])
        assert kept == metadata
    else:
        assert answer.status_code in (400, 413)
        assert "metadata" in answer.json()["message"] or "large" in answer.json()["message"]


def test_a_huge_body_is_refused_without_reading_it_all(api):
    answer = api.post("/v2/sandboxes", content=b"x" * (64 << 20), headers={"Content-Type": "application/json"})

    assert answer.status_code in (400, 413)


def test_options_that_exclude_each_other_are_refused(api):
    resume_without_pause = api.post("/v2/sandboxes", json={"templateID": "base", "autoResume": {"enabled": True}})
    files_and_resume = api.post(
        "/v2/sandboxes",
        json={"templateID": "base", "autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}},
    )

    assert (resume_without_pause.status_code, files_and_resume.status_code) == (400, 400)


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_idempotency_keys_out_of_shape_are_refused(api, key):
    answer = api.post("/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": key})

    assert answer.status_code == 400
    assert "Idempotency-Key" in answer.json()["message"]


def test_unknown_routes_and_methods_answer_in_the_error_shape(api):
    for answer in (api.get("/no/such/route"), api.put("/v2/sandboxes"), api.patch(f"/sandboxes/{MISSING}")):
        assert answer.status_code in (404, 405)
        assert answer.json()["code"] == answer.status_code
        assert answer.json()["message"]


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "../../../../etc/shadow", "/home/user/../../etc/shadow", "~/../../etc/shadow"]
)
def test_paths_that_climb_reach_only_what_the_user_may(sandbox, path):
    with pytest.raises(Exception, match=r"(?i)permission denied"):
        sandbox.files.read(path)


@pytest.mark.parametrize("path", ["nul\x00byte", "x" * 5000, "/proc/1/environ", "/dev/zero\x00"])
def test_paths_nobody_can_open_are_clear_errors(sandbox, path):
    with pytest.raises((e2b.SandboxException, e2b.NotFoundException)):
        sandbox.files.read(path, request_timeout=seconds(60))


@pytest.mark.parametrize(
    "method",
    [
        "process.Process/Start",
        "process.Process/SendInput",
        "filesystem.Filesystem/Stat",
        "filesystem.Filesystem/WatchDir",
        "no.Such/Method",
    ],
)
@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"\x00\xff\xfe garbage"),
        ("application/json", b"{"),
        ("application/connect+json", b"\x00\xff\xff\xff\xffgarbage"),
        ("application/connect+json", b"\x7f"),
        ("application/proto", b"\xff" * 100),
        ("application/grpc", b"\x00\x00\x00\x00\x05hello"),
        ("text/plain", b"hello"),
    ],
    ids=["json-binary", "json-cut", "envelope-4-gib", "envelope-cut", "proto", "grpc", "text"],
)
def test_garbage_on_rpc_is_answered_and_survived(sandbox, agent_of, method, content_type, body):
    answer = agent_of(sandbox).post(f"/{method}", content=body, headers={"Content-Type": content_type})

    # Streams and gRPC report errors inside a 200 answer; nothing may be a server failure or a hang.
    assert answer.status_code < 500
    assert sandbox.is_running()


MULTIPART = "multipart/form-data; boundary=x"
OCTETS = "application/octet-stream"
CUT_PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut'
BROKEN_UPLOADS = {
    "no-multipart": ({"Content-Type": MULTIPART}, b"not multipart"),
    "no-boundary": ({"Content-Type": "multipart/form-data"}, b"--x--"),
    "cut": ({"Content-Type": MULTIPART}, CUT_PART),
    "no-gzip": ({"Content-Type": OCTETS, "Content-Encoding": "gzip"}, b"this is not gzip"),
    "unknown-encoding": ({"Content-Type": OCTETS, "Content-Encoding": "lzma"}, b"x"),
}


@pytest.mark.parametrize(("headers", "content"), BROKEN_UPLOADS.values(), ids=BROKEN_UPLOADS.keys())
def test_broken_uploads_are_a_bad_request_and_leave_no_file(sandbox, agent_of, headers, content):
    path = f"/home/user/{uuid.uuid4().hex}"

    answer = agent_of(sandbox).post("/files", params={"path": path}, content=content, headers=headers)

    assert answer.status_code in (400, 415)
    assert answer.json()["message"]
    assert not sandbox.files.exists(path)


def test_keys_of_other_teams_see_nothing_of_this_one(emberbox, host, sandbox):
    other = Api(emberbox, **{"X-API-KEY": new_team(host).key})
    sandbox_id = sandbox.sandbox_id

    answers = [
        other.get(f"/sandboxes/{sandbox_id}"),
        other.delete(f"/sandboxes/{sandbox_id}"),
        other.post(f"/sandboxes/{sandbox_id}/pause"),
        other.post(f"/v2/sandboxes/{sandbox_id}/connect", json={}),
        other.post(f"/sandboxes/{sandbox_id}/timeout", json={"timeout": 60}),
        other.get(f"/sandboxes/{sandbox_id}/logs"),
        other.get(f"/sandboxes/{sandbox_id}/metrics"),
    ]

    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert other.list_all() == []
    assert sandbox.is_running()
