"""Requests that arrive together are answered together, and none can tell: not by its answer, its entry, its
receipt, its error or its log lines, and none is left waiting.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from audit.errors import LedgerWriteError
from server import crowd as crowds
from server.answers import Asked
from server.app import create_app
from server.hooks import Annotation, Facts
from server.logs import _MARKS
from tests.server.test_runtime import OTHER, second, swap
from tests.waiting import Moved

PREDICT = "/v1/models/toy/predict"


@pytest.fixture
def app(lab):
    return create_app(lab.settings(), clock=lab.clock)


@pytest.fixture
def running(app):
    with TestClient(app) as client:
        app.state.context.keys._monotonic = Moved(1_000.0)  # a key stays known, however slow the machine
        yield client


class Reply:
    """What came back of one request."""

    def __init__(self, status, headers, body):
        self.status_code, self.headers, self.text = status, headers, body.decode()

    def json(self):
        return json.loads(self.text)


async def post(app, headers, document):
    """Send one request past every client, so that many begin in one turn of the loop."""
    body, sent = json.dumps(document).encode(), []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http", "method": "POST", "path": PREDICT, "raw_path": PREDICT.encode(), "query_string": b"",
        "headers": lines, "root_path": "", "scheme": "http", "server": ("test", 80), "client": ("test", 1),
        "http_version": "1.1", "asgi": {"version": "3.0"}, "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], answered, b"".join(part["body"] for part in sent[1:]))


@pytest.fixture
def together(app, running):
    """Return a function that sends requests (headers, document) at once and returns the answers in order."""

    def send(asked, beside=None):
        async def storm():
            tasks = [asyncio.create_task(post(app, headers, body)) for headers, body in asked]
            if beside is not None:
                await beside(tasks)
            async with asyncio.timeout(60):
                return await asyncio.gather(*tasks)

        return running.portal.call(storm)

    return send


@pytest.fixture
def warm(together, lab, row):
    """The headers of a consumer who is known, of a model that is in memory."""
    headers = {"Authorization": f"Bearer {lab.tokens['consumer']}"}
    assert together([(headers, asked(row))])[0].status_code == 200
    return headers


@pytest.fixture
def sizes(monkeypatch):
    """How many requests each crowd's entries were written for."""
    found = []
    append = crowds.Crowd._append

    def counted(self, jobs):
        found.append(len(jobs))
        append(self, jobs)

    monkeypatch.setattr(crowds.Crowd, "_append", counted)
    return found


def asked(row, **more):
    return {"purpose": "triage", "rows": [row], **more}


def predicting(app):
    return app.state.context.predicting


def hook(app, **changed):
    context = app.state.context
    hooks = context.predicting.hooks
    hooks = replace(hooks, **{name: (*getattr(hooks, name), each) for name, each in changed.items()})
    app.state.context = replace(context, predicting=replace(context.predicting, hooks=hooks))


def test_each_of_a_crowd_gets_its_own_answer_entry_and_receipt(together, warm, lab, row, sizes):
    people = [{"Authorization": f"Bearer {lab.key('consumer')}"} for _ in range(3)]
    assert {reply.status_code for reply in together([(headers, asked(row)) for headers in people])} == {200}
    before, sizes[:] = len(lab.entries("prediction")), []
    replies = together([(people[k % 3], asked({**row, "age": 20 + k})) for k in range(24)])
    assert [reply.status_code for reply in replies] == [200] * 24
    assert sizes == [24]
    entries = {entry["leaf_index"]: entry for entry in lab.entries("prediction")[before:]}
    assert len(entries) == 24
    holders = {}
    for k, reply in enumerate(replies):
        document = reply.json()
        assert json.loads(document["opened"][0]["input"])["age"] == str(20 + k)
        assert json.loads(document["opened"][0]["output"])["label"] == document["answers"][0]["label"]
        entry = entries.pop(document["entry"]["leaf_index"])
        assert entry["event_id"] == document["entry"]["id"]
        assert entry["body"]["request_id"] == document["decision"]["id"] == reply.headers["x-request-id"]
        assert document["receipt"]["leaf_hash"] == document["entry"]["leaf_hash"]
        holders.setdefault(k % 3, set()).add(entry["body"]["principal"])
    assert sorted(map(len, holders.values())) == [1, 1, 1]
    assert len(set.union(*holders.values())) == 3
    salts = [reply.json()["opened"][0]["input_salt"] for reply in replies]
    assert len(set(salts)) == 24


