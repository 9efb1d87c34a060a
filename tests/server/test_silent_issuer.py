"""An issuer that takes the connection and says nothing: it stops nobody but those who need its word."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.testclient import TestClient

import server.oidc
from server.app import create_app
from server.errors import IssuerUnreachableError, TooBusyError
from server.jwks import LIFESPAN_S, MAX_WAITING, RETRY_S, IssuerKeys
from server.oidc import Claims, TokenVerifier
from tests.server.test_tokens import AUDIENCE, Time, bearer, forged

SILENT = "https://issuer.example"
_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_JWK = {**jwt.get_algorithm_by_name("RS256").to_jwk(_KEY.public_key(), as_dict=True), "kid": "good"}


class Silent:
    """Answers nothing until its gate is opened."""

    def __init__(self) -> None:
        self.gate, self.begun, self.ended = threading.Event(), threading.Event(), []

    def __call__(self, url: str) -> bytes:
        self.begun.set()
        assert self.gate.wait(120), "the test never opened the gate"
        self.ended.append(url)
        return json.dumps({"keys": [_JWK]}).encode()


@pytest.fixture
def silent():
    found = Silent()
    yield found
    found.gate.set()  # or its thread would outlive the test


def silent_keys(fetch, clock: Time, *, wait_s: float = 600.0, **options) -> IssuerKeys:
    return IssuerKeys(SILENT, f"{SILENT}/jwks", fetch=fetch, clock=clock, wait_s=wait_s, **options)


def junk(number: int) -> str:
    return forged({"alg": "RS256", "kid": f"invented-{number}"}, {"sub": "x"}, b"x")


def test_silent_issuer_stops_neither_keys_nor_readiness(lab, as_role, silent, monkeypatch):
    """As many junk tokens as there are threads and more; nobody else waits for one of them."""
    keys = partial(silent_keys, silent, Time())
    monkeypatch.setattr(server.oidc, "IssuerKeys", lambda *_, **options: keys(**options))
    settings = lab.settings(oidc_issuer=SILENT, oidc_audience=AUDIENCE, request_timeout_s=120)
    now = int(lab.clock().timestamp())
    good = jwt.encode(
        {"iss": SILENT, "aud": AUDIENCE, "sub": "a", "exp": now + 300, "affidavit_role": "consumer"},
        _KEY, algorithm="RS256", headers={"kid": "good"},
    )  # fmt: skip
    with TestClient(create_app(settings, clock=lab.clock), raise_server_exceptions=False) as client:
        found = client.app.state.context.identities.tokens._keys

        async def ask() -> None:
            transport = httpx.ASGITransport(client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as caller:
                sent = [good, *(junk(number) for number in range(MAX_WAITING - 1))]
                waiting = [
                    asyncio.ensure_future(caller.get("/v1/models", headers=bearer(token))) for token in sent
                ]
                while found._waiting < MAX_WAITING:  # no time limit of its own: the requests have theirs
                    assert not any(task.done() for task in waiting)
                    await asyncio.sleep(0)
                for role in ("consumer", "tester", "operator"):  # that no worker remembers yet
                    reply = await caller.get("/v1/models", headers=as_role(role))
                    assert reply.status_code == 200
                assert (await caller.get("/readyz")).status_code == 200
                assert (await caller.get("/v2/health/ready")).status_code == 200
                late = await caller.get("/v1/models", headers=bearer(junk(-1)))
                assert (late.status_code, late.json()["code"]) == (503, "server.busy")
                assert not any(task.done() for task in waiting)
                assert silent.ended == []
                silent.gate.set()
                replies = await asyncio.gather(*waiting)
                assert [reply.status_code for reply in replies] == [200] + [401] * (MAX_WAITING - 1)

        client.portal.call(ask)
        assert found.fetches == 1
        assert found._waiting == 0


def test_waiters_give_up_together_and_fetch_nothing_more(lab, silent):
    """The bound is of the fetch's age: who comes when it is over is told at once."""
    clock = Time()
    keys = silent_keys(silent, clock, wait_s=0.0)
    verifier = TokenVerifier(
        issuer=SILENT, audience=AUDIENCE, keys=keys, pseudonym=lambda _, subject: f"p-{subject}",
        claims=Claims(role="affidavit_role", region="r", models="m", site="s"), clock=lab.clock,
    )  # fmt: skip

    async def ask() -> list[object]:
        asked = (verifier.authenticated(junk(number)) for number in range(3 * MAX_WAITING))
        return await asyncio.gather(*asked, return_exceptions=True)

    for _ in range(3):
        told = asyncio.run(ask())
        assert {type(error) for error in told} == {IssuerUnreachableError}
        assert "has not answered yet" in str(told[0])
        clock.now += 1_000.0  # however long it takes, nobody fetches beside it
    with pytest.raises(IssuerUnreachableError):
        keys.key("good")
    assert keys.fetches == 1
    assert silent.ended == []


