"""The OpenAPI document as one page of HTML that needs nothing from elsewhere, not even a script."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .3rem 0; } code, pre { font: 14px/1.4 ui-monospace, monospace; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; } .old { text-decoration: line-through; }
table { border-collapse: collapse; margin: .5rem 0 1rem; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } a { color: #8cf; } }
"""


def operations_page(document: dict[str, Any]) -> str:
    """Every operation, grouped by tag, with its parameters, body and answers."""
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append(_operation(method, path, operation))
    body = "\n".join(f"<h2>{escape(tag)}</h2>\n" + "\n".join(parts) for tag, parts in sorted(groups.items()))
    schemas = "\n".join(_schema(name, schema) for name, schema in document["components"]["schemas"].items())
    title = f"{document['info']['title']} API {document['info']['version']}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><p>Send an API key in the <code>X-API-Key</code> header. The same as data: "
        f'<a href="openapi.json">openapi.json</a>, <a href="openapi.yml">openapi.yml</a>.</p>\n'
        f"{body}\n<h2>Schemas</h2>\n{schemas}\n</body></html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    style = ' class="old"' if operation.get("deprecated") else ""
    parts = [
        f'<details><summary><span class="method">{method.upper()}</span><code{style}>{escape(path)}</code></summary>',
        f"<p>{escape(operation.get('description', ''))}</p>",
    ]
    if parameters := operation.get("parameters"):
        rows = (
            (one["name"], one["in"] + (", required" if one.get("required") else ""), one.get("description", ""))
            for one in parameters
        )
        parts.append(_table(("parameter", "in", ""), rows))
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, {escape(kind)}: {_shape(content.get('schema', {}))}</p>")
    answers = (
        (status, answer.get("description", ""), _shape(_first_schema(answer)))
        for status, answer in operation["responses"].items()
    )
    parts.append(_table(("answer", "", ""), answers, html_columns={2}))
    return "\n".join(parts) + "</details>"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = (
        (field + (" *" if field in required else ""), _shape(kind), kind.get("description", ""))
        for field, kind in schema.get("properties", {}).items()
    )
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"<p>{escape(schema.get('description', ''))}</p>"
        + _table(("field", "type", ""), rows, html_columns={1})
        + "</details>"
    )


def _first_schema(answer: dict[str, Any]) -> dict[str, Any]:
    for content in answer.get("content", {}).values():
        schema: dict[str, Any] = content.get("schema", {})
        return schema
    return {}


def _shape(schema: dict[str, Any]) -> str:
    """A type in a few words, as HTML."""
    if reference := schema.get("$ref"):
        name = escape(reference.rsplit("/", 1)[-1])
        return f'<a href="#{name}">{name}</a>'
    if variants := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_shape(variant) for variant in variants)
    if schema.get("type") == "array":
        return f"list of {_shape(schema.get('items', {}))}"
    if values := schema.get("enum"):
        return " | ".join(escape(str(value)) for value in values)
    return escape(str(schema.get("type", "")))


def _table(heads: tuple[str, ...], rows: Any, html_columns: set[int] | None = None) -> str:
    keep = html_columns or set()
    cells = "".join(
        "<tr>" + "".join(f"<td>{cell if i in keep else escape(str(cell))}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return "<table><tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + f"</tr>{cells}</table>"