def test_alone_or_in_a_crowd_the_entry_says_the_same(together, warm, lab, row):
    together([(warm, asked(row))] * 8)
    bodies = [entry["body"] for entry in lab.entries("prediction")]
    assert len(bodies) == 9
    for body in bodies:
        body.pop("request_id"), body.pop("rows")
    assert all(body == bodies[0] for body in bodies)


def test_each_of_a_mixed_crowd_gets_what_it_would_get_alone(together, warm, lab, row, sizes):
    good = warm
    refused = {"Authorization": f"Bearer {lab.tokens['officer']}"}
    mixed = [
        (good, asked(row), 200, None),
        (good, asked({**row, "age": 999}), 422, "predict.row_outside_contract"),
        (good, asked({**row, "age": "x"}), 422, "predict.row_outside_contract"),
        (good, {"purpose": "triage"}, 422, "request.malformed"),
        (good, asked(row, purpose="marketing"), 403, "predict.denied"),
        (refused, asked(row), 403, "predict.denied"),
        ({"Authorization": "Bearer affidavit_nobody"}, asked(row), 401, None),
        (good, asked(row, version="ab" * 32), 404, None),
        (good, asked(row, site="nowhere"), 422, None),
        (good, asked(row, consent="given on paper"), 422, None),
        (good, asked(row, subject="patient 7"), 200, None),
        (good, asked(row, explain=True), 200, None),
        (good, {"purpose": "triage", "rows": [row] * 3}, 200, None),
        (good, {"purpose": "triage", "rows": [row] * 40}, 200, None),
        (good, asked(row), 200, None),
    ]
    for _ in range(2):  # the second time everything that can be remembered is
        before = len(lab.entries("prediction")), len(lab.entries("prediction.denied"))
        replies = together([(headers, body) for headers, body, _, _ in mixed])
        assert [reply.status_code for reply in replies] == [status for *_, status, _ in mixed]
        for reply, (*_, code) in zip(replies, mixed, strict=True):
            if code is not None:
                assert reply.json()["code"] == code
        after = len(lab.entries("prediction")), len(lab.entries("prediction.denied"))
        assert (after[0] - before[0], after[1] - before[1]) == (6, 2)
        assert replies[10].json()["sealed"]["subject"]
        assert replies[11].json()["annotations"]["attributions"]
        assert [len(reply.json()["answers"]) for reply in replies[12:14]] == [3, 40]
    assert sizes[-1] == 3


def test_decision_on_one_caller_is_none_on_another(together, lab, row):
    allowed, refused = ({"Authorization": f"Bearer {lab.tokens[role]}"} for role in ("consumer", "officer"))
    replies = together([(allowed, asked(row)), (refused, asked(row))] * 8)
    assert [reply.status_code for reply in replies] == [200, 403] * 8
    assert len(lab.entries("prediction.denied")) == 8


def test_facts_are_asked_for_each_unless_their_provider_says_that_they_are_shared(app, together, lab, row):
    class Counting:
        def __init__(self):
            self.rows = []

        def facts(self, principal, asked, served):
            self.rows.append(asked.rows[0]["age"])
            return Facts(context={"over_quota": asked.rows[0]["age"] == 33})

    headers, counting = {"Authorization": f"Bearer {lab.tokens['consumer']}"}, Counting()
    hook(app, facts=counting)
    requests = [(headers, asked({**row, "age": 30 + k})) for k in range(6)]
    replies = together(requests)
    assert [reply.status_code for reply in replies] == [200, 200, 200, 429, 200, 200]
    assert sorted(set(counting.rows)) == [30, 31, 32, 33, 34, 35]

    counting.is_shared, counting.rows = True, []
    assert {reply.status_code for reply in together(requests[:3])} == {200}
    assert len(counting.rows) == 1


