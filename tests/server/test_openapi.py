"""The OpenAPI document tells the truth: about errors in every run, about everything under `make soak`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from server.app import create_app
from server.errors import MEDIA_TYPE

ROOT = Path(__file__).resolve().parents[2]


def test_every_error_is_described_as_a_problem_document_or_as_the_protocols_own(client):
    document = client.get("/openapi.json").json()
    assert "HTTPValidationError" not in str(document)
    seen = set()
    for path, item in document["paths"].items():
        protocol = path.startswith("/v2")
        kind, schema = ("application/json", "ProtocolError") if protocol else (MEDIA_TYPE, "Problem")
        for operation in item.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    content = response["content"]
                    assert content == {kind: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, path
                    assert response["description"]
                    seen.add(protocol)
    assert seen == {False, True}


def test_unknown_methods_make_no_label_of_their_own(client, as_role):
    client.request("BREW", "/v1/models")
    text = client.get("/metrics", headers=as_role("operator")).text
    assert "BREW" not in text
    assert 'method="other"' in text


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/v1/audit/evidence", {"application/zip"}),
        ("/v1/audit/evidence/{index}", {"application/zip"}),
        ("/v1/audit/export", {"application/jsonl", "text/csv"}),
        ("/v1/audit/entries/{index}/receipt.cose", {"application/cose"}),
        ("/v1/models/{name}/versions/{digest}/card", {"text/markdown"}),
        ("/v1/audit/runs/{run}/updates", {"application/json", "image/png"}),
    ],
)
def test_answer_that_is_a_file_is_described_as_one(client, path, kinds):
    document = client.get("/openapi.json").json()
    assert kinds <= document["paths"][path]["get"]["responses"]["200"]["content"].keys()


@pytest.mark.soak  # half a minute of generated requests, hundreds for each role
@pytest.mark.parametrize("role", ["consumer", "officer", "operator"])
def test_generated_requests_find_no_answer_that_is_not_described(lab, role):
    server = uvicorn.Server(uvicorn.Config(create_app(lab.settings()), port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        done = subprocess.run(
            [
                str(Path(sys.executable).with_name("schemathesis")), "run",
                f"http://127.0.0.1:{port}/openapi.json",
                "-H", f"Authorization: Bearer {lab.tokens[role]}",
                "--checks", "answers_or_says_not_yet,content_type_conformance,status_code_conformance",
                "--phases", "examples,coverage,fuzzing", "--max-examples", "30", "--request-timeout", "30",
            ],
            capture_output=True, text=True, check=False, timeout=1200, cwd=ROOT,
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.schemathesis_hooks"},
        )  # fmt: skip
    finally:
        server.should_exit = True
        thread.join(timeout=30)
    assert done.returncode == 0, done.stdout[-4000:]
