"""Splitting a Connect stream into its messages."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberbox.api import agent_client
from emberbox.api.agent_client import StreamError, envelope
from emberbox.cli.output import printable


async def read(data: bytes, cuts: list[int]) -> list[dict[str, Any]]:
    async def chunks() -> AsyncIterator[bytes]:
        last = 0
        for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
            yield data[last:cut]
            last = cut

    return [message async for message in agent_client.messages(chunks())]


def end(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack(">BI", 2, len(data)) + data


@given(
    messages=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3), max_size=6),
    cuts=st.lists(st.integers(0, 10_000), max_size=8),
)
async def test_messages_arrive_whole_however_the_stream_is_cut(messages: list[dict[str, str]], cuts: list[int]) -> None:
    stream = b"".join(envelope(message) for message in messages) + end({})

    assert await read(stream, cuts) == messages


async def test_nothing_is_read_after_the_end() -> None:
    assert await read(envelope({"a": 1}) + end({}) + envelope({"b": 2}), []) == [{"a": 1}]


async def test_an_error_at_the_end_is_told() -> None:
    with pytest.raises(StreamError, match="no such user"):
        await read(end({"error": {"code": "unauthenticated", "message": "no such user"}}), [])


def test_control_characters_from_a_sandbox_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b]0;title\x07b\n") == "a\\x1b]0;title\\x07b\\n"
    assert printable("grün ✓") == "grün ✓"
