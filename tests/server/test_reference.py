"""The reference at /docs: complete in itself, complete about the API, and deaf to what texts contain."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from server.app import create_app
from server.reference import render

VOID = {"br", "meta"}
HOSTILE = "<script>alert(1)</script>'\"&`<img src=//evil.example onerror=x>`**<b>**"


class Page(HTMLParser):
    """Collects elements and refuses a page whose tags do not close in turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def values(self, name: str) -> list[str]:
        return [str(attributes[name]) for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def application(lab_template):
    return create_app(lab_template.settings())


@pytest.fixture(scope="module")
def text(application):
    return render(application.openapi())


def test_anybody_gets_the_page_and_the_browser_may_load_nothing_for_it(client):
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("path", ["/redoc", "/docs/oauth2-redirect"])
def test_pages_that_came_from_other_hosts_are_gone(client, path):
    assert client.get(path).status_code == 404


def test_page_loads_nothing_and_leads_nowhere_else(text):
    page = Page(text)
    assert {tag for tag, _ in page.elements} <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "a", "details", "summary", "span",
        "code", "strong", "pre", "table", "tr", "th", "td", "br",
    }  # fmt: skip
    assert not {name for _, attributes in page.elements for name in attributes} - {
        "lang", "charset", "name", "content", "id", "class", "href",
    }  # fmt: skip
    places = page.values("id")
    assert len(places) == len(set(places))
    for link in page.values("href"):
        assert link == "openapi.json" or link[1:] in places, link
    assert not re.search(r"url\(|@import", text)


def test_page_names_every_operation_parameter_field_and_answer(application, text):
    document = application.openapi()
    seen = 0
    for path, item in document["paths"].items():
        for method, operation in item.items():
            start = text.index(
                f'<span class="method">{method.upper()}</span>\n<span class="path">{path}</span>'
            )
            part = text[start : text.index("</details>", start)]
            names = [parameter["name"] for parameter in operation.get("parameters", [])]
            assert all(f"<code>{name}</code>" in part for name in [*names, *operation["responses"]]), path
            assert ("$KEY" in part) == bool(operation.get("security")), path
            assert f"&quot;$URL{path}&quot;</pre>" in part
            seen += 1
    assert seen > 30
    for name, schema in document["components"]["schemas"].items():
        start = text.index(f'id="schema-{name}"')
        part = text[start : text.index("</details>", start)]
        assert all(f"<code>{field}</code>" in part for field in schema.get("properties", {})), name


def test_example_of_a_body_is_a_command_for_a_shell(text):
    assert "--data &#x27;{&quot;purpose&quot;: &quot;triage&quot;" in text


def test_texts_of_a_document_never_become_markup():
    schema = {
        "type": HOSTILE, "title": HOSTILE, "description": HOSTILE, "required": [HOSTILE], "pattern": HOSTILE,
        "default": HOSTILE,
    }  # fmt: skip
    nested = {
        **schema, "type": "object", "examples": [{HOSTILE: HOSTILE}],
        "properties": {HOSTILE: {"enum": [HOSTILE]}, "list": {"type": "array", "items": schema},
                       "choice": {"anyOf": [schema, {"$ref": f"#/components/schemas/{HOSTILE}"}]}},
    }  # fmt: skip
    operation = {
        "tags": [HOSTILE], "summary": HOSTILE, "description": HOSTILE, "deprecated": True,
        "security": [{HOSTILE: []}],
        "parameters": [{"name": HOSTILE, "in": HOSTILE, "schema": schema, "description": HOSTILE}],
        "requestBody": {"content": {HOSTILE: {"schema": nested}}},
        "responses": {HOSTILE: {"description": HOSTILE, "content": {HOSTILE: {"schema": schema}}}},
    }  # fmt: skip
    text = render(
        {
            "info": {"title": HOSTILE, "version": HOSTILE, "summary": HOSTILE, "description": HOSTILE},
            "tags": [{"name": HOSTILE, "description": HOSTILE}],
            "paths": {HOSTILE: {HOSTILE: operation}},
            "components": {"schemas": {HOSTILE: nested}},
        }
    )
    page = Page(text)
    assert not {"script", "img", "b"} & {tag for tag, _ in page.elements}
    assert not {name for _, attributes in page.elements for name in attributes} & {"src", "onerror"}


def test_empty_document_is_a_page():
    assert "<h1>x 0</h1>" in render({"info": {"title": "x", "version": "0"}, "paths": {}})
