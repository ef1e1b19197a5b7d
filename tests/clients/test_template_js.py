"""Templates built with the JavaScript SDK: js/builds.mjs, run by node's test runner."""

from __future__ import annotations

import pytest

from tests.clients.support import node
from tests.clients.support.timing import seconds

pytestmark = [pytest.mark.timeout(seconds(1800)), pytest.mark.xdist_group("builds")]


def test_javascript_builds(builder, tmp_path):
    node.run_tests(builder, tmp_path, "builds.mjs", each=800, within=1700)
