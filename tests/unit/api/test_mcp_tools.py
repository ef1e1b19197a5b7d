"""The MCP tools against the catalogue and the REST operations that they stand for."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from emberbox.api.app import create_app
from emberbox.api.capabilities.catalogue import OPERATIONS, Operation
from emberbox.api.mcp.clipped import Clipped
from emberbox.api.mcp.tool import Tool
from emberbox.api.mcp.tools import PUBLISHED
from emberbox.api.mcp.work import WORK
from emberbox.settings import Settings

TOOLS = {tool.name: tool for tool in PUBLISHED}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data"))).openapi()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_published_operation_has_a_tool_with_its_hints(operation: Operation):
    tool = TOOLS[operation.tool]

    assert (tool.title, tool.description) == (operation.title, operation.description)
    assert (tool.read_only, tool.destructive, tool.idempotent) == (
        operation.read_only,
        operation.destructive,
        operation.idempotent,
    )


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_tool_takes_what_its_rest_operation_takes(operation: Operation, document: dict[str, Any]):
    declared = document["paths"][operation.path][operation.method.lower()]
    schema = TOOLS[operation.tool].input_schema()

    assert set(schema["properties"]) == _rest_fields(declared, document)
    assert set(schema.get("required", ())) == _rest_required(declared, document)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_tool_takes_the_parameters_of_the_catalogue(operation: Operation):
    schema = TOOLS[operation.tool].input_schema()

    for parameter in operation.parameters:
        shown = schema["properties"][parameter.name]
        assert shown["description"] == parameter.description
        assert parameter.type in _types(shown)
        assert parameter.required == (parameter.name in schema.get("required", ()))


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_tool_answers_what_its_rest_operation_answers(operation: Operation, document: dict[str, Any]):
    answers = document["paths"][operation.path][operation.method.lower()]["responses"]
    success = next(answer for status, answer in answers.items() if status.startswith("2"))
    schema = TOOLS[operation.tool].output_schema()

    rest = success.get("content", {}).get("application/json", {}).get("schema")
    if rest is None:
        assert set(schema["properties"]) == {"sandboxID", "done"}
    elif rest.get("type") == "array":
        (only,) = schema["properties"].values()
        item = only["items"]["$ref"].rsplit("/", 1)[-1]
        assert item == rest["items"]["$ref"].rsplit("/", 1)[-1]
    else:
        name = rest["$ref"].rsplit("/", 1)[-1]
        assert set(schema["properties"]) == set(document["components"]["schemas"][name]["properties"])


@pytest.mark.parametrize("tool", [*PUBLISHED, *WORK], ids=lambda tool: tool.name)
def test_the_schemas_of_a_tool_are_schemas_and_every_input_is_explained_or_plain(tool: Tool):
    for schema in (tool.input_schema(), tool.output_schema()):
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["type"] == "object"
    assert tool.input_schema()["additionalProperties"] is False


def test_an_optional_argument_is_shown_as_its_type():
    timeout = TOOLS["e2b-resume-sandbox"].input_schema()["properties"]["timeout"]

    assert timeout["type"] == "integer"
    assert "anyOf" not in timeout
    assert "default" not in timeout


def test_names_are_not_used_twice():
    names = [tool.name for tool in (*PUBLISHED, *WORK)]

    assert len(names) == len(set(names))


def test_short_output_is_shown_whole():
    clipped = Clipped(10)

    for part in (b"abc", b"", b"defghij"):
        clipped.add(part)

    assert (clipped.text(), clipped.left_out) == ("abcdefghij", 0)


def test_long_output_is_shown_by_its_beginning_and_its_end():
    clipped = Clipped(6)

    for byte in b"abcdefghij":
        clipped.add(bytes([byte]))

    assert clipped.text() == "abc\n... 4 bytes left out ...\nhij"
    assert (clipped.left_out, clipped.total) == (4, 10)


def _rest_fields(declared: dict[str, Any], document: dict[str, Any]) -> set[str]:
    return {one["name"] for one in declared.get("parameters", ())} | set(
        _body(declared, document).get("properties", ())
    )


def _rest_required(declared: dict[str, Any], document: dict[str, Any]) -> set[str]:
    needed = {one["name"] for one in declared.get("parameters", ()) if one.get("required")}
    return needed | set(_body(declared, document).get("required", ()))


def _body(declared: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """The schema of an operation's body; optional bodies are declared as one of a schema and null."""
    schema = declared.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    references = [schema, *schema.get("anyOf", ())]
    name = next((each["$ref"].rsplit("/", 1)[-1] for each in references if "$ref" in each), None)
    return document["components"]["schemas"][name] if name else {}


def _types(schema: dict[str, Any]) -> set[str]:
    return {each.get("type", "") for each in (schema, *schema.get("anyOf", ()))}
