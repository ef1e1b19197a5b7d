"""A capability as a document that a capability engine runs: `capabilities/<name>.yaml`.

The document consumes Emberbox's API and exposes it as REST, MCP and Agent Skill. It follows the published
specification `naftiko` 1.0.0-alpha3; every file is checked against its schema in the tests.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from emberbox.api.capabilities.catalogue import Capability, Operation, Parameter

SPECIFICATION = "1.0.0-alpha3"
DEFAULT_ADDRESS = "http://localhost:3000"
"""The address in the files of the repository; a served document has the installation's own."""

_API = "emberbox"
_PUBLISHED = "2026-11-25"
_REST_PORT = 8080
_MCP_PORT = 9090
_SKILL_PORT = 9091


def specification(capability: Capability, address: str = DEFAULT_ADDRESS) -> dict[str, Any]:
    """The document of a capability, for the API at `address` (scheme, host and port)."""
    parts = urlsplit(address)
    base = f"{parts.scheme}://{parts.netloc}"
    return {
        "naftiko": SPECIFICATION,
        "info": {
            "label": f"Emberbox: {capability.label}",
            "description": capability.description,
            "tags": list(capability.tags),
            "created": _PUBLISHED,
            "modified": _PUBLISHED,
        },
        "binds": [
            {
                "namespace": "emberbox-env",
                "description": "The API key, from the environment of the engine.",
                "keys": {"E2B_API_KEY": "E2B_API_KEY"},
            }
        ],
        "capability": {
            "consumes": [_consumed(capability, base)],
            "exposes": [_rest(capability), _mcp(capability), _skill(capability)],
        },
    }


def _consumed(capability: Capability, base: str) -> dict[str, Any]:
    return {
        "namespace": _API,
        "type": "http",
        "description": "Emberbox's HTTP API.",
        "baseUri": base,
        "authentication": {
            "type": "apikey",
            "key": "X-API-Key",
            "value": "{{E2B_API_KEY}}",
            "placement": "header",
        },
        "resources": [_consumed_resource(path, found) for path, found in _by_path(capability).items()],
    }


def _consumed_resource(path: str, operations: list[Operation]) -> dict[str, Any]:
    resource: dict[str, Any] = {"name": _resource_name(path), "path": path}
    if in_path := [parameter for parameter in operations[0].parameters if parameter.place == "path"]:
        resource["inputParameters"] = [{"name": parameter.name, "in": "path"} for parameter in in_path]
    resource["operations"] = [_consumed_operation(operation) for operation in operations]
    return resource


def _consumed_operation(operation: Operation) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": operation.name,
        "description": operation.description,
        "method": operation.method,
    }
    # `sandbox_ids` and the like: what is in the path belongs to the resource.
    if given := [parameter for parameter in operation.parameters if parameter.place != "path"]:
        shown["inputParameters"] = [{"name": parameter.name, "in": parameter.place} for parameter in given]
    return shown


def _rest(capability: Capability) -> dict[str, Any]:
    return {
        "type": "rest",
        "port": _REST_PORT,
        "namespace": f"{capability.name}-rest",
        "resources": [
            {
                "name": _resource_name(path),
                "path": f"/v1{path}",
                "description": operations[0].description,
                "operations": [
                    {
                        "name": operation.name,
                        "description": operation.description,
                        "method": operation.method,
                        **_inputs(operation, rest=True),
                        **_call(operation),
                    }
                    for operation in operations
                ],
            }
            for path, operations in _by_path(capability).items()
        ],
    }


def _mcp(capability: Capability) -> dict[str, Any]:
    return {
        "type": "mcp",
        "transport": "http",
        "port": _MCP_PORT,
        "namespace": f"{capability.name}-mcp",
        "description": capability.description,
        "tools": [
            {
                "name": operation.tool,
                "label": operation.title,
                "description": operation.description,
                "hints": {
                    "readOnly": operation.read_only,
                    "destructive": operation.destructive,
                    "idempotent": operation.idempotent,
                    "openWorld": False,
                },
                **_inputs(operation, rest=False),
                **_call(operation),
            }
            for operation in capability.operations
        ],
    }


def _skill(capability: Capability) -> dict[str, Any]:
    return {
        "type": "skill",
        "port": _SKILL_PORT,
        "namespace": f"{capability.name}-skill",
        "description": capability.description,
        "skills": [
            {
                "name": f"emberbox-{capability.name}",
                "description": capability.description,
                "license": "Apache-2.0",
                "tools": [
                    {
                        "name": operation.name,
                        "description": operation.description,
                        "from": {"sourceNamespace": f"{capability.name}-mcp", "action": operation.tool},
                    }
                    for operation in capability.operations
                ],
            }
        ],
    }


def _inputs(operation: Operation, *, rest: bool) -> dict[str, Any]:
    if not operation.parameters:
        return {}
    return {"inputParameters": [_input(parameter, rest=rest) for parameter in operation.parameters]}


def _input(parameter: Parameter, *, rest: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "name": parameter.name,
        "type": parameter.type,
        "description": parameter.description,
    }
    if rest:
        shown["in"] = parameter.place
    else:
        shown["required"] = parameter.required
    return shown


def _call(operation: Operation) -> dict[str, Any]:
    call: dict[str, Any] = {"call": f"{_API}.{operation.name}"}
    if operation.parameters:
        call["with"] = {parameter.name: "{{" + parameter.name + "}}" for parameter in operation.parameters}
    return call


def _by_path(capability: Capability) -> dict[str, list[Operation]]:
    found: dict[str, list[Operation]] = {}
    for operation in capability.operations:
        found.setdefault(operation.path, []).append(operation)
    return found


def _resource_name(path: str) -> str:
    """`/sandboxes/{sandboxID}/pause` is `sandbox-pause`; `/sandboxes` and its kin keep their name."""
    parts = [part for part in path.split("/") if part]
    if "{sandboxID}" not in parts:
        return "-".join(parts)
    return "-".join(["sandbox", *parts[2:]])
