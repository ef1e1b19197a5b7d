"""The JavaScript SDK: each file in js/ is a test of its own here, run by node's test runner."""

from __future__ import annotations

import pytest

from tests.clients.support import node
from tests.clients.support.timing import seconds

FILES = sorted(path.name for path in node.JS.glob("*.test.mjs"))


@pytest.mark.timeout(seconds(1800))
@pytest.mark.parametrize("name", FILES)
def test_javascript(emberbox, tmp_path, name):
    node.run_tests(emberbox, tmp_path, name)


def test_there_are_javascript_tests():
    assert len(FILES) >= 4