def test_crowd_on_a_view_that_is_stale_is_answered_by_what_is_live_now(app, together, running, lab, row):
    headers = {"Authorization": f"Bearer {lab.tokens['consumer']}"}
    assert {reply.json()["version"] for reply in together([(headers, asked(row))] * 4)} == {lab.version}
    other = second(lab, OTHER)
    swap(lab, lab.version, other, "approved")
    replies = together([(headers, asked(row))] * 12)
    assert {(reply.status_code, reply.json()["version"]) for reply in replies} == {(200, other)}
    assert [entry["body"]["version"] for entry in lab.entries("prediction")] == [lab.version] * 4 + [
        other
    ] * 12


@pytest.mark.parametrize("how", ["closed", "refused"])
def test_log_that_fails_answers_nobody_and_leaves_nobody_waiting(
    app, together, warm, lab, row, how, monkeypatch
):
    ledger = app.state.context.coordinator.ledger

    def refuse(*_):
        raise LedgerWriteError("the disk is full")

    if how == "refused":
        monkeypatch.setattr(ledger._sequencer, "_commit", refuse)
    else:
        ledger._sequencer.close()
    replies = together([(warm, asked(row))] * 16)
    assert {(reply.status_code, reply.json()["code"]) for reply in replies} == {
        (503, "audit.ledger_unavailable")
    }
    assert len(lab.entries("prediction")) == 1


def test_late_one_leaves_its_crowd_unharmed(app, together, warm, row, monkeypatch):
    headers = warm
    ledger, go_on = app.state.context.coordinator.ledger, threading.Event()
    commit = ledger._sequencer._commit

    def slow(batch):
        assert go_on.wait(30)
        return commit(batch)

    monkeypatch.setattr(ledger._sequencer, "_commit", slow)

    async def until_late(tasks):
        while not tasks[1].done():
            await asyncio.sleep(0.01)
        go_on.set()

    requests = [(headers, asked(row)) for _ in range(6)]
    requests[1] = ({**headers, "X-Request-Timeout": "0.2"}, asked(row))
    replies = together(requests, until_late)
    assert [reply.status_code for reply in replies] == [200, 504, 200, 200, 200, 200]
    assert {reply.status_code for reply in together([(headers, asked(row))] * 4)} == {200}


@pytest.mark.parametrize("waits", [False, True])
def test_those_who_come_while_the_log_writes_are_answered_after(
    app, together, warm, lab, row, monkeypatch, waits, sizes
):
    """They wait for the log's crowd a moment, and not as long as a slow log takes."""
    ledger = app.state.context.coordinator.ledger
    writing, go_on, commit = threading.Event(), threading.Event(), ledger._sequencer._commit

    def slow(batch):
        writing.set()
        assert go_on.wait(30)
        return commit(batch)

    monkeypatch.setattr(ledger._sequencer, "_commit", slow)

    async def more(tasks):
        while not writing.is_set():
            await asyncio.sleep(0.001)
        tasks.append(asyncio.create_task(post(app, warm, asked(row))))
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while waits and len(sizes) < 2:
                await asyncio.sleep(0.001)
        assert len(sizes) == 1 + waits
        go_on.set()

    sizes.clear()
    replies = together([(warm, asked(row)) for _ in range(8)], more)
    assert [reply.status_code for reply in replies] == [200] * 9
    assert sizes == [8, 1]
    assert len(lab.entries("prediction")) == 10


