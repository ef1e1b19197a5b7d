"""The code interpreter's translation of Jupyter's MIME bundles, which runs inside sandboxes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(__file__).parents[2] / "templates/code-interpreter-v1/server/interpreter/results.py"


@pytest.fixture(scope="module")
def results() -> Any:
    spec = importlib.util.spec_from_file_location("interpreter_results", _PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_known_type_has_its_field_and_others_are_extra(results: Any) -> None:
    event = results.result_event(
        {"text/plain": "t", "text/html": "h", "image/png": "p", "e2b/chart": {"type": "line"}, "x/own": 1}, main=True
    )

    assert event == {
        "type": "result",
        "is_main_result": True,
        "text": "t",
        "html": "h",
        "png": "p",
        "chart": {"type": "line"},
        "extra": {"x/own": 1},
    }


@pytest.mark.parametrize(
    ("shown", "text"),
    [("'quoted'", "quoted"), ('"it\'s"', "it's"), ("'", "'"), ("''", ""), ("'a' + 'b\"", "'a' + 'b\""), ("42", "42")],
)
def test_a_strings_text_has_no_quotes(results: Any, shown: str, text: str) -> None:
    assert results.result_event({"text/plain": shown}, main=True)["text"] == text
