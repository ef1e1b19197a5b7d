"""The JavaScript SDK: each file in js/ is a test of its own here, run by node's test runner."""

from __future__ import annotations

import subprocess

import pytest

from tests.clients.support import node
from tests.clients.support.timing import seconds

FILES = sorted(path.name for path in node.JS.glob("*.test.mjs"))


@pytest.mark.timeout(seconds(300))
@pytest.mark.parametrize("name", FILES)
def test_javascript(emberbox, tmp_path, name):
    node.install()

    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "--test-timeout", str(int(seconds(120) * 1000)), name],
        cwd=node.JS, env=node.environment(emberbox, tmp_path), capture_output=True, text=True, timeout=seconds(280),
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
    # A file whose tests were not found would pass too.
    assert "tests 0" not in done.stdout, done.stdout


def test_there_are_javascript_tests():
    assert len(FILES) >= 4