def test_step_that_fails_for_one_fails_for_one(app, together, lab, row):
    class Picky:
        def annotate(self, answering):
            if answering.asked.rows[0]["age"] == 31:
                raise RuntimeError("unforeseen")
            return Annotation(shown={"seen": True})

    hook(app, annotators=Picky())
    headers = {"Authorization": f"Bearer {lab.tokens['consumer']}"}
    replies = together([(headers, asked({**row, "age": 30 + k})) for k in range(4)])
    assert [reply.status_code for reply in replies] == [200, 500, 200, 200]
    assert replies[1].json()["code"] == "server.internal"
    assert "unforeseen" not in replies[1].text
    assert len(lab.entries("prediction")) == 3


def test_what_watches_answers_stands_under_the_marks_of_its_own_request(app, together, lab, row):
    class Watching:
        def __init__(self):
            self.found = []

        def observe(self, answering, answered):
            self.found.append((answered.request_id, (_MARKS.get() or {}).get("http.request.id")))

    watching = Watching()
    hook(app, observers=watching)
    headers = {"Authorization": f"Bearer {lab.tokens['consumer']}"}
    replies = together([(headers, asked(row))] * 5)
    assert [own for own, _ in watching.found] == [marked for _, marked in watching.found]
    assert {own for own, _ in watching.found} == {reply.headers["x-request-id"] for reply in replies}


def test_version_is_drawn_once_a_request(app, together, running, lab, row, monkeypatch):
    """Or a canary that is not in memory yet would be drawn again until it is not chosen."""
    headers, live = {"Authorization": f"Bearer {lab.tokens['consumer']}"}, predicting(app).live
    draws, choose = [], type(live).choose

    def counted(self, model, version=None, *, draw=False):
        draws.append(draw)
        return choose(self, model, version, draw=draw)

    monkeypatch.setattr(type(live), "choose", counted)
    warm = predicting(app).warm
    monkeypatch.setattr(warm, "ready", lambda served: None)
    replies = together([(headers, asked(row)), (headers, asked(row, explain=True)), (headers, asked(row))])
    assert {reply.status_code for reply in replies} == {200}
    assert sum(draws) == 3


def test_more_than_a_crowd_holds_are_several_crowds(together, warm, row, sizes):
    sizes.clear()
    replies = together([(warm, asked(row))] * (2 * crowds.MAX_CROWD + 5))
    assert {reply.status_code for reply in replies} == {200}
    assert sum(sizes) == 2 * crowds.MAX_CROWD + 5
    assert max(sizes) <= crowds.MAX_CROWD


def test_one_service_in_two_loops_leaves_nobody_of_the_first_one_behind(app, running, lab, row):
    service = predicting(app)
    principal = app.state.context.keys.authenticate(lab.tokens["consumer"])
    if principal is None:
        principal = app.state.context.keys.authenticate(lab.tokens["consumer"])

    async def broken_off():
        asked = Asked("toy", "triage", [row], "ab" * 16)
        job = crowds.Job(principal, lambda: asked, lambda answered: answered)
        service.crowd.join(job)  # and the loop ends before its turn does

    async def whole():
        asked = Asked("toy", "triage", [row], "cd" * 16)
        return await asyncio.wait_for(service.predict(principal, asked), 20)

    asyncio.run(broken_off())
    assert asyncio.run(whole()).request_id == "cd" * 16
    assert len(lab.entries("prediction")) == 1


def test_answer_that_breaks_after_its_entry_breaks_alone(app, together, warm, lab, row, monkeypatch):
    service = type(predicting(app))
    finished = service.finished

    def broken(self, answering, *more):
        if answering.asked.rows[0]["age"] == 31:
            raise RuntimeError("unforeseen")
        return finished(self, answering, *more)

    monkeypatch.setattr(service, "finished", broken)
    replies = together([(warm, asked({**row, "age": 30 + k})) for k in range(4)])
    assert [reply.status_code for reply in replies] == [200, 500, 200, 200]
    assert len(lab.entries("prediction")) == 5