def test_stale_keys_count_at_once_while_the_issuer_is_silent(silent):
    clock = Time()
    keys = silent_keys(silent, clock)
    silent.gate.set()
    assert keys.key("good").key_id == "good"
    silent.gate.clear()
    silent.begun.clear()
    clock.now += LIFESPAN_S + 1
    assert [keys.key("good").key_id for _ in range(20)] == ["good"] * 20
    assert silent.begun.wait(120), "somebody looks for new ones meanwhile"
    assert (keys.fetches, len(silent.ended)) == (2, 1)
    flight = keys._flight
    silent.gate.set()
    flight.done.result(120)
    assert clock.now - keys._known.fetched == 0, "and what they find counts"
    assert keys.key("good").key_id == "good"
    assert keys.fetches == 2


def test_next_try_is_counted_from_the_end_of_the_last():
    clock, asked = Time(), []

    def slow(url: str) -> bytes:
        asked.append(url)
        clock.now += 10 * RETRY_S
        raise OSError("timed out")

    keys = silent_keys(slow, clock)
    for _ in range(20):
        with pytest.raises(IssuerUnreachableError, match="timed out"):
            keys.key("good")
    assert len(asked) == 1
    clock.now += RETRY_S
    with pytest.raises(IssuerUnreachableError):
        keys.key("good")
    assert len(asked) == 2


def test_fetch_that_breaks_in_an_unforeseen_way_ends_and_is_tried_again():
    clock, answers = Time(), [b'{"keys": ' + b"[" * 100_000, b"{}", b"[]"]
    keys = silent_keys(lambda _: answers.pop() if answers else json.dumps({"keys": [_JWK]}).encode(), clock)
    for _ in range(3):
        with pytest.raises(IssuerUnreachableError):
            keys.key("good")
        clock.now += RETRY_S
    assert keys.key("good").key_id == "good"


def test_waiter_that_goes_away_leaves_its_place(silent):
    keys = silent_keys(silent, Time())

    async def ask() -> None:
        tasks = [asyncio.ensure_future(keys.sought("good")) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(TooBusyError):
            await keys.sought("good")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert keys._waiting == 0
        last = asyncio.ensure_future(keys.sought("good"))
        await asyncio.sleep(0)
        silent.gate.set()
        await last
        assert keys.at_hand("good").key_id == "good"

    asyncio.run(ask())
    assert keys.fetches == 1


@pytest.mark.parametrize(("places", "waiting"), [(512, MAX_WAITING), (100, 25), (8, 2), (1, 1)])
def test_those_who_wait_leave_most_places_to_the_others(lab, places, waiting):
    settings = lab.settings(oidc_issuer=SILENT, oidc_audience=AUDIENCE, max_in_flight=places)
    made = server.oidc.token_verifier(settings, lambda issuer, subject: "p", lab.clock)
    assert made._keys._most_waiting == waiting
