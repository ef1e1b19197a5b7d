"""Reduce E2B's OpenAPI file to the facts that `tests/unit/control/test_contract.py` compares with our application.

    python tools/contract.py openapi.yml > tests/unit/control/contract.json

For each operation: parameters (place, name, required), the request body's properties and which of them are required,
and for each response the properties that an answer must have. Run it when E2B publishes a new file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

METHODS = ("get", "post", "put", "patch", "delete")


class Document:
    def __init__(self, document: dict[str, Any]) -> None:
        self._document = document

    def facts(self) -> dict[str, Any]:
        operations: dict[str, Any] = {}
        for path, methods in self._document["paths"].items():
            for method in METHODS:
                if method in methods:
                    operations[f"{method.upper()} {path}"] = self._operation(methods[method])
        return operations

    def resolve(self, node: Any) -> Any:
        while isinstance(node, dict) and "$ref" in node:
            target: Any = self._document
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node

    def _operation(self, operation: dict[str, Any]) -> dict[str, Any]:
        parameters = [self.resolve(parameter) for parameter in operation.get("parameters", [])]
        body = self.resolve(operation.get("requestBody") or {})
        facts: dict[str, Any] = {
            "parameters": sorted(
                [parameter["in"], parameter["name"], bool(parameter.get("required"))] for parameter in parameters
            ),
            "responses": {
                str(status): self._fields(self._json(self.resolve(response)))
                for status, response in sorted(operation["responses"].items(), key=lambda pair: str(pair[0]))
            },
        }
        if body:
            schema = self._not_null(self._json(body))
            facts["body"] = {
                "required": bool(body.get("required")),
                "fields": sorted(self.resolve(schema).get("properties", {})),
                "required_fields": sorted(self.resolve(schema).get("required", [])),
            }
        return facts

    @staticmethod
    def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
        """The schema of a body that may be left out, without the null."""
        for choice in schema.get("anyOf", []):
            if choice.get("type") != "null":
                return dict(choice)
        return schema

    @staticmethod
    def _json(holder: dict[str, Any]) -> dict[str, Any]:
        schema: dict[str, Any] = holder.get("content", {}).get("application/json", {}).get("schema", {})
        return schema

    def _fields(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What an answer must have: its kind, and the required properties of it or of its items."""
        schema = self.resolve(schema)
        if not schema:
            return {"kind": "none"}
        if schema.get("type") == "array":
            return {"kind": "array", "required": sorted(self.resolve(schema["items"]).get("required", []))}
        return {"kind": "object", "required": sorted(schema.get("required", []))}


def main() -> None:
    document = Document(yaml.safe_load(Path(sys.argv[1]).read_text()))
    json.dump(document.facts(), sys.stdout, indent=1, sort_keys=True)
    print()


if __name__ == "__main__":
    main()
