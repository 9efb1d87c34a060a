"""Spans that reach a real collector over OTLP/HTTP: the trace, the route, and nothing that names anybody."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import SettingsError
from server.tracing import traces_address

TRACE = "ab" * 16
CANARY = "canary-91c4"


@pytest.fixture
def collector():
    """A collector; yields its address and what it got."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def spans_of(bodies):
    found = []
    for body in bodies:
        request = ExportTraceServiceRequest.FromString(body)
        found += [span for r in request.resource_spans for s in r.scope_spans for span in s.spans]
    return found


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c/", "https://c/v1/traces"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/traces"),
        ("http://c:4318?x=1", "http://c:4318/v1/traces?x=1"),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
        ("http://c/otlp", "http://c/otlp"),
    ],
)
def test_an_address_without_a_path_is_a_collectors(endpoint, address):
    assert traces_address(endpoint) == address


@pytest.mark.parametrize(
    "endpoint", ["c:4318", "localhost", "grpc://c:4317", "http://", "http://c:x", "http://[:1"]
)
def test_what_is_no_address_is_refused_at_the_start_by_the_settings_name(lab, endpoint):
    with pytest.raises(SettingsError, match="AFFIDAVIT_OTLP_ENDPOINT"):
        create_app(lab.settings(otlp_endpoint=endpoint))


def test_a_request_is_one_span_of_its_trace_and_holds_no_row(lab, as_role, row, collector):
    address, bodies = collector
    settings = lab.settings(otlp_endpoint=address, trace_share=1.0)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        headers = {**as_role("consumer"), "traceparent": f"00-{TRACE}-00f067aa0ba902b7-00"}
        body = {"purpose": "triage", "rows": [row], "subject": CANARY}
        answer = client.post(f"/v1/models/toy/predict?wait=sequenced&x={CANARY}", headers=headers, json=body)
        assert answer.status_code == 200
        unread = client.post(f"/v1/models/{CANARY}/predict", headers=as_role("consumer"), json=body)
        assert unread.status_code == 404
    spans = {span.name: span for span in spans_of(bodies)}
    (span,) = [span for span in spans_of(bodies) if span.trace_id.hex() == TRACE]
    assert span.name == "POST /v1/models/{name}/predict"
    assert span.parent_span_id.hex() == "00f067aa0ba902b7"
    attributes = {item.key: item.value for item in span.attributes}
    assert set(attributes) == {
        "http.request.method", "http.route", "http.response.status_code", "http.request.id"
    }  # fmt: skip
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["http.request.id"].string_value == answer.json()["decision"]["id"]
    assert spans
    assert CANARY.encode() not in b"".join(bodies)


def test_a_caller_cannot_switch_sampling_on(lab, as_role, row, collector):
    address, bodies = collector
    settings = lab.settings(otlp_endpoint=address, trace_share=0.0)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        headers = {**as_role("consumer"), "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
        client.post("/v1/models/toy/predict", headers=headers, json={"purpose": "triage", "rows": [row]})
    assert spans_of(bodies) == []


def test_a_collector_that_is_gone_costs_no_answer(lab, as_role, row, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    settings = lab.settings(otlp_endpoint="http://127.0.0.1:9/v1/traces", trace_share=1.0)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        body = {"purpose": "triage", "rows": [row]}
        assert (
            client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body).status_code == 200
        )


def test_without_the_extra_the_setting_names_the_fix(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"affidavit\[tracing\]"):
        create_app(lab.settings(otlp_endpoint="http://127.0.0.1:9/v1/traces"), clock=lab.clock)
