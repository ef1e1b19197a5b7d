"""JSON Schemas (draft 2020-12) of the published things, and the JSON-LD context that gives their words a meaning."""

from __future__ import annotations

from typing import Any

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TIME = {"type": "string", "format": "date-time"}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def sandbox_schema(address: str) -> dict[str, Any]:
    """The schema of a sandbox as `GET /sandboxes/{sandboxID}` answers it."""
    return {
        "$schema": DRAFT,
        "$id": f"{address}/schemas/sandbox.json",
        "title": "Sandbox",
        "description": "An isolated Linux with a deadline, reachable by ID.",
        "type": "object",
        "required": ["sandboxID", "templateID", "state"],
        "properties": {
            "sandboxID": {"type": "string"},
            "clientID": {"type": "string", "deprecated": True},
            "templateID": {"type": "string"},
            "alias": {"type": "string"},
            "envdVersion": {"type": "string"},
            "state": {"type": "string", "enum": ["running", "paused"]},
            "cpuCount": {"type": "integer", "minimum": 1},
            "memoryMB": {"type": "integer", "minimum": 128},
            "diskSizeMB": {"type": "integer", "minimum": 0},
            "metadata": _STRINGS,
            "envVars": _STRINGS,
            "startedAt": _TIME,
            "endAt": _TIME,
            "autoPause": {"type": "boolean"},
        },
        "examples": [
            {
                "sandboxID": "i0a1b2c3d4e5f6g7h8i9",
                "clientID": "emberbox",
                "templateID": "base",
                "envdVersion": "0.6.4",
                "state": "running",
                "cpuCount": 2,
                "memoryMB": 1024,
                "diskSizeMB": 10240,
                "metadata": {"task": "report"},
                "startedAt": "2026-01-01T12:00:00Z",
                "endAt": "2026-01-01T12:05:00Z",
            }
        ],
    }


def template_schema(address: str) -> dict[str, Any]:
    """The schema of a template as `GET /templates` answers it."""
    return {
        "$schema": DRAFT,
        "$id": f"{address}/schemas/template.json",
        "title": "Template",
        "description": "A named recipe result that sandboxes start from.",
        "type": "object",
        "required": ["templateID", "buildID", "cpuCount", "memoryMB", "public"],
        "properties": {
            "templateID": {"type": "string"},
            "buildID": {"type": "string"},
            "buildStatus": {"type": "string"},
            "names": {"type": "array", "items": {"type": "string"}},
            "aliases": {"type": "array", "items": {"type": "string"}, "deprecated": True},
            "cpuCount": {"type": "integer", "minimum": 1},
            "memoryMB": {"type": "integer", "minimum": 128},
            "diskSizeMB": {"type": "integer", "minimum": 0},
            "public": {"type": "boolean"},
            "envdVersion": {"type": "string"},
            "createdAt": _TIME,
            "updatedAt": _TIME,
            "lastSpawnedAt": {"type": ["string", "null"], "format": "date-time"},
            "spawnCount": {"type": "integer", "minimum": 0},
            "buildCount": {"type": "integer", "minimum": 0},
        },
        "examples": [
            {
                "templateID": "base",
                "buildID": "6f1c2f3e-2a3b-4c5d-8e9f-0a1b2c3d4e5f",
                "names": ["default/base"],
                "cpuCount": 2,
                "memoryMB": 1024,
                "diskSizeMB": 10240,
                "public": True,
                "createdAt": "2026-01-01T12:00:00Z",
                "updatedAt": "2026-01-01T12:00:00Z",
            }
        ],
    }


def context(address: str) -> dict[str, Any]:
    """The JSON-LD 1.1 context; the `e2b` vocabulary lies under this installation's `/ns/`."""

    def typed(term: str, kind: str) -> dict[str, str]:
        return {"@id": term, "@type": f"schema:{kind}"}

    classes = (
        "Sandbox",
        "Template",
        "Build",
        "Volume",
        "Team",
        "APIKey",
        "AccessToken",
        "Desktop",
        "CodeInterpreter",
    )
    identifiers = ("sandboxID", "templateID", "buildID", "volumeID", "teamID", "apiKeyID", "accessTokenID")
    return {
        "@context": {
            "@version": 1.1,
            "schema": "https://schema.org/",
            "e2b": f"{address}/ns/",
            "@vocab": f"{address}/ns/",
            **{name: f"e2b:{name}" for name in classes},
            **{name: f"e2b:{name}" for name in identifiers},
            "cpuCount": typed("e2b:cpuCount", "Integer"),
            "memoryMB": typed("e2b:memoryMB", "Integer"),
            "autoPause": typed("e2b:autoPause", "Boolean"),
            "public": typed("e2b:public", "Boolean"),
            "names": {"@id": "e2b:names", "@container": "@set"},
            "tags": {"@id": "schema:keywords", "@container": "@set"},
            "startedAt": typed("schema:startTime", "DateTime"),
            "endAt": typed("schema:endTime", "DateTime"),
            "createdAt": typed("schema:dateCreated", "DateTime"),
            "updatedAt": typed("schema:dateModified", "DateTime"),
            # What users name themselves stays plain data.
            "metadata": {"@id": "e2b:metadata", "@type": "@json"},
            "envVars": {"@id": "e2b:envVars", "@type": "@json"},
            "network": {"@id": "e2b:network", "@type": "@json"},
        }
    }
