"""What is published for agents: capability files, schemas, linked data, the OpenAPI document, the skill."""

from __future__ import annotations

import io
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate as validate_openapi
from pyld import jsonld

from emberbox.api.app import create_app
from emberbox.api.capabilities.catalogue import CAPABILITIES, OPERATIONS
from emberbox.api.capabilities.schemas import context, sandbox_schema, template_schema
from emberbox.api.capabilities.specification import specification
from emberbox.settings import Settings

ROOT = Path(__file__).parents[3]
SPECIFICATION = ROOT.parent / "shared" / "reference" / "naftiko-schema.json"
"""Not ours, so not in the repository; CI has it beside the checkout."""
ADDRESS = "http://emberbox.test:3000"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def capability_schema() -> Draft202012Validator:
    if not SPECIFICATION.exists():
        pytest.skip(f"the published schema of capability files is not at {SPECIFICATION}")
    return Draft202012Validator(json.loads(SPECIFICATION.read_text()))


@pytest.fixture(scope="module")
def client(app: Any) -> TestClient:
    # Without its lifespan: what is published needs no control plane.
    return TestClient(app, base_url=ADDRESS)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda one: one.name)
def test_a_capability_file_is_current(capability: Any) -> None:
    text = (ROOT / "capabilities" / f"{capability.name}.yaml").read_text()

    assert yaml.safe_load(text) == specification(capability), "run 'python tools/capabilities.py'"


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda one: one.name)
def test_a_capability_file_is_valid(capability: Any, capability_schema: Draft202012Validator) -> None:
    document = yaml.safe_load((ROOT / "capabilities" / f"{capability.name}.yaml").read_text())

    assert list(capability_schema.iter_errors(document)) == []


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda one: one.name)
def test_a_served_capability_has_the_address_it_was_asked_at(capability: Any, client: TestClient) -> None:
    answer = client.get(f"/capabilities/{capability.name}.yaml")

    document = yaml.safe_load(answer.text)
    assert document["capability"]["consumes"][0]["baseUri"] == ADDRESS


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda one: one.name)
def test_every_published_operation_takes_what_the_application_declares(operation: Any, app: Any) -> None:
    declared = app.openapi()["paths"][operation.path][operation.method.lower()]
    components = app.openapi()["components"]["schemas"]
    fields: set[str] = {parameter["name"] for parameter in declared.get("parameters", ())}
    for content in declared.get("requestBody", {}).get("content", {}).values():
        for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(content)):
            fields |= set(components[name]["properties"])

    assert {parameter.name for parameter in operation.parameters} <= fields


def test_unknown_documents_are_refused_with_the_names_there_are(client: TestClient) -> None:
    answer = client.get("/schemas/sandbx.json")

    assert answer.status_code == 404
    assert "sandbox.json" in answer.json()["message"]


@pytest.mark.parametrize("name", ["sandbox", "template"])
def test_a_schema_is_valid_and_its_examples_are(name: str, client: TestClient) -> None:
    schema = client.get(f"/schemas/{name}.json").json()

    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"{ADDRESS}/schemas/{name}.json"
    assert schema["examples"]
    for example in schema["examples"]:
        assert list(Draft202012Validator(schema).iter_errors(example)) == []


def test_the_published_requirements_are_in_the_sandbox_schema() -> None:
    validator = Draft202012Validator(sandbox_schema(ADDRESS))

    broken = [{"sandboxID": "i1", "templateID": "base"}, {"sandboxID": "i1", "templateID": "base", "state": "gone"}]

    assert [bool(list(validator.iter_errors(one))) for one in broken] == [True, True]


def test_a_sandbox_expands_to_linked_data() -> None:
    example = sandbox_schema(ADDRESS)["examples"][0]

    expanded = jsonld.expand({**context(ADDRESS), "@type": "Sandbox", **example})

    assert expanded[0]["@type"] == [f"{ADDRESS}/ns/Sandbox"]
    assert expanded[0]["https://schema.org/startTime"][0]["@type"] == "https://schema.org/DateTime"
    assert expanded[0][f"{ADDRESS}/ns/metadata"][0]["@value"] == {"task": "report"}
    assert set(template_schema(ADDRESS)["examples"][0]) <= set(template_schema(ADDRESS)["properties"])


def test_the_openapi_document_is_valid_in_both_forms(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    validate_openapi(document)
    assert yaml.safe_load(client.get("/openapi.yml").text) == document


def test_the_page_of_operations_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs").text

    assert "/sandboxes/{sandboxID}/pause" in page
    assert not re.search(r"<script|<link|(?:src|href)=\"(?:https?:)?//", page)


def test_the_catalogue_leads_to_documents_that_are_there(client: TestClient) -> None:
    catalogue = client.get("/.well-known/api-catalog")

    assert catalogue.headers["content-type"].startswith("application/linkset+json")
    links = [
        link["href"]
        for kind in ("service-desc", "service-doc", "service-meta", "status")
        for link in catalogue.json()["linkset"][0][kind]
    ]
    assert [client.get(href).status_code // 100 for href in links] == [2] * len(links)


def test_the_page_for_models_names_every_operation(client: TestClient) -> None:
    text = client.get("/llms.txt").text

    assert [operation.path for operation in OPERATIONS if operation.path not in text] == []


def test_the_skill_archive_holds_instructions_and_a_script_that_compiles(client: TestClient) -> None:
    archive = zipfile.ZipFile(io.BytesIO(client.get("/skill.zip").content))

    front = yaml.safe_load(archive.read("emberbox/SKILL.md").decode().split("---")[1])
    assert front["name"] == "emberbox"
    assert 0 < len(front["description"]) <= 1024
    compile(archive.read("emberbox/scripts/sandbox.py"), "sandbox.py", "exec")
    assert sys.version_info >= (3, 8)
