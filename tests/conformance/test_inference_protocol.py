"""Clients that others wrote speak to our server as they are, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn

from audit.forward import forward
from audit.models import answer_of
from server.app import create_app
from tests.server.conftest import LAYERS, WEIGHTS, charter, lab, lab_template  # noqa: F401 - fixtures

HERE = Path(__file__).parent
CHECKS = "not_a_server_error,content_type_conformance,status_code_conformance,response_schema_conformance"
pytest.importorskip("tritonclient")


@pytest.fixture
def served(lab):  # noqa: F811
    """A server on free ports: (lab, HTTP address, gRPC address)."""
    app = create_app(lab.settings(grpc_port=0))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield lab, f"127.0.0.1:{port}", f"127.0.0.1:{app.state.grpc_port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def run(script, lab, address, python=sys.executable):  # noqa: F811
    done = subprocess.run(
        [python, str(HERE / script), address, lab.tokens["consumer"], lab.version],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def expected():
    label = charter([], "x")["label"]
    answers = []
    for k in range(3):
        encoded = [2 * (40 + k) / 120 - 1, 1.0 if k % 2 == 0 else -1.0, 1.0, 0.0]
        answers.append(answer_of("binary", label, forward(LAYERS, WEIGHTS, encoded)))
    return [float(answer["probability"]) for answer in answers], [answer["label"] for answer in answers]


def test_triton_clients_work_unchanged_over_http_and_grpc(served):
    lab, http, grpc = served  # noqa: F811
    over_http, over_grpc = run("oip_http.py", lab, http), run("oip_grpc.py", lab, grpc)
    chances, labels = expected()
    assert over_http["answers"] == over_grpc["answers"] == [chances, labels]
    answered = lab.entries("prediction")
    assert len(answered) == 7 + 2
    assert len(lab.entries("prediction.denied")) == 2


def test_kserves_client_works_unchanged(served):
    """In an environment of its own (`make kserve-client`): it needs an older pandas than we pin."""
    python = HERE.parent.parent / "build" / "kserve-client" / "bin" / "python"
    if not python.exists():
        pytest.skip("there is no build/kserve-client; `make kserve-client` installs it")
    lab, http, _ = served  # noqa: F811
    assert run("oip_kserve.py", lab, http, python=str(python))["answers"] == list(expected())


@pytest.mark.soak  # some hundred generated requests
def test_requests_generated_from_the_corrected_official_description_find_no_fault(served):
    lab, http, _ = served  # noqa: F811
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run",
            str(HERE / "open_inference_rest.yaml"), "--url", f"http://{http}",
            "-H", f"Authorization: Bearer {lab.tokens['consumer']}",
            "--checks", CHECKS,
            "--phases", "examples,coverage,fuzzing", "--max-examples", "30",
        ],
        capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
