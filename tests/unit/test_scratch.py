"""Folders for work in progress."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from emberbox.linux.scratch import scratch


def test_a_folder_goes_with_its_block_whatever_happens_in_it(tmp_path: Path) -> None:
    parent = tmp_path / "not yet there"
    with pytest.raises(OSError, match="disk full"):
        _half_make(parent)
    assert list(parent.iterdir()) == []


def test_what_was_renamed_out_of_it_stays(tmp_path: Path) -> None:
    with scratch(tmp_path) as work:
        (work / "file").write_text("whole")
        (work / "file").rename(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_two_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    with scratch(tmp_path) as first, scratch(tmp_path) as second:
        assert first != second
        assert first.is_dir()


def test_one_of_a_process_that_was_killed_goes_with_the_next(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal
from emberbox.linux.scratch import scratch
with scratch(pathlib.Path({str(tmp_path)!r})) as work:
    (work / "file").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    (tmp_path / "work-file").write_text("half")

    with scratch(tmp_path) as work:
        assert not left.exists()
        assert list(tmp_path.iterdir()) == [work]


def _half_make(parent: Path) -> None:
    with scratch(parent) as work:
        (work / "file").write_text("half")
        raise OSError("disk full")
