"""Ids, deadlines, log lines, shedding, metrics of several workers, and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading

import httpx
import pytest
from starlette.testclient import TestClient

from federation.network.pki import Pki
from federation.network.settings import NetworkHome, NetworkSettings
from server import logs, metric_files
from server.app import create_app
from server.errors import MalformedRequestError, OverloadedError
from server.marks import Marks, parse_request_id, parse_trace
from server.monitoring import Monitoring
from server.shedding import FLOOR, Shedder
from tests.waiting import LeapingLoop, wait_until

HEX = "0f4bd1f2f0a54a0c9d3f0d6f0a1b2c3d"
UUID = "0f4bd1f2-f0a5-4a0c-9d3f-0d6f0a1b2c3d"


def ask(client, headers, row, **more):
    body = {"purpose": "triage", "rows": [row], **more}
    return client.post("/v1/models/toy/predict", headers=headers, json=body)


# ids


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (HEX, HEX),
        (UUID, HEX),
        (UUID.upper(), HEX),
        ("0" * 32, None),
        ("patient-jane-doe", None),
        (HEX + "0", None),
        ("0f4bd1f2f0a5-4a0c-9d3f-0d6f0a1b2c3d", None),
        ("", None),
        ("0f4bd1f2f0a54a0c9d3f0d6f0a1b2c3\u0665", None),
    ],
)
def test_a_callers_id_counts_where_it_names_nobody(given, taken):
    assert parse_request_id(given) == taken


def test_a_trace_is_taken_from_traceparent_alone():
    assert parse_trace(f"00-{HEX}-00f067aa0ba902b7-01") == (HEX, "00f067aa0ba902b7")
    for bad in ("", HEX, f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-{HEX}-{'0' * 16}-01", f"ff-{HEX}-0-01"):
        assert parse_trace(bad) is None


def test_the_id_is_in_answer_entry_and_header(client, lab, as_role, row):
    reply = ask(client, {**as_role("consumer"), "X-Request-ID": UUID}, row)
    assert reply.headers["x-request-id"] == reply.json()["decision"]["id"] == HEX
    assert lab.entries("prediction")[0]["body"]["request_id"] == HEX
    named = ask(client, {**as_role("consumer"), "X-Request-ID": "patient-jane-doe"}, row)
    made = named.json()["decision"]["id"]
    assert made == named.headers["x-request-id"] != HEX
    assert "jane" not in json.dumps(lab.entries())


def test_a_refusal_bears_the_id_too(client, as_role, row):
    reply = ask(client, {**as_role("consumer"), "X-Request-ID": HEX}, row, purpose="spying")
    assert reply.json()["instance"].endswith(HEX)


# deadlines


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e3", "soon", ".", "0.", "", "1234567890", "\u0665"])
def test_a_deadline_that_is_none_is_refused(text):
    marks = Marks(request_id=HEX, trace_id=HEX, timeout=text)
    with pytest.raises(MalformedRequestError):
        marks.timeout_s(30.0)


def test_a_deadline_only_shortens():
    for long in ("99999", "100000", "30."):
        assert Marks(request_id=HEX, trace_id=HEX, timeout=long).timeout_s(30.0) == 30.0
    assert Marks(request_id=HEX, trace_id=HEX, timeout=".5").timeout_s(30.0) == 0.5
    assert Marks(request_id=HEX, trace_id=HEX, timeout="0.0001").timeout_s(30.0) == 0.0001
    assert Marks(request_id=HEX, trace_id=HEX, timeout="0.25").timeout_s(30.0) == 0.25
    assert Marks(request_id=HEX, trace_id=HEX, timeout=None).timeout_s(30.0) == 30.0


def slow_down(app, wait):
    """Make every answer wait for `wait()` before its entry."""
    predicting = app.state.context.predicting
    live = predicting.hooks

    class Slow:
        async def annotate(self, answering):
            from server.hooks import Annotation

            await wait()
            return Annotation()

    from dataclasses import replace

    hooks = replace(live, annotators=(Slow(), *live.annotators))
    context = app.state.context
    app.state.context = replace(context, predicting=replace(predicting, hooks=hooks))


def test_an_answer_after_the_deadline_is_none(lab, as_role, row):
    app = create_app(lab.settings(), clock=lab.clock)

    async def longer_than_asked():
        asyncio.get_running_loop().leap(21)
        await asyncio.Event().wait()

    with TestClient(app, backend_options={"loop_factory": LeapingLoop}) as client:
        slow_down(app, longer_than_asked)
        headers = {**as_role("consumer"), "X-Request-Timeout": "20"}
        reply = ask(client, headers, row)
        assert (reply.status_code, reply.json()["code"]) == (504, "request.deadline")
        bad = ask(client, {**as_role("consumer"), "X-Request-Timeout": "soon"}, row)
        assert (bad.status_code, bad.json()["code"]) == (422, "request.malformed")
    assert lab.entries("prediction") == []


# log lines


@pytest.fixture
def lines(monkeypatch):
    """Send everything that is logged to a list of lines, in ECS."""
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    monkeypatch.setattr(logging.getLogger("httpx"), "disabled", True)  # the tests' own client
    logs.configure("ecs", "DEBUG", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = before
    root.setLevel(level)


def test_each_request_is_one_line_of_ecs_fields(client, as_role, row, lines):
    headers = {
        **as_role("consumer"),
        "X-Request-ID": HEX,
        "traceparent": f"00-{'ab' * 16}-00f067aa0ba902b7-01",
    }
    answer = ask(client, headers, row).json()
    client.get("/healthz")
    (line,) = [line for line in lines() if line.get("event.action") == "http.request"]
    assert line["http.request.id"] == HEX == answer["decision"]["id"]
    assert line["trace.id"] == "ab" * 16
    assert line["url.path"] == "/v1/models/{name}/predict"
    assert (line["http.response.status_code"], line["event.outcome"]) == (200, "success")
    assert line["user.id"].startswith("p-")
    assert line["@timestamp"].endswith("Z")
    assert line["log.level"] == "info"
    assert set(line) <= logs.FIELDS


CANARY = "canary-7f3a"


def test_no_line_ever_holds_a_row_a_person_or_a_key(lab, as_role, row, lines, monkeypatch):
    from server.warm import WarmModel

    app = create_app(lab.settings(), clock=lab.clock)
    with TestClient(app, raise_server_exceptions=False) as client:
        headers = {**as_role("consumer"), "X-Request-ID": CANARY}
        ask(client, headers, {**row, "ward": CANARY})
        ask(client, headers, {**row, CANARY: 1})
        ask(client, headers, row, subject=CANARY)
        ask(client, headers, row, purpose=CANARY)
        client.post(f"/v1/models/{CANARY}/predict?x={CANARY}", headers=headers, content=CANARY.encode())
        ask(client, {"Authorization": f"Bearer {CANARY}"}, row)

        def broken(*arguments, **named):
            raise ValueError(f"could not convert {CANARY}") from KeyError(CANARY)

        monkeypatch.setattr(WarmModel, "encode", broken)
        assert ask(client, headers, row).status_code == 500
    (failed,) = [line for line in lines() if line.get("error.type") == "ValueError"]
    assert "KeyError" in failed["error.stack_trace"]
    assert failed["http.request.id"]
    assert CANARY not in json.dumps(lines())
    assert all(set(line) <= logs.FIELDS for line in lines())


def test_a_field_outside_the_list_is_dropped(lines):
    logging.getLogger("x").warning("seen", extra={"ecs": {"row": CANARY, "event.action": "kept"}})
    (line,) = [line for line in lines() if line["log.logger"] == "x"]
    assert (line["event.action"], "row" in line, line["message"]) == ("kept", False, "seen")


def test_plain_lines_keep_the_same_rule():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.formatter("text"))
    logger = logging.getLogger("plain-lines")
    logger.addHandler(handler)
    try:
        int(CANARY)
    except ValueError:
        logger.exception("broken")
    logger.removeHandler(handler)
    assert "ValueError" in stream.getvalue()
    assert "test_operations.py" in stream.getvalue()
    assert CANARY not in stream.getvalue()


# shedding


def test_late_answers_lower_the_limit_and_answers_in_time_raise_it():
    shedder = Shedder(most=100, target_s=1.0)
    for _ in range(300):
        shedder.enter()
        shedder.leave(5.0)
    assert shedder.limit == FLOOR
    for _ in range(20):
        shedder.enter()
        shedder.leave(0.01)
    assert FLOOR < shedder.limit < 20
    for _ in range(20_000):
        shedder.enter()
        shedder.leave(0.01)
    assert shedder.limit == 100


def test_those_under_way_with_a_late_answer_count_once():
    shedder = Shedder(most=100, target_s=1.0)
    for _ in range(50):
        shedder.enter()
    for _ in range(50):
        shedder.leave(2.0)
    assert shedder.limit == pytest.approx(90.0)


def test_above_the_limit_nobody_is_taken_and_waiting_for_witnesses_is_no_load():
    shedder = Shedder(most=2, target_s=1.0)
    shedder.enter()
    shedder.enter()
    with pytest.raises(OverloadedError, match="come back in 2 s") as caught:
        shedder.enter()
    assert caught.value.extra == {"retry_after_s": 2}
    shedder.leave(None)
    shedder.enter()
    assert shedder.limit == 2.0


def test_a_full_server_sheds_answers_health_and_logs_what_it_answered(lab, as_role, row):
    app = create_app(lab.settings(max_in_flight=4), clock=lab.clock)
    headers = as_role("consumer")
    shed_all = asyncio.Event()

    async def storm():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"purpose": "triage", "rows": [row]}
            asked = [client.post("/v1/models/toy/predict", headers=headers, json=body) for _ in range(24)]
            health = client.get("/healthz")
            asked = [asyncio.create_task(each) for each in (*asked, health)]
            async with asyncio.timeout(60):
                while sum(each.done() for each in asked) < 21:
                    await asyncio.sleep(0.001)
            shed_all.set()
            return await asyncio.gather(*asked)

    with TestClient(app) as running:
        slow_down(app, shed_all.wait)
        *replies, health = running.portal.call(storm)
        metrics = running.get("/metrics", headers=as_role("operator")).text
    assert health.status_code == 200
    shed = [reply for reply in replies if reply.status_code == 503]
    answered = [reply for reply in replies if reply.status_code == 200]
    assert len(answered) == 4
    assert len(shed) == 20
    assert {reply.json()["code"] for reply in shed} == {"server.overloaded"}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in shed)
    assert len(lab.entries("prediction")) == len(answered)
    assert 'affidavit_shed_requests_total{reason="in_flight"} 20.0' in metrics
    assert "affidavit_http_requests_in_flight 1.0" in metrics


# metrics of several workers

WORKER = """
import os, sys
from server.monitoring import Monitoring
monitoring = Monitoring()
monitoring.predicted_rows.labels("toy").inc(int(sys.argv[1]))
monitoring.tree_size.set(int(sys.argv[1]))
for _ in range(3):
    monitoring.tallies.enter()
