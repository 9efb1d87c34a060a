"""Refused reads: the first few of a minute are entries, and nobody fills the log with the others."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from starlette.testclient import TestClient

from audit.principal import AccessDeniedError, Decision, Principal, Question
from server import denials
from server.app import create_app
from server.denials import MOST, Denials
from server.errors import LedgerUnavailableError
from server.monitoring import Monitoring


def refused(client, headers, path="/v1/policy") -> list[dict]:
    replies = [client.get(path, headers=headers) for _ in range(4 * MOST)]
    assert {(reply.status_code, reply.json()["code"]) for reply in replies} == {(403, "access.denied")}
    return [reply.json() for reply in replies]


def test_sixty_refused_reads_are_a_few_entries_and_sixty_in_the_metric(lab, as_role):
    lab.clock.moment = lab.clock.moment.replace(second=15, microsecond=0)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        consumer = as_role("consumer")
        told = refused(client, consumer) + refused(client, consumer) + refused(client, consumer)
        assert ["entry" in each for each in told] == [True] * MOST + [False] * (11 * MOST)
        entries = lab.entries("access.denied")
        assert [entry["leaf_index"] for entry in entries] == [
            each["entry"]["leaf_index"] for each in told[:MOST]
        ]
        assert all(each["policies"] == ["default-deny"] for each in told), "each is told why"
        metrics = client.get("/metrics", headers=as_role("operator")).text
        action = entries[0]["body"]["action"]
        counted = f'affidavit_denials_total{{action="{action}",policy="default-deny"}} {12 * MOST}.0'
        assert counted in metrics
        refused(client, as_role("node"))
        assert len(lab.entries("access.denied")) == 2 * MOST, "another principal"
        refused(client, consumer, "/v1/keys")
        assert len(lab.entries("access.denied")) == 3 * MOST, "another action"
        lab.clock.forward(seconds=45)
        refused(client, consumer)
        assert len(lab.entries("access.denied")) == 4 * MOST, "another minute"


def test_refusals_at_once_are_no_more_entries(lab, as_role):
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:

        async def ask() -> set[int]:
            transport = httpx.ASGITransport(client.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as caller:
                asked = (caller.get("/v1/policy", headers=as_role("consumer")) for _ in range(4 * MOST))
                return {reply.status_code for reply in await asyncio.gather(*asked)}

        assert client.portal.call(ask) == {403}
    assert len(lab.entries("access.denied")) == MOST


class Log:
    """A journal that fails so often."""

    def __init__(self, failures: int) -> None:
        self.failures, self.entries = failures, []

    async def append(self, entry):
        if self.failures:
            self.failures -= 1
            raise LedgerUnavailableError("the disk is full")
        self.entries.append(entry)
        return SimpleNamespace(leaf_index=len(self.entries), leaf_hash=b"x")


def denied(principal: str = "p") -> AccessDeniedError:
    decision = Decision(allowed=False, policies=("default-deny",), policy_set="ab" * 32)
    question = Question(action="log.read", resource="service")
    return AccessDeniedError(Principal(id=principal, role="consumer"), question, decision)


def test_entry_that_is_not_durable_is_none_of_the_first(lab):
    log = Log(3 * MOST)
    found = Denials(log, Monitoring(), lab.clock)

    async def ask() -> None:
        for _ in range(3 * MOST):
            with pytest.raises(LedgerUnavailableError):
                await found.record(denied(), "0" * 32)
        for _ in range(3 * MOST):
            await found.record(denied(), "0" * 32)

    asyncio.run(ask())
    assert len(log.entries) == MOST


def test_memory_of_refusals_is_bounded(lab, monkeypatch):
    monkeypatch.setattr(denials, "_KEPT", 8)
    log = Log(0)
    found = Denials(log, Monitoring(), lab.clock)

    async def ask() -> None:
        for number in range(50):
            await found.record(denied(f"p-{number}"), "0" * 32)

    asyncio.run(ask())
    assert len(found._written) == 8
    assert len(log.entries) == 50
