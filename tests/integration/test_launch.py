"""Starting a program as another user from a place which that user cannot reach."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import emberbox
from emberbox.cli import launch

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")

# Every Debian and Ubuntu has it; it owns nothing and runs nothing here.
USER = "games"
UID = pwd.getpwnam(USER).pw_uid


APPEND_TO_OWN_CODE = """
import emberbox
try:
    open(emberbox.__file__, "a")
except OSError as error:
    print(json.dumps([emberbox.__file__, error.errno]))
"""


@pytest.fixture
def closed() -> Iterator[Path]:
    """A directory that only root can enter."""
    directory = Path(tempfile.mkdtemp(prefix="emberbox-closed-"))
    (directory / "secret").write_text("root's")
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def data(closed: Path) -> Path:
    """A directory of the user's own below the closed one."""
    directory = closed / "data" / "api"
    directory.mkdir(parents=True)
    os.chown(directory, UID, UID)
    return directory


def run(
    script: str, *, writable: list[Path], readable: list[Path] | None = None, low_ports: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-P", "-c", script]
    return subprocess.run(
        launch.command(USER, program, writable=writable, readable=readable or [], low_ports=low_ports),
        env={**launch.environment(os.environ), **variables},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )


def answer(script: str, **arguments: Any) -> Any:
    """What the script printed as JSON."""
    done = run("import json, os, socket\n" + script, **arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_program_is_the_user_and_nobody_else(data: Path) -> None:
    script = "print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), open('/proc/self/status').read()]))"

    uids, gids, groups, status = answer(script, writable=[data])

    assert set(uids) == {UID}
    assert set(gids) == {pwd.getpwnam(USER).pw_gid}
    assert groups == []
    assert "NoNewPrivs:\t1" in status
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert f"{kind}:\t{0:016x}" in status


def test_its_data_below_a_closed_directory_can_be_read_and_written(data: Path) -> None:
    answer(f"open({str(data / 'db')!r}, 'w').write('kept'); print('null')", writable=[data])

    assert (data / "db").read_text() == "kept"
    assert (data / "db").stat().st_uid == UID


def test_what_else_lies_in_the_closed_directory_does_not_exist_for_it(closed: Path, data: Path) -> None:
    script = f"print(json.dumps([os.listdir({str(closed)!r}), os.path.exists({str(closed / 'secret')!r})]))"

    assert answer(script, writable=[data]) == [["data"], False]


def test_what_it_reads_below_a_closed_directory_is_there_and_cannot_be_written(closed: Path, data: Path) -> None:
    folder = closed / "templates"
    folder.mkdir()
    (folder / "one").write_text("a template")
    os.chown(folder / "one", UID, UID)
    script = f"""
text = open({str(folder / "one")!r}).read()
try:
    open({str(folder / "one")!r}, "a")
    error = 0
except OSError as caught:
    error = caught.errno
print(json.dumps([text, error]))
"""

    text, error = answer(script, writable=[data], readable=[folder])

    assert text == "a template"
    assert os.strerror(error) == "Read-only file system"


def test_code_below_a_closed_directory_runs_and_cannot_be_written(closed: Path, data: Path) -> None:
    source = closed / "src"
    shutil.copytree(Path(emberbox.__file__).parent, source / "emberbox", ignore=shutil.ignore_patterns("__pycache__"))
    # Even what belongs to the user.
    for path in source.rglob("*.py"):
        os.chown(path, UID, UID)

    path, error = answer(APPEND_TO_OWN_CODE, writable=[data], PYTHONPATH=str(source))

    assert path == str(source / "emberbox/__init__.py")
    assert os.strerror(error) == "Read-only file system"


def test_a_port_below_1024_is_refused_without_the_right_and_given_with_it(data: Path) -> None:
    script = "s = socket.socket(); s.bind(('127.0.0.1', 1022)); print('\"bound\"')"

    assert "PermissionError" in run("import socket\n" + script, writable=[data]).stderr
    assert answer(script, writable=[data], low_ports=True) == "bound"


def test_mounted_images_are_let_go(closed: Path, data: Path) -> None:
    mounted = closed / "merged"
    for name in ("lower", "upper", "work", "merged"):
        (closed / name).mkdir()
    options = f"lowerdir={closed}/lower,upperdir={closed}/upper,workdir={closed}/work"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(mounted)], check=True)
    try:
        mounts = answer("print(json.dumps(open('/proc/self/mountinfo').read()))", writable=[data])
    finally:
        subprocess.run(["umount", str(mounted)], check=True)

    assert str(mounted) not in mounts


def test_the_host_keeps_its_mounts(closed: Path, data: Path) -> None:
    def ours() -> list[str]:
        return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if closed.name in line]

    answer("print('null')", writable=[data])

    assert ours() == []


def test_a_user_that_does_not_exist_is_an_error_of_one_sentence(data: Path) -> None:
    done = subprocess.run(launch.command("nobody-of-this-name", ["/bin/true"]), cwd="/", capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == "launch: the user 'nobody-of-this-name' does not exist\n"