if len(sys.argv) > 2:
    print(monitoring.render().decode())
"""


def test_workers_metrics_add_up_and_the_dead_are_not_in_flight(tmp_path):
    environ = dict(os.environ)
    metric_files.prepare(tmp_path / "metrics", environ)

    def worker(*arguments):
        return subprocess.run(
            [sys.executable, "-c", WORKER, *arguments],
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    worker("5")
    worker("7")
    text = worker("11", "print")
    assert 'affidavit_predicted_rows_total{model="toy"} 23.0' in text
    assert "affidavit_log_tree_size 11.0" in text
    assert "affidavit_http_requests_in_flight 3.0" in text  # of the one that lives


NETWORK_WORKER = """
import sys
from pathlib import Path
from audit.ledger import Ledger
from audit.location import log_location
from server.monitoring import Monitoring
home, monitoring = Path(sys.argv[1]), Monitoring()
monitoring.certificate_seconds.labels("elder").set(int(sys.argv[2]))
with Ledger.open(log_location(home)) as ledger:
    monitoring.look_at_network(home, ledger)
print(monitoring.render().decode())
"""


def test_without_a_network_nothing_is_said_of_node_keys_and_with_one_the_latest_look_counts(lab, tmp_path):
    home, environ = lab.coordinator.home, dict(os.environ)
    names = "affidavit_node_key_seconds_left", "affidavit_certificate_seconds_left"

    def values(text):
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(names)]
        return {name: value for name, _, value in lines}

    def worker(seconds):
        command = [sys.executable, "-c", NETWORK_WORKER, str(home), str(seconds)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return values(done.stdout)

    monitoring = Monitoring()
    monitoring.look_at_network(home, lab.coordinator.ledger)
    assert values(monitoring.render().decode()) == {}  # 0 would say that a key has ended
    metric_files.prepare(tmp_path / "metrics", environ)
    assert worker(50) == {'affidavit_certificate_seconds_left{name="elder"}': "50.0"}
    settings = NetworkSettings(public_host="localhost")
    Pki.create(NetworkHome.create(home, settings).pki.folder, ("localhost",), name="toy")
    monitoring.look_at_network(home, lab.coordinator.ledger)
    assert values(monitoring.render().decode())["affidavit_node_key_seconds_left"] == "+Inf"  # no member yet
    found = worker(7_000_000)
    assert found["affidavit_node_key_seconds_left"] == "+Inf"
    assert found['affidavit_certificate_seconds_left{name="elder"}'] == "7e+06"  # the one before it said 50


def test_a_supervisor_forgets_a_worker_by_its_number(tmp_path):
    for name in ("gauge_livesum_12.db", "gauge_livesum_123.db", "counter_12.db", "gauge_max_12.db"):
        (tmp_path / name).touch()
    metric_files.bury(tmp_path, {12})
    assert (tmp_path / "gauge_livesum_123.db").exists()
    assert not list(tmp_path.glob("*_12.db"))
    metric_files.forget_dead(tmp_path)
    assert metric_files.folder_of({}) is None


# a stop under load

SERVER = """
    import sys
    from pathlib import Path
    import uvicorn
    from server.app import create_app
    from server.settings import Settings

    base = Path(sys.argv[1])
    settings = Settings(
        coordinator_home=base / "coordinator", signer_home=base / "signer", publish_interval_s=3600
    )
    app = create_app(settings)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none")
    server = uvicorn.Server(config)
    started = server.startup

    async def startup(sockets=None):
        await started(sockets)
        print(server.servers[0].sockets[0].getsockname()[1], flush=True)

    server.startup = startup
    server.run()
"""


@pytest.mark.slow  # a server in a process of its own has to start
def test_a_stop_under_load_loses_no_answer_and_acknowledges_none_without_entry(lab, as_role, row):
    """Every answer that a caller holds is an entry, and every entry was an answer: nothing in between."""
    lab.coordinator.close()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVER), str(lab.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = int(process.stdout.readline())
        ids, broken, stop = [], [], threading.Event()

        def load():
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                while not stop.is_set():
                    try:
                        reply = ask(client, as_role("consumer"), row)
                    except httpx.HTTPError as error:
                        broken.append(type(error).__name__)
                        return
                    if reply.status_code == 200:
                        ids.append(reply.json()["decision"]["id"])

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(ids) >= 40)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        stop.set()
        for thread in threads:
            thread.join(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    from federation.coordinator import Coordinator

    lab.coordinator = Coordinator.open(lab.folder / "coordinator", lab.folder / "signer", clock=lab.clock)
    logged = [entry["body"]["request_id"] for entry in lab.entries("prediction")]
    assert len(ids) >= 40
    assert sorted(logged) == sorted(ids)
