"""README's examples work as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.clients.support import node
from tests.clients.support.instance import ROOT
from tests.clients.support.timing import seconds

README = (ROOT / "README.md").read_text()


def example(language):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1, f"README has {len(blocks)} {language} examples"
    return blocks[0]


def test_the_python_example(emberbox, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", example("python")],
        cwd=tmp_path, env={**os.environ, **emberbox.client_env}, capture_output=True, text=True, timeout=seconds(400),
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello from")


@pytest.mark.timeout(seconds(1800))
def test_the_javascript_example(emberbox, tmp_path):
    node.install()
    # Modules are looked for beside the file.
    (tmp_path / "node_modules").symlink_to(node.JS / "node_modules")
    program = tmp_path / "example.mjs"
    program.write_text(example("javascript"))

    done = subprocess.run(
        ["node", str(program)],
        cwd=tmp_path, env=node.environment(emberbox, tmp_path), capture_output=True, text=True, timeout=seconds(400),
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert re.match(r"v\d+\.", done.stdout)
