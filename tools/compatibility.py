"""Write the tables of docs/compatibility.md: the operations from the application, the features from compatibility.yml.

    python tools/compatibility.py           # write
    python tools/compatibility.py --check   # exit code 1 when the page is stale or a named test does not exist

The table of tested releases on that page is written by `make compat`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emberbox.api import app as application
from emberbox.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
FEATURES = ROOT / "docs" / "compatibility.yml"
CONTRACT = ROOT / "tests" / "unit" / "control" / "contract.json"
CLIENTS = ("Python", "JavaScript", "CLI")
NOT_BUILT = "answers 501"
GONE = "answers 410, as at E2B"


@dataclass(frozen=True)
class Operation:
    """One operation and what it does here. `declared`: whether the application knows it."""

    method: str
    path: str
    state: str
    in_contract: bool


def operations() -> list[Operation]:
    """Every operation of E2B's file or of ours, sorted by path."""
    contract = set(json.loads(CONTRACT.read_text()))
    unbuilt = _handlers_that_raise("NotBuilt")
    gone = _handlers_that_raise("Gone")
    document = application.create_app(Settings(data_dir=Path("/nonexistent"))).openapi()
    ours: dict[str, str] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name = (method.upper(), path)
            if name in unbuilt:
                state = NOT_BUILT
            elif name in gone:
                state = GONE
            else:
                state = "works, where the runtime can" if "501" in operation["responses"] else "works"
            ours[" ".join(name)] = state
    found = []
    for name in sorted(contract | set(ours), key=lambda one: one.split()[::-1]):
        method, path = name.split()
        found.append(Operation(method, path, ours.get(name, "missing"), name in contract))
    return found


def _handlers_that_raise(error: str) -> set[tuple[str, str]]:
    """(method, path) of the handlers whose last statement raises `error`."""
    found = set()
    for router in application._ROUTERS:
        for route in router.routes:
            body = ast.parse(inspect.getsource(route.endpoint)).body[0]
            assert isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef))
            last = body.body[-1]
            if isinstance(last, ast.Raise) and f"{error}(" in ast.unparse(last):
                found |= {(method, route.path) for method in route.methods}
    return found


def features() -> dict[str, list[dict[str, Any]]]:
    """compatibility.yml as it is."""
    loaded: dict[str, list[dict[str, Any]]] = yaml.safe_load(FEATURES.read_text())
    return loaded


def missing_tests() -> list[str]:
    """Tests that compatibility.yml names and that do not exist."""
    named = [test for group in features().values() for one in group for test in one["tests"]]
    return [test for test in named if not _exists(test)]


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = ROOT / file
    if not path.is_file():
        return False
    text = path.read_text()
    if path.suffix != ".py":
        return f"test('{name}'" in text
    return any(
        isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name
        for node in ast.walk(ast.parse(text))
    )


def _client_of(test: str) -> str:
    if "/js/" in test:
        return "JavaScript"
    return "CLI" if "cli.py" in test else "Python"


def render(page: str) -> str:
    """The page with its two tables made anew."""
    return _replace(_replace(page, "operations", _operations_table()), "features", _features_table())


def _operations_table() -> str:
    lines = ["| operation | here |", "|---|---|"]
    for one in operations():
        extra = "" if one.in_contract else " (newer than E2B's published file)"
        lines.append(f"| `{one.method} {one.path}` | {one.state}{extra} |")
    return "\n".join(lines)


def _features_table() -> str:
    lines = ["| feature | " + " | ".join(CLIENTS) + " |", "|---|" + "---|" * len(CLIENTS)]
    for group, rows in features().items():
        lines.append(f"| **{group}** |" + " |" * len(CLIENTS))
        for row in rows:
            cells = []
            for client in CLIENTS:
                tests = [_link(test) for test in row["tests"] if _client_of(test) == client]
                cells.append(", ".join(tests))
            lines.append(f"| {row['feature']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _link(test: str) -> str:
    file, _, name = test.partition("::")
    return f"[{name.removeprefix('test_').replace('_', ' ')}](../{file})"


def _replace(page: str, block: str, content: str) -> str:
    begin, end = f"<!-- {block}: begin -->", f"<!-- {block}: end -->"
    head, found, rest = page.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no place for the {block}: it needs the lines {begin} and {end}")
    return f"{head}{begin}\n{content}\n{end}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    problems = [f"{FEATURES.name} names a test that does not exist: {test}" for test in missing_tests()]
    page = PAGE.read_text()
    fresh = render(page)
    if asked.check and fresh != page:
        problems.append(f"{PAGE.name} is stale: run `python tools/compatibility.py`")
    if not asked.check:
        PAGE.write_text(fresh)
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
