"""Bytes that come back are the bytes that went in, by every way in and every way out."""

from __future__ import annotations

import gzip
import hashlib
import os

import httpx
import pytest

from tests.clients.support.timing import seconds

ALL_BYTES = bytes(range(256))
CONTENTS = {
    "all-byte-values": ALL_BYTES * 17,
    "invalid-utf8": b"ok \xff\xfe \xc3\x28 \xe2\x82 \xf0\x9f \x80 end",
    "nul-and-newlines": b"\x00\r\n\n\r\x00\x1a\x04",
    "looks-like-multipart": b"--boundary\r\nContent-Disposition: form-data\r\n\r\nx\r\n--boundary--\r\n",
    "already-gzip": gzip.compress(ALL_BYTES * 100),
    "byte-order-mark": b"\xef\xbb\xbftext",
    "utf16": "ütf-16".encode("utf-16"),
    "two-megabytes": hashlib.shake_256(b"emberbox").digest(2_000_001),
}


def _write_multipart(sandbox, path, content):
    sandbox.files.write(path, content)


def _write_octet_stream(sandbox, path, content):
    sandbox.files.write(path, content, use_octet_stream=True)


def _write_gzip(sandbox, path, content):
    sandbox.files.write(path, content, gzip=True)


def _write_chunks(sandbox, path, content):
    sandbox.files.write(path, (content[i : i + 4096] for i in range(0, len(content), 4096)))


WRITERS = {
    "multipart": _write_multipart,
    "octet-stream": _write_octet_stream,
    "gzip": _write_gzip,
    "chunks": _write_chunks,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_what_is_read_is_what_was_written(sandbox, folder, writer, content):
    path = f"{folder}/file"

    writer(sandbox, path, content)

    assert bytes(sandbox.files.read(path, format="bytes")) == content
    assert bytes(sandbox.files.read(path, format="bytes", gzip=True)) == content
    assert b"".join(sandbox.files.read(path, format="stream")) == content
    assert b"".join(sandbox.files.read(path, format="stream", gzip=True)) == content
    assert sandbox.files.read(path) == content.decode("utf-8", "replace")
    assert sandbox.commands.run(f"sha256sum < {path}").stdout.split()[0] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzip"])
def test_text_comes_back_as_text(sandbox, folder, gzipped):
    text = "".join(chr(n) for n in range(1, 0x2FFF) if not 0xD800 <= n < 0xE000) + "🔥\r\n"

    sandbox.files.write(f"{folder}/text", text, gzip=gzipped)

    assert sandbox.files.read(f"{folder}/text", gzip=gzipped) == text


def test_ranges_are_the_asked_bytes(sandbox, folder, agent_of):
    content = hashlib.shake_256(b"range").digest(100_000)
    sandbox.files.write(f"{folder}/file", content)
    agent = agent_of(sandbox)

    def ask(value):
        return agent.get("/files", params={"path": f"{folder}/file"}, headers={"Range": value})

    first, middle, last, rest = ask("bytes=0-0"), ask("bytes=1000-1999"), ask("bytes=-5"), ask("bytes=99990-")
    beyond = ask("bytes=100000-")

    assert [answer.status_code for answer in (first, middle, last, rest)] == [206] * 4
    assert first.content == content[:1]
    assert middle.content == content[1000:2000]
    assert middle.headers["content-range"] == "bytes 1000-1999/100000"
    assert last.content == content[-5:]
    assert rest.content == content[99_990:]
    assert beyond.status_code == 416


def test_a_range_of_a_compressible_file_is_not_mixed_up_with_gzip(sandbox, folder, agent_of):
    content = ALL_BYTES * 400
    sandbox.files.write(f"{folder}/file", content)

    answer = agent_of(sandbox).get(
        "/files", params={"path": f"{folder}/file"}, headers={"Range": "bytes=256-767", "Accept-Encoding": "gzip"}
    )

    assert answer.status_code == 206
    assert answer.content == ALL_BYTES * 2


def test_a_plain_download_carries_its_length(sandbox, folder, agent_of):
    sandbox.files.write(f"{folder}/file", b"x" * 12345)

    answer = agent_of(sandbox).get("/files", params={"path": f"{folder}/file"}, headers={"Accept-Encoding": "identity"})

    assert answer.headers["content-length"] == "12345"
    assert "charset" not in answer.headers.get("content-type", "")


def test_a_large_file_goes_up_and_down(sandbox, folder):
    content = os.urandom(1 << 20) * 64
    digest = hashlib.sha256(content).hexdigest()

    sandbox.files.write(f"{folder}/large", content, use_octet_stream=True, request_timeout=seconds(400))
    inside = sandbox.commands.run(f"sha256sum < {folder}/large", timeout=seconds(400)).stdout.split()[0]
    received = hashlib.sha256()
    for chunk in sandbox.files.read(f"{folder}/large", format="stream"):
        received.update(chunk)
    sandbox.files.remove(f"{folder}/large")

    assert inside == digest
    assert received.hexdigest() == digest


def test_standard_streams_are_exact_for_text(sandbox):
    text = "".join(chr(n) for n in range(1, 128) if chr(n) not in "\r") + "äöü日本🔥"
    handle = sandbox.commands.run("cat", background=True, stdin=True)

    handle.send_stdin(text)
    handle.close_stdin()

    assert handle.wait().stdout == text


def test_binary_stdin_arrives_exactly(sandbox, folder):
    content = ALL_BYTES * 1000
    handle = sandbox.commands.run(f"cat > {folder}/file", background=True, stdin=True)

    for start in range(0, len(content), 64_000):
        handle.send_stdin(content[start : start + 64_000])
    handle.close_stdin()
    handle.wait()

    assert bytes(sandbox.files.read(f"{folder}/file", format="bytes")) == content


def test_signed_urls_download_and_upload_exact_bytes(sandbox, folder, emberbox):
    route = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    upload = sandbox.upload_url(f"{folder}/signed file.bin", use_signature_expiration=60)
    download = sandbox.download_url(f"{folder}/signed file.bin")

    up = httpx.post(upload, files={"file": ("ignored", ALL_BYTES)}, headers=route, timeout=seconds(120))
    down = httpx.get(download, headers=route, timeout=seconds(120))

    assert up.status_code == 200, up.text
    assert down.content == ALL_BYTES


def test_signed_urls_are_good_for_their_path_user_operation_and_time_only(sandbox, folder, emberbox):
    route = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    sandbox.files.write(f"{folder}/file", "x")
    url = sandbox.download_url(f"{folder}/file")

    def get(address):
        return httpx.get(address, headers=route, timeout=seconds(120)).status_code

    assert get(url) == 200
    assert get(url.replace("signature=v1_", "signature=v1_A")) == 401
    assert get(str(httpx.URL(url).copy_set_param("path", "/etc/hostname"))) == 401
    assert get(url + "&username=root") == 401
    assert get(sandbox.download_url(f"{folder}/file", use_signature_expiration=-10)) == 401
    assert httpx.post(url, files={"file": b"y"}, headers=route, timeout=seconds(120)).status_code == 401
    assert sandbox.files.read(f"{folder}/file") == "x"
