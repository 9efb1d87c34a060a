"""An answer waits for its entry, and not for ever; what was given up is not written afterwards."""

from __future__ import annotations

import asyncio
import threading

import pytest

from audit.entries import AccessDenied
from audit.errors import LedgerWriteError
from server.errors import LedgerUnavailableError
from server.journal import Journal, time_text, utc_now
from server.monitoring import Monitoring
from tests.waiting import GENEROUS_S, LeapingLoop


def denied(number: int) -> AccessDenied:
    return AccessDenied(
        request_id=f"{number:032x}", action="log.read", principal="p-1", role="node", policies=("x",),
        policy_set="ab" * 32,
    )  # fmt: skip


@pytest.fixture
def held(lab):
    """The lab's ledger, whose commits wait for the event, and how many are in a commit or through it."""
    ledger, gate, reached = lab.coordinator.ledger, threading.Event(), []
    commit = ledger._sequencer._commit

    def held_commit(batch):
        reached.extend(batch)
        assert gate.wait(GENEROUS_S)
        return commit(batch)

    ledger._sequencer._commit = held_commit
    yield ledger, gate, reached
    gate.set()
    ledger._sequencer._commit = commit


def run_leaping(play):
    """Run the coroutine in a loop whose time the test moves."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        return runner.run(play)


async def committing(reached):
    """Return when the first entry is with the database."""
    while not reached:
        await asyncio.sleep(0.001)


def journal_of(ledger, timeout_s):
    return Journal(ledger, utc_now, Monitoring(), timeout_s=timeout_s)


async def outcome(journal, number):
    try:
        return (await journal.append(denied(number))).leaf_index
    except LedgerUnavailableError as error:
        return error.code


def test_wait_for_a_stuck_log_ends_for_everybody_in_time(lab, held):
    ledger, gate, reached = held
    journal = journal_of(ledger, 1000)

    async def crowd():
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(outcome(journal, 0))
        await committing(reached)
        loop.leap(500)
        others = [asyncio.create_task(outcome(journal, number)) for number in range(1, 9)]
        await asyncio.sleep(0)
        loop.leap(600)
        told = [await first]
        assert not any(other.done() for other in others), "each has its own time"
        loop.leap(500)
        return told + await asyncio.gather(*others)

    assert run_leaping(crowd()) == ["audit.ledger_unavailable"] * 9
    size = ledger.tree_size
    gate.set()
    ledger.append_wait(b"{}", event_id="later", index_columns=_columns())
    written = [entry["body"]["request_id"] for entry in lab.entries("access.denied")]
    assert written in ([], [f"{0:032x}"]), "only what was on its way when the wait ended may be written"
    assert ledger.tree_size == size + len(written) + 1


def test_answers_in_time_are_answers_though_others_were_late(lab, held):
    ledger, gate, reached = held
    journal = journal_of(ledger, 1000)

    async def early_and_late():
        loop = asyncio.get_running_loop()
        late = asyncio.create_task(outcome(journal, 0))
        await committing(reached)
        loop.leap(600)
        timely = asyncio.create_task(outcome(journal, 1))
        await asyncio.sleep(0)
        loop.leap(500)
        told = await late
        gate.set()
        return told, await timely

    told, index = run_leaping(early_and_late())
    assert told == "audit.ledger_unavailable"
    assert isinstance(index, int)


def test_journal_serves_one_loop_after_another(lab):
    journal = journal_of(lab.coordinator.ledger, 5)
    first, second = asyncio.run(outcome(journal, 1)), asyncio.run(outcome(journal, 2))
    assert second == first + 1


def test_failed_commit_is_no_answer(lab):
    ledger = lab.coordinator.ledger

    def refuses(batch):
        raise LedgerWriteError("the disk is full")

    ledger._sequencer._commit = refuses
    size = ledger.tree_size
    assert asyncio.run(outcome(journal_of(ledger, 5), 1)) == "audit.ledger_unavailable"
    assert ledger.tree_size == size


def test_time_is_written_in_whole_seconds_of_utc():
    from datetime import datetime, timedelta, timezone

    moment = datetime(2026, 7, 1, 1, 59, 59, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert time_text(moment) == "2026-06-30T23:59:59Z"


def _columns():
    from audit.entries import IndexColumns

    return IndexColumns(type="t", actor="t", time="2026-01-01T00:00:00Z")
