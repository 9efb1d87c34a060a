"""The API's reference at `/docs`: the OpenAPI document as one page, made here and complete in itself.

No script, no picture, no font, nothing from another host: the page shows the same in a network that reaches
nothing, and its policy (`Content-Security-Policy`) lets the browser load nothing else. Whoever wants to send
requests from a page points a tool of their own at `/openapi.json`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

PATH: Final = "/docs"

_STYLE: Final = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, pre, .path { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { overflow-x: auto; padding: 0.6rem; border: 1px solid #8886; border-radius: 4px; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #8886; }
details { border: 1px solid #8886; border-radius: 4px; margin: 0.4rem 0; padding: 0.3rem 0.7rem; }
summary { cursor: pointer; }
.method { display: inline-block; min-width: 4rem; font-weight: bold; }
.gone { text-decoration: line-through; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; border-top: 1px solid #8886; padding: 0.2rem 0.6rem 0 0; }
"""
_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS: Final = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
_REFERENCE: Final = "#/components/schemas/"
_LIMITS: Final = {
    "minimum": "at least", "maximum": "at most", "exclusiveMinimum": "above", "exclusiveMaximum": "below",
    "minLength": "shortest", "maxLength": "longest", "minItems": "fewest", "maxItems": "most",
    "pattern": "pattern", "default": "default",
}  # fmt: skip


def install(app: FastAPI) -> None:
    """Serve the page at `/docs`, to anybody: it says what the API is, and nothing of what it holds."""

    @cache
    def page() -> str:
        return render(app.openapi())

    @app.get(PATH, include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(page(), headers=_HEADERS)


def render(document: Mapping[str, Any]) -> str:
    """Return an OpenAPI 3 document as an HTML page. Every text of it is escaped."""
    return "\n".join(_page(document)) + "\n"


def _page(document: Mapping[str, Any]) -> Iterator[str]:
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield f"<p>{_inline(info.get('summary', ''))}</p>\n{_prose(info.get('description', ''))}"
    yield '<p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
    for tag, about, operations in _by_tag(document):
        yield f'<h2 id="{_anchor(tag)}">{escape(tag)}</h2>\n{_prose(about)}'
        for method, path, operation in operations:
            yield from _operation(method, path, operation)
    schemas = document.get("components", {}).get("schemas", {})
    if schemas:
        yield '<h2 id="schemas">schemas</h2>'
    for name, schema in sorted(schemas.items()):
        yield f'<details id="schema-{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        yield f"{_prose(schema.get('description', ''))}{_properties(schema)}</details>"
    yield "</body>\n</html>"


def _by_tag(document: Mapping[str, Any]) -> Iterator[tuple[str, str, list[tuple[str, str, Any]]]]:
    """Yield (tag, description, its operations): declared tags in their order, then others, then none."""
    found: dict[str, list[tuple[str, str, Any]]] = {}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            tag = (operation.get("tags") or ["other"])[0]
            found.setdefault(tag, []).append((method, path, operation))
    described = {tag["name"]: tag.get("description", "") for tag in document.get("tags", [])}
    for tag in [*(name for name in described if name in found), *(n for n in found if n not in described)]:
        yield tag, described.get(tag, ""), found[tag]


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    gone = " gone" if operation.get("deprecated") else ""
    yield f'<details id="{_anchor(f"{method} {path}")}"><summary>'
    yield f'<span class="method">{escape(method.upper())}</span>'
    yield f'<span class="path{gone}">{escape(path)}</span> {_inline(operation.get("summary", ""))}</summary>'
    yield _prose(operation.get("description", ""))
    if operation.get("security"):
        yield "<p>Needs a key: <code>Authorization: Bearer …</code></p>"
    parameters = operation.get("parameters", [])
    if parameters:
        rows = [
            (p["name"], p["in"], _name_of(p["schema"], p.get("required", False)), p.get("description", ""))
            for p in parameters
        ]
        yield _table(("parameter", "in", "value", ""), rows)
    example: object = None
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = content.get("schema", {})
        yield f"<p>Body, <code>{escape(kind)}</code>: {_kind(schema)}</p>{_properties(schema)}"
        example = next(iter(schema.get("examples", [])), None)
    yield f"<pre>{escape(_command(method, path, operation, example))}</pre>"
    answers = []
    for status, response in operation["responses"].items():
        kinds = [
            f"<code>{escape(kind)}</code> {_kind(content['schema']) if content.get('schema') else ''}".strip()
            for kind, content in response.get("content", {}).items()
        ]
        answers.append((status, "", "<br>".join(kinds), response.get("description", "")))
    yield _table(("status", "", "answer", ""), answers)
    yield "</details>"


def _command(method: str, path: str, operation: Mapping[str, Any], example: object) -> str:
    """Return a request for a shell, in which $URL and $KEY stand for the reader's own."""
    words = ["curl", *(["-X", method.upper()] if method not in ("get", "post") else [])]
    text = " ".join(words)
    if operation.get("security"):
        text += ' -H "Authorization: Bearer $KEY"'
    if "requestBody" in operation:
        kind = next(iter(operation["requestBody"]["content"]), "application/json")
        body = "…" if example is None else json.dumps(example)
        text += f' -H "Content-Type: {kind}" \\\n  --data {shlex.quote(body)}'
    return f'{text} "$URL{path}"'


def _properties(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        (name, "", _name_of(each, name in required), each.get("description", ""))
        for name, each in schema.get("properties", {}).items()
    ]
    return _table(("field", "", "value", ""), rows) if rows else ""


def _name_of(schema: Mapping[str, Any], required: bool) -> str:
    limits = [f"{word} {json.dumps(schema[key])}" for key, word in _LIMITS.items() if key in schema]
    parts = [_kind(schema), *(["required"] if required else []), *(escape(limit) for limit in limits)]
    return ", ".join(parts)


def _kind(schema: Mapping[str, Any]) -> str:
    """Return a schema's kind in a word, as HTML; a named one is a link."""
    if "$ref" in schema:
        name = escape(str(schema["$ref"]).removeprefix(_REFERENCE))
        return f'<a href="#schema-{name}">{name}</a>'
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " | ".join(f"<code>{escape(json.dumps(value))}</code>" for value in values)
    choices = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if choices:
        return " | ".join(_kind(choice) for choice in choices)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    return escape(str(schema.get("type", "any")))


def _table(head: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> str:
    """Return a table of (name, place, value as HTML, description); columns without a heading show no name."""
    cells = "".join(f"<th>{escape(each)}</th>" for each in head)
    lines = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(place)}</td><td>{value}</td><td>{_inline(about)}</td></tr>"
        for name, place, value, about in rows
    ]
    return f"<table><tr>{cells}</tr>{''.join(lines)}</table>"


def _prose(text: str) -> str:
    """Return Markdown's paragraphs, `code` and **strong**, as HTML."""
    return "".join(f"<p>{_inline(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)


def _inline(text: str) -> str:
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
