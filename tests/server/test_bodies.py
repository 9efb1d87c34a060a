"""Bodies on their way: one that is slow, or never ends, takes nobody's place and is never an answer."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from server.guard import Guard
from server.monitoring import Monitoring

PREDICT = "/v1/models/toy/predict"
WHOLE = {"type": "http.request", "body": b"{}", "more_body": False}
PART = {"type": "http.request", "body": b"{", "more_body": True}
GONE = {"type": "http.disconnect"}


class Asked:
    """One request: the messages that its connection gives, then silence until `more` is set."""

    def __init__(self, guard, *messages, then=(), path=PREDICT, headers=()):
        self.more, self.sent = asyncio.Event(), []
        self._messages, self._then = list(messages), list(then)
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "headers": list(headers), "client": None, "server": None,
        }  # fmt: skip
        self.task = asyncio.ensure_future(guard(scope, self._receive, self._send))

    async def _receive(self):
        if not self._messages:
            await self.more.wait()
            return self._then.pop(0)
        return self._messages.pop(0)

    async def _send(self, message):
        self.sent.append(message)

    async def result(self):
        await self.task
        return self.sent[0]["status"], b"".join(m.get("body", b"") for m in self.sent)

    async def code(self):
        status, body = await self.result()
        return status, json.loads(body)["code"]


@pytest.fixture
def asked_of():
    """What reached the application behind the guard."""
    return []


@pytest.fixture
def guard(lab, asked_of):
    async def app(scope, receive, send):
        message = await receive()
        asked_of.append(message["body"])
        await PlainTextResponse("fine")(scope, receive, send)

    settings = lab.settings(max_in_flight=4, body_timeout_s=30.0, request_timeout_s=60.0)
    return Guard(app, settings=settings, monitoring=Monitoring())


async def settled():
    for _ in range(20):  # everybody goes as far as they can
        await asyncio.sleep(0)


def test_who_sends_slowly_takes_nobodys_place(guard, asked_of):
    async def story():
        slow = [Asked(guard, PART, then=[WHOLE]) for _ in range(4)]
        await settled()
        assert await Asked(guard, WHOLE).result() == (200, b"fine")
        assert await Asked(guard, PART).code() == (503, "server.overloaded")
        for each in slow:
            each.more.set()
        assert [(await each.result())[0] for each in slow] == [200] * 4
        assert await Asked(guard, WHOLE).result() == (200, b"fine")
        another = Asked(guard, PART, then=[WHOLE])
        another.more.set()
        assert (await another.result())[0] == 200

    asyncio.run(story())
    assert sorted(asked_of) == sorted([b"{}", *[b"{{}"] * 4, b"{}", b"{{}"])


def test_a_slow_body_says_nothing_about_load(guard, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("server.guard.time", SimpleNamespace(perf_counter=lambda: clock.now))
    guard._shedder.most = guard._shedder.limit = 64

    async def story():
        for _ in range(3):
            slow = Asked(guard, PART, then=[WHOLE])
            await settled()
            clock.now += 20.0
            slow.more.set()
            assert (await slow.result())[0] == 200

    asyncio.run(story())
    assert guard._shedder.limit == 64
    assert guard._shedder.in_flight == 0


@pytest.mark.parametrize("messages", [[GONE], [PART, GONE], [PART, PART, GONE]], ids=len)
def test_a_body_that_breaks_off_asks_nothing(guard, asked_of, messages):
    async def story():
        assert await Asked(guard, *messages).code() == (400, "request.incomplete")

    asyncio.run(story())
    assert asked_of == []
    assert (guard._shedder.in_flight, guard._arriving) == (0, 0)


@pytest.mark.parametrize(
    ("timeout", "code"),
    [(b"0.001", (504, "request.deadline")), (None, (408, "request.timeout"))],
)
def test_a_late_body_is_told_by_which_limit(lab, timeout, code):
    async def app(scope, receive, send):
        raise AssertionError("nothing was asked")

    settings = lab.settings(body_timeout_s=30.0 if timeout else 0.001, request_timeout_s=60.0)
    headers = [(b"x-request-timeout", timeout)] if timeout else []

    async def story():
        guard = Guard(app, settings=settings, monitoring=Monitoring())
        assert await Asked(guard, PART, headers=headers).code() == code

    asyncio.run(story())


def test_a_truncated_request_makes_no_entry(lab, as_role, row):
    from server.app import create_app

    app = create_app(lab.settings(), clock=lab.clock)
    body = json.dumps({"purpose": "triage", "rows": [row]}).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in as_role("consumer").items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body) + 50).encode())]

    async def story():
        part = {"type": "http.request", "body": body, "more_body": True}
        assert await Asked(app, part, GONE, headers=headers).code() == (400, "request.incomplete")

    with TestClient(app) as running:
        running.portal.call(story)
    assert lab.entries("prediction") == []