def test_queue_that_breaks_is_told_at_once(app, together, warm, row, monkeypatch):
    def broken(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(app.state.context.coordinator.ledger._sequencer, "submit_waiting", broken)
    replies = together([({**warm, "X-Request-Timeout": "20"}, asked(row))] * 3)
    assert {(reply.status_code, reply.json()["code"]) for reply in replies} == {(500, "server.internal")}


@pytest.mark.parametrize("how", ["refuses", "is closed", "hangs"])
def test_each_line_about_a_failed_log_bears_the_marks_of_its_own_request(
    app, together, warm, row, monkeypatch, caplog, how
):
    ledger, go_on = app.state.context.coordinator.ledger, threading.Event()
    seen = []

    class Marks(logging.Handler):
        def emit(self, record):
            if "durable" in record.getMessage():
                seen.append((_MARKS.get() or {}).get("http.request.id"))

    def hang(batch):
        go_on.wait(30)
        raise LedgerWriteError("the disk is full")

    def refuse(batch):
        raise LedgerWriteError("the disk is full")

    handler = Marks()
    logging.getLogger("server.journal").addHandler(handler)
    try:
        if how == "is closed":
            ledger._sequencer.close()
        else:
            monkeypatch.setattr(ledger._sequencer, "_commit", hang if how == "hangs" else refuse)
        monkeypatch.setattr(app.state.context.journal, "_timeout_s", 0.2)
        monkeypatch.setattr(app.state.context.journal, "_patience", None)
        replies = together([(warm, asked(row))] * 3)
    finally:
        go_on.set()
        logging.getLogger("server.journal").removeHandler(handler)
    assert {reply.status_code for reply in replies} == {503}
    assert sorted(seen) == sorted(reply.headers["x-request-id"] for reply in replies)


def test_nothing_is_kept_of_crowds_that_were_answered(app, together, warm, row):
    for _ in range(5):
        together([(warm, asked(row))] * 40)
    assert predicting(app).crowd._sent == []


def test_two_loops_at_once_share_no_crowd_and_lose_nobody(app, running, warm, lab, row, monkeypatch):
    monkeypatch.setattr("server.batching.WORTH_S", 0.0)  # nor a run of the model
    service, before = predicting(app), len(lab.entries("prediction"))
    principal = app.state.context.keys.authenticate(lab.tokens["consumer"])
    found = []

    async def many(name):
        calls = [
            service.predict(principal, Asked("toy", "triage", [row], f"{name}{k:030x}")) for k in range(20)
        ]
        found.extend(await asyncio.wait_for(asyncio.gather(*calls), 30))

    threads = [threading.Thread(target=asyncio.run, args=(many(name),)) for name in ("aa", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answered.request_id for answered in found}) == 40
    assert len(lab.entries("prediction")) == before + 40


def test_loops_that_come_in_the_same_moment_take_the_crowd_one_after_the_other(
    app, running, warm, lab, row, monkeypatch
):
    """Whoever saw nobody there, and came second, threw away what the first had begun to gather."""
    service, both, looking = predicting(app), threading.Event(), []
    principal = app.state.context.keys.authenticate(lab.tokens["consumer"])

    class Ended:
        def is_running(self) -> bool:
            looking.append(threading.get_ident())
            if len(looking) == 2:
                both.set()
            both.wait(0.5)  # for another that looks in the same moment, where one can
            return False

    async def one(name):
        asked = Asked("toy", "triage", [row], f"{name}{0:030x}")
        return await asyncio.wait_for(service.predict(principal, asked), 60)

    monkeypatch.setattr(service.crowd, "_loop", Ended())
    with ThreadPoolExecutor(2) as pool:
        assert len({told.request_id for told in pool.map(asyncio.run, (one("aa"), one("bb")))}) == 2
    assert len(looking) == 1, "the second finds the first's loop in its place"
