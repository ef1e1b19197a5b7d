"""The wheel that `make dist` builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "node_modules", "build", "dist", "__pycache__", "tests")


def test_the_wheel_has_the_agent_which_runs_and_the_templates(tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    shutil.copytree(TREE, copy, ignore=LEFT_OUT)
    tools = TREE / ".tools" / "bin"

    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, copy],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        check=True,
        timeout=600,
    )

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        agent = Path(archive.extract("emberbox/bin/emberd", tmp_path))
    assert {"emberbox/templates/base/recipe.toml", "emberbox/templates/desktop/template.toml"} <= set(names)
    agent.chmod(0o755)
    said = subprocess.run([agent, "-version"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split()[-1] == wheel.name.split("-")[1]
