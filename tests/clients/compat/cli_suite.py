"""One case of the version matrix for a release of E2B's CLI; `$E2B` is the installed program.

    python -m tests.clients.compat.cli_suite CASE

Exit codes as in `python_suite`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.clients.support.node import Terminal

E2B = os.environ.get("E2B", "e2b")
SCALE = float(os.environ.get("EMBERBOX_TEST_SCALE", "1"))


def e2b(*arguments: str, stdin: bytes | None = None, code: int = 0) -> str:
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([E2B, *arguments], capture_output=True, timeout=25 * SCALE, check=False, **source)
    text = done.stdout.decode()
    assert done.returncode == code, f"e2b {' '.join(arguments)}: exit {done.returncode}\n{text}\n{done.stderr.decode()}"
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class sandbox:
    """A sandbox made and killed by the CLI itself."""

    def __enter__(self) -> str:
        # Newer releases print the ID alone, older ones a sentence with it.
        text = e2b("sandbox", "create", "--detach", "base")
        found = re.search(r"\b[a-z0-9]{15,}\b", text)
        assert found, f"no sandbox ID in {text!r}"
        self.id = found[0]
        return self.id

    def __exit__(self, *_: object) -> None:
        e2b("sandbox", "kill", self.id)


def create_and_kill() -> None:
    with sandbox() as sandbox_id:
        assert sandbox_id in e2b("sandbox", "list")
    assert sandbox_id not in e2b("sandbox", "list")


def listed() -> None:
    with sandbox() as sandbox_id:
        assert sandbox_id in [each["sandboxId"] for each in json.loads(e2b("sandbox", "list", "--format", "json"))]


def exec_() -> None:
    with sandbox() as sandbox_id:
        assert e2b("sandbox", "exec", sandbox_id, "echo hello") == "hello\n"
        e2b("sandbox", "exec", sandbox_id, "exit 7", code=7)


def exec_stdin() -> None:
    with sandbox() as sandbox_id:
        assert e2b("sandbox", "exec", sandbox_id, "wc -c", stdin=b"12345").strip() == "5"


def connect() -> None:
    with sandbox() as sandbox_id:
        terminal = Terminal(E2B, "sandbox", "connect", sandbox_id, env={**os.environ, "TERM": "xterm"})
        try:
            terminal.wait_for("$", within=20)
            terminal.type("echo answer=$((6*7))\r")
            terminal.wait_for("answer=42", within=10)
            terminal.type("exit\r")
            assert terminal.wait(within=10) == 0
        finally:
            terminal.close()


def info() -> None:
    with sandbox() as sandbox_id:
        assert sandbox_id in e2b("sandbox", "info", sandbox_id)


def pause_and_resume() -> None:
    with sandbox() as sandbox_id:
        e2b("sandbox", "pause", sandbox_id)
        e2b("sandbox", "resume", sandbox_id)
        assert e2b("sandbox", "exec", sandbox_id, "echo back") == "back\n"


def logs() -> None:
    with sandbox() as sandbox_id:
        assert "Logs for sandbox" in e2b("sandbox", "logs", sandbox_id)


def metrics() -> None:
    with sandbox() as sandbox_id:
        deadline = time.monotonic() + 15 * SCALE
        while "Memory" not in e2b("sandbox", "metrics", sandbox_id):
            assert time.monotonic() < deadline, "no metrics"
            time.sleep(1)


def unknown_template() -> None:
    e2b("sandbox", "create", "--detach", f"none-{uuid.uuid4().hex[:8]}", code=1)


def template() -> None:
    name = f"compat-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "note.txt").write_text("note\n")
        Path(folder, "e2b.Dockerfile").write_text("FROM e2bdev/base\nCOPY note.txt /note.txt\n")
        e2b("template", "create", name, "--path", folder)
    assert name in e2b("template", "list")
    e2b("template", "publish", "--yes", name)
    e2b("template", "delete", "--yes", name)
    assert name not in e2b("template", "list")


CASES: dict[str, Callable[[], None]] = {
    "create_and_kill": create_and_kill,
    "list": listed,
    "exec": exec_,
    "exec_stdin": exec_stdin,
    "connect": connect,
    "info": info,
    "pause_and_resume": pause_and_resume,
    "logs": logs,
    "metrics": metrics,
    "unknown_template": unknown_template,
    "template": template,
}

if __name__ == "__main__":
    CASES[sys.argv[1]]()
