"""Templates built with the JavaScript SDK: js/builds.mjs, run by node's test runner."""

from __future__ import annotations

import subprocess

import pytest

from tests.clients.support import node
from tests.clients.support.timing import seconds

pytestmark = [pytest.mark.timeout(seconds(600)), pytest.mark.xdist_group("builds")]


def test_javascript_builds(builder, tmp_path):
    node.install()

    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "--test-timeout", str(int(seconds(300) * 1000)), "builds.mjs"],
        cwd=node.JS, env=node.environment(builder, tmp_path), capture_output=True, text=True, timeout=seconds(580),
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    # A file whose tests were not found would pass too.
    assert "tests 0" not in done.stdout, done.stdout
