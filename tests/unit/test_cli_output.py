"""The command line when its caller has closed the standard streams, as some service managers do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, pathlib, subprocess, sys
from emberbox.cli.output import err, note, open_closed_streams, print_json
open_closed_streams()
note("nobody reads it")
err.print("nor this")
print_json({"nor": "this"})
look = "[os.readlink(f'/proc/self/fd/{number}') for number in range(3)]"
child = f"import os, pathlib; pathlib.Path('child').write_text(str({look}))"
subprocess.run([sys.executable, "-c", child], check=True)
pathlib.Path("parent").write_text(str(eval(look)))
"""


def test_closed_streams_lead_nowhere_also_for_children(tmp_path: Path) -> None:
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", SCRIPT)

    subprocess.run(closing, cwd=tmp_path, check=True, timeout=60)

    assert (tmp_path / "parent").read_text() == str(["/dev/null"] * 3)
    assert (tmp_path / "child").read_text() == str(["/dev/null"] * 3)


def test_the_command_works_without_them() -> None:
    closing = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "emberbox", "--version")

    assert subprocess.run(closing, check=False, timeout=60).returncode == 0
