"""Reading DNS messages that anybody may have written."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberbox.node.dns import host_resolvers, matches, parse_answer


def _name(text: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in text.split(".")) + b"\0"


def _record(owner: bytes, kind: int, ttl: int, data: bytes) -> bytes:
    return owner + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data


def _answer(name: str, *records: bytes, flags: int = 0x8180) -> bytes:
    head = struct.pack("!6H", 7, flags, 1, len(records), 0, 0)
    return head + _name(name) + struct.pack("!HH", 1, 1) + b"".join(records)


def test_addresses_come_with_their_time_to_live() -> None:
    pointer = b"\xc0\x0c"
    message = _answer("Www.Example.com", _record(pointer, 1, 60, b"\1\2\3\4"), _record(pointer, 1, 90, b"\5\6\7\x08"))

    answer = parse_answer(message)

    assert answer.name == "www.example.com"
    assert answer.addresses == (("1.2.3.4", 60), ("5.6.7.8", 90))


def test_aliases_are_passed_over_and_their_addresses_count() -> None:
    alias = _record(b"\xc0\x0c", 5, 60, _name("edge.example.net"))
    message = _answer("a.example.com", alias, _record(_name("edge.example.net"), 1, 30, b"\1\1\1\1"))

    assert parse_answer(message).addresses == (("1.1.1.1", 30),)


def test_an_answer_is_read_up_to_its_first_64_addresses() -> None:
    many = [_record(b"\xc0\x0c", 1, 60, number.to_bytes(4, "big")) for number in range(4079)]

    answer = parse_answer(_answer("a.example.com", *many))

    assert answer.addresses == tuple((f"0.0.0.{number}", 60) for number in range(64))


def test_an_answer_whose_names_are_long_work_is_refused() -> None:
    """64 KB are enough for thousands of records that each point to a name of 126 parts."""
    name = ".".join("a" * 126)
    long_name = _record(_name(name), 16, 60, b"")
    pointer = struct.pack("!H", 0xC000 | (12 + len(_name("a.example.com")) + 4))

    with pytest.raises(ValueError, match="too many parts"):
        parse_answer(_answer("a.example.com", long_name, *[_record(pointer, 16, 60, b"")] * 5400))


def test_what_a_records_name_points_to_is_not_read() -> None:
    nowhere = _record(b"\xff\xff", 1, 60, b"\1\2\3\4")

    assert parse_answer(_answer("a.example.com", nowhere)).addresses == (("1.2.3.4", 60),)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0" * 11,
        _answer("a.b", flags=0x0100),  # a question
        _answer("a.b", _record(b"\xc0\x0c", 1, 1, b"\1\2\3\4"))[:-2],
        struct.pack("!6H", 7, 0x8180, 1, 1, 0, 0) + b"\xc0\x0c" * 10,  # a name that points to itself
    ],
)
def test_what_is_no_answer_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the module's one error
        parse_answer(message)


@given(st.binary(max_size=600))
def test_any_bytes_are_an_answer_or_refused(message: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_answer(message)


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("example.com", "example.com", True),
        ("www.example.com", "example.com", False),
        ("www.example.com", "*.example.com", True),
        ("a.b.example.com", "*.example.com", True),
        ("example.com", "*.example.com", False),
        ("evilexample.com", "*.example.com", False),
    ],
)
def test_a_star_is_every_name_below(name: str, pattern: str, expected: bool) -> None:
    assert matches(name, pattern) is expected


def test_resolvers_are_read_from_resolv_conf(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text("# nameserver 9.9.9.9\nsearch example.com\nnameserver 127.0.0.53\nnameserver  10.0.0.1 # home\n")

    assert host_resolvers(path) == ("127.0.0.53", "10.0.0.1")
    assert host_resolvers(tmp_path / "none") == ()
