"""docs/compatibility.md says what the application and the tests say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compatibility_tool", ROOT / "tools" / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tool: ModuleType) -> None:
    page = tool.PAGE.read_text()

    assert tool.render(page) == page, "run `python tools/compatibility.py`"


def test_every_named_test_exists(tool: ModuleType) -> None:
    assert tool.missing_tests() == []


def test_a_test_that_does_not_exist_is_noticed(tool: ModuleType) -> None:
    assert not tool._exists("tests/clients/test_create.py::test_nobody_wrote_this")
    assert not tool._exists("tests/clients/js/files.test.mjs::nobody wrote this")
    assert not tool._exists("tests/clients/test_nowhere.py::test_x")


def test_operations_that_are_not_built_are_told_apart(tool: ModuleType) -> None:
    states = {f"{one.method} {one.path}": one.state for one in tool.operations()}

    assert states["POST /v2/sandboxes"] == "works"
    assert states["GET /volumes"] == "answers 501"
