"""What the application declares, compared with E2B's OpenAPI file and with the newest client."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emberbox.api.app import create_app
from emberbox.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from contract import Document

CONTRACT: dict[str, Any] = json.loads(Path(__file__).with_name("contract.json").read_text())

BODIES_THAT_ARE_ALWAYS_SENT = {
    # The file forgets to say so; there is nothing to do without one.
    "POST /sandboxes/{sandboxID}/timeout",
    "POST /nodes/{nodeID}",
}


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("data")))
    return Document(app.openapi()).facts()


@pytest.mark.parametrize("operation", sorted(CONTRACT))
def test_every_operation_of_the_contract_is_declared_alike(operation: str, declared: dict[str, Any]) -> None:
    wanted, ours = CONTRACT[operation], declared.get(operation)

    assert ours is not None, "not declared"
    missing = [parameter for parameter in wanted["parameters"] if parameter not in ours["parameters"]]
    assert missing == []
    extra_required = [one for one in ours["parameters"] if one[2] and one not in wanted["parameters"]]
    assert extra_required == []
    assert set(wanted["responses"]) <= set(ours["responses"])


@pytest.mark.parametrize("operation", sorted(name for name in CONTRACT if "body" in CONTRACT[name]))
def test_every_request_body_takes_what_the_contract_has(operation: str, declared: dict[str, Any]) -> None:
    wanted, ours = CONTRACT[operation]["body"], declared[operation].get("body")

    assert ours is not None, "no body is declared"
    assert set(wanted["fields"]) <= set(ours["fields"])
    # Asking for more than the contract would refuse its clients.
    assert set(ours["required_fields"]) <= set(wanted["required_fields"])
    if not wanted["required"] and operation not in BODIES_THAT_ARE_ALWAYS_SENT:
        assert not ours["required"]


@pytest.mark.parametrize("operation", sorted(CONTRACT))
def test_every_answer_has_what_the_contract_requires(operation: str, declared: dict[str, Any]) -> None:
    ours = declared[operation]["responses"]

    for status, wanted in CONTRACT[operation]["responses"].items():
        if wanted["kind"] == "none":
            continue
        assert ours[status]["kind"] == wanted["kind"], status
        assert set(wanted["required"]) <= set(ours[status].get("required", [])), status


def client_operations() -> Iterator[tuple[str, list[str], list[str]]]:
    """(operation, query and header names, status codes) of the newest client's generated calls."""
    found = importlib.util.find_spec("e2b")
    assert found is not None
    assert found.origin is not None
    for source in sorted((Path(found.origin).parent / "api" / "client" / "api").glob("*/*.py")):
        text = source.read_text()
        url, method = re.search(r'"url": f?"([^"]+)"', text), re.search(r'"method": "(\w+)"', text)
        if url is None or method is None:
            continue
        path = re.sub(r"\{[^}]*\}", "{}", url[1])
        names = set(re.findall(r'(?:params|headers)\["([^"]+)"\]', text)) - {"Content-Type"}
        statuses = set(re.findall(r"status_code == (\d+)", text))
        # Sorted: pytest's workers must collect the same.
        yield f"{method[1].upper()} {path}", sorted(names), sorted(statuses)


@pytest.mark.parametrize(
    ("operation", "names", "statuses"),
    [pytest.param(*call, id=call[0]) for call in sorted(client_operations(), key=lambda call: call[0])],
)
def test_every_call_of_the_newest_client_is_declared(
    operation: str, names: list[str], statuses: list[str], declared: dict[str, Any]
) -> None:
    ours = {re.sub(r"\{[^}]*\}", "{}", name): facts for name, facts in declared.items()}

    assert operation in ours
    assert set(names) <= {name for _, name, _ in ours[operation]["parameters"]}
    assert {status for status in statuses if int(status) < 300} <= set(ours[operation]["responses"])


def test_every_error_is_declared_in_the_one_shape(declared: dict[str, Any]) -> None:
    shapes = {
        json.dumps(fields)
        for facts in declared.values()
        for status, fields in facts["responses"].items()
        if int(status) >= 400
    }

    assert shapes == {json.dumps({"kind": "object", "required": ["code", "message"]})}
