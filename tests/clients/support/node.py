"""The JavaScript SDK and the CLI: installed from their lock file, run as programs."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pty
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.clients.support.instance import Emberbox
from tests.clients.support.timing import SCALE, seconds

JS = Path(__file__).resolve().parents[1] / "js"
CLI = JS / "node_modules" / ".bin" / "e2b"


def install(folder: Path = JS) -> None:
    """`npm ci`, when what is installed is not what the lock file says. Safe to call from several processes."""
    stamp = folder / "node_modules" / ".installed-from"
    wanted = (folder / "package-lock.json").read_text()
    with _locked(Path(tempfile.gettempdir()) / f"emberbox-npm-ci-{os.getuid()}.lock"):
        if stamp.exists() and stamp.read_text() == wanted:
            return
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError("npm is not installed; `make install` installs it")
        done = subprocess.run(
            [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=folder, capture_output=True, text=True, timeout=seconds(1200), check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"npm ci failed in {folder}:\n{done.stdout}\n{done.stderr}")
        stamp.write_text(wanted)


def environment(emberbox: Emberbox, home: Path) -> dict[str, str]:
    """What a user would have set: the three variables, and a home without an earlier login."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("E2B_")}
    return {
        **kept,
        **emberbox.client_env,
        "HOME": str(home),
        "EMBERBOX_TEST_SCALE": str(SCALE),
        "NO_COLOR": "1",
        "FORCE_COLOR": "0",
        "TERM": "dumb",
    }


def run_tests(emberbox: Emberbox, home: Path, name: str, *, each: float = 400, within: float = 1200) -> None:
    """Run a file of js/ with node's test runner; `each` test, and all of them, may take so many (unscaled) seconds."""
    install()
    done = subprocess.run(
        ["node", "--test", "--test-reporter=spec", "--test-timeout", str(int(seconds(each) * 1000)), name],
        cwd=JS, env=environment(emberbox, home), capture_output=True, text=True, timeout=seconds(within), check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
    # A file whose tests were not found would pass too.
    assert "tests 0" not in done.stdout, done.stdout


def run_cli(
    *arguments: str,
    env: Mapping[str, str],
    stdin: bytes | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run `e2b` without a terminal. Standard input is /dev/null unless bytes are given."""
    done = subprocess.run(
        [str(CLI), *arguments],
        env=dict(env), capture_output=True, timeout=seconds(timeout), check=False,
        **({"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}),
    )  # fmt: skip
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class Terminal:
    """A program in a pseudo-terminal, as a person would use it."""

    def __init__(self, *command: str, env: Mapping[str, str]) -> None:
        self.output = b""
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], list(command), dict(env))

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, within: float = 120) -> None:
        deadline = time.monotonic() + seconds(within)
        while text.encode() not in self.output:
            if time.monotonic() > deadline or not self._read(0.2):
                raise AssertionError(
                    f"{text!r} was not shown; the terminal shows:\n{self.output.decode(errors='replace')}"
                )

    def wait(self, within: float = 120) -> int:
        """The exit code, after the rest of the output."""
        deadline = time.monotonic() + seconds(within)
        while self._read(0.2):
            if time.monotonic() > deadline:
                self.close()
                raise AssertionError(f"did not end; the terminal shows:\n{self.output.decode(errors='replace')}")
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        os.close(self._fd)

    def _read(self, patience: float) -> bool:
        """Read what there is; False when the program has closed its side."""
        if not select.select([self._fd], [], [], patience)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self.output += data
        return bool(data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
