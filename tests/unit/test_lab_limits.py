"""What the lab's suite says of a lab that dies: skipped with the reason, never failed, never passed."""

from __future__ import annotations

import pytest

from tests.lab import limits

pytest_plugins = ["pytester"]

THREE = """
def test_first(): pass
def test_second(): assert False
def test_third(): pass
"""


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(THREE)
    return pytester.runpytest_inprocess("-p", "tests.lab.limits", "-p", "no:cacheprovider", "-rs", *options)


def test_a_failure_in_a_lab_that_lives_is_a_failure(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "why_dead", lambda: "")

    result = run(pytester)

    result.assert_outcomes(passed=2, failed=1)


def test_when_the_lab_dies_the_rest_is_skipped_with_the_reason(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "why_dead", lambda: "QEMU has ended; Kernel panic")

    result = run(pytester)

    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(
        ["*the lab died under it: QEMU has ended; Kernel panic*", "*the lab died before: QEMU has ended*"],
        consecutive=False,
    )
    assert result.ret == 0


def test_what_begins_too_late_is_skipped_with_the_reason(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "why_dead", lambda: "")

    result = run(pytester, "--lab-seconds=0")

    result.assert_outcomes(skipped=3)
    result.stdout.fnmatch_lines(["*the lab's 0 s are over; `make test-lab` runs everything*"])
