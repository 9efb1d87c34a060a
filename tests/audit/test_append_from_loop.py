"""Coroutines that append: each gets its own place, whatever the others do; a batch with retries is exact."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from audit._sequencer import Sequencer
from audit.errors import (
    EntrySizeError,
    EventIdConflictError,
    LedgerBusyError,
    LedgerClosedError,
    LedgerWriteError,
)
from audit.fsck import fsck
from audit.ledger import Ledger, Sequenced


def held(max_pending: int = 100) -> tuple[Sequencer[Any, Any], threading.Event, list[list[Any]]]:
    """A sequencer whose first batch waits for the event; it echoes what it is given, and keeps it."""
    gate, seen = threading.Event(), []

    def commit(batch: list[Any]) -> list[Any]:
        seen.append(batch)
        assert gate.wait(20)
        return batch

    return Sequencer(commit, max_batch=4, max_pending=max_pending), gate, seen


def test_crowd_in_one_loop_gets_each_its_own_place(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    async def one(number: int) -> Sequenced:
        made = log_tools.make_entry(number)
        placed = await ledger.append_from_loop(made.body, event_id=made.event_id, index_columns=made.columns)
        assert ledger.entry(placed.leaf_index) == made.body  # durable when it is told
        return placed

    async def crowd() -> list[Sequenced]:
        return await asyncio.gather(*(one(number) for number in range(600)))

    placed = asyncio.run(crowd())
    assert sorted(each.leaf_index for each in placed) == list(range(600))


def test_batch_of_new_known_and_contradicting_events_is_sorted_out(
    place: Path | str, log_tools: SimpleNamespace
) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(5))
        pause = threading.Event()
        commit = ledger._sequencer._commit
        ledger._sequencer._commit = lambda batch: (pause.wait(20), commit(batch))[1]
        numbers = [7, 3, 8, 3, 7, 4]
        futures = [
            ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
            for made in map(log_tools.make_entry, numbers)
        ]
        other = log_tools.make_entry(2, text="changed")
        refused = ledger.append(other.body, event_id=other.event_id, index_columns=other.columns)
        pause.set()
        assert [future.result(30).leaf_index for future in futures] == [5, 3, 6, 3, 5, 4]
        with pytest.raises(EventIdConflictError):
            refused.result(30)
        assert ledger.tree_size == 7
    report = fsck(place, columns_of=log_tools.columns_of)
    assert report.ok, report


def test_every_fault_reaches_the_coroutine_that_waits(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    first, other = log_tools.make_entry(1), log_tools.make_entry(1, text="changed")
    log_tools.fill(ledger, range(1, 2))

    async def ask() -> None:
        with pytest.raises(EventIdConflictError):
            await ledger.append_from_loop(other.body, event_id=other.event_id, index_columns=other.columns)
        with pytest.raises(EntrySizeError):
            ledger.append_from_loop(b"", event_id="a", index_columns=first.columns)
        ledger.close()
        with pytest.raises(LedgerClosedError):
            ledger.append_from_loop(first.body, event_id=first.event_id, index_columns=first.columns)

    asyncio.run(ask())


def test_fault_of_the_database_fails_the_whole_batch_and_no_more() -> None:
    answers: list[Any] = [RuntimeError("disk"), ["fine"]]

    def commit(batch: list[str]) -> list[str]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    sequencer: Sequencer[str, str] = Sequencer(commit, max_batch=4, max_pending=10)

    async def ask() -> None:
        with pytest.raises(LedgerWriteError, match="disk"):
            await sequencer.submit_from_loop("a")
        assert await sequencer.submit_from_loop("b") == "fine"

    asyncio.run(ask())
    sequencer.close()


def test_given_up_before_its_batch_is_never_written() -> None:
    sequencer, gate, seen = held()

    async def ask() -> None:
        first = sequencer.submit_from_loop("first")
        while not seen:
            await asyncio.sleep(0.001)
        second, third = sequencer.submit_from_loop("second"), sequencer.submit_from_loop("third")
        second.cancel()
        gate.set()
        assert (await first, await third) == ("first", "third")

    asyncio.run(ask())
    sequencer.close()
    assert seen == [["first"], ["third"]]


def test_given_up_during_its_batch_harms_no_neighbour() -> None:
    sequencer, gate, seen = held()

    async def ask() -> None:
        futures = [sequencer.submit_from_loop(name) for name in "ab"]
        while not seen:
            await asyncio.sleep(0.001)
        futures[0].cancel()
        gate.set()
        assert await futures[1] == "b"

    asyncio.run(ask())
    sequencer.close()


def test_loop_that_died_does_not_stop_the_others() -> None:
    sequencer, gate, seen = held()

    async def leave() -> None:
        sequencer.submit_from_loop("orphan")
        while not seen:
            await asyncio.sleep(0.001)

    asyncio.run(leave())
    thread = sequencer.submit("thread")
    gate.set()
    assert thread.result(20) == "thread"
    assert [request for batch in seen for request in batch] == ["orphan", "thread"]
    sequencer.close()


def test_full_queue_says_when_to_come_back() -> None:
    sequencer, gate, seen = held(max_pending=2)

    async def ask() -> None:
        first = sequencer.submit_from_loop("first")
        while not seen:
            await asyncio.sleep(0.001)
        waiting = [sequencer.submit_from_loop(name) for name in "ab"]
        with pytest.raises(LedgerBusyError) as caught:
            sequencer.submit_from_loop("c")
        assert caught.value.retry_after_s > 0
        gate.set()
        assert [await first, *[await each for each in waiting]] == ["first", "a", "b"]

    asyncio.run(ask())
    sequencer.close()


def test_no_loop_is_said_at_once() -> None:
    sequencer, _, seen = held()
    with pytest.raises(RuntimeError, match="no running event loop"):
        sequencer.submit_from_loop("a")
    sequencer.close()
    assert seen == []


def test_what_one_turn_of_a_loop_queues_is_one_batch() -> None:
    seen: list[list[Any]] = []
    sequencer: Sequencer[Any, Any] = Sequencer(
        lambda batch: (seen.append(batch), batch)[1], max_batch=64, max_pending=100
    )

    async def turn(first: int) -> list[Any]:
        return await asyncio.gather(*(sequencer.submit_from_loop(first + number) for number in range(20)))

    async def turns() -> None:
        await sequencer.submit_from_loop(-1)  # the thread is there and waits
        for first in range(0, 200, 20):
            while not sequencer._idle:
                await asyncio.sleep(0.001)
            assert await turn(first) == list(range(first, first + 20))

    asyncio.run(turns())
    sequencer.close()
    assert [len(batch) for batch in seen] == [1] + [20] * 10


def test_loop_that_ends_before_its_turn_does_loses_nothing_for_others() -> None:
    sequencer: Sequencer[Any, Any] = Sequencer(lambda batch: batch, max_batch=64, max_pending=100)
    sequencer.submit(0).result(20)
    while not sequencer._idle:
        threading.Event().wait(0.001)

    async def leaves() -> None:
        sequencer.submit_from_loop("left")

    gone = asyncio.new_event_loop()
    gone.call_soon = lambda *_, **__: None  # what it would do next is never done
    asyncio._set_running_loop(gone)
    try:
        leaves().send(None)
    except StopIteration:
        pass
    finally:
        asyncio._set_running_loop(None)
        gone.close()

    async def comes() -> Any:
        return await sequencer.submit_from_loop("came")

    assert asyncio.run(asyncio.wait_for(comes(), 20)) == "came"
    assert sequencer.submit("thread").result(20) == "thread"
    sequencer.close()


def gated() -> tuple[Sequencer[Any, Any], list[list[Any]], threading.Semaphore]:
    """A sequencer that commits a batch for each release of the semaphore."""
    seen: list[list[Any]] = []
    gate = threading.Semaphore(0)

    def commit(batch: list[Any]) -> list[Any]:
        seen.append(batch)
        assert gate.acquire(timeout=20)
        return batch

    return Sequencer(commit, max_batch=64, max_pending=100), seen, gate


async def crowd_of_eight(
    sequencer: Sequencer[Any, Any], seen: list[list[Any]], gate: threading.Semaphore, *, come_back: bool
) -> None:
    """Eight share a commit; a ninth comes during it; the eight come back as soon as they hear, or not."""

    async def one(number: int) -> None:
        await sequencer.submit_from_loop(number)
        if come_back:
            await sequencer.submit_from_loop(number + 100)

    gate.release()
    await sequencer.submit_from_loop("first")  # the thread is there and waits
    while not sequencer._idle:
        await asyncio.sleep(0.001)
    eight = [asyncio.create_task(one(number)) for number in range(8)]
    while len(seen) < 2:
        await asyncio.sleep(0.001)
    straggler = sequencer.submit_from_loop("straggler")
    for _ in range(8):
        gate.release()
    await asyncio.wait_for(asyncio.gather(straggler, *eight), 20)


async def eight_in_a_commit(
    sequencer: Sequencer[Any, Any], seen: list[list[Any]], gate: threading.Semaphore
) -> list[asyncio.Future[Any]]:
    """Return what eight wait for whose commit has begun and waits for the gate."""
    gate.release()
    await sequencer.submit_from_loop("first")
    eight = [sequencer.submit_from_loop(number) for number in range(8)]
    while len(seen) < 2:
        await asyncio.sleep(0.001)
    return eight


def test_who_comes_during_a_crowds_commit_shares_the_crowds_next_one() -> None:
    sequencer, seen, gate = gated()
    asyncio.run(crowd_of_eight(sequencer, seen, gate, come_back=True))
    sequencer.close()
    assert [len(batch) for batch in seen] == [1, 8, 9]
    assert seen[2][0] == "straggler"  # in the order in which they came


def test_crowd_that_fell_apart_comes_together_again() -> None:
    sequencer, seen, gate = gated()

    async def one(number: int) -> None:
        await sequencer.submit_from_loop(number)
        await sequencer.submit_from_loop(number + 100)

    async def ask() -> None:
        gate.release()
        await sequencer.submit_from_loop("first")
        while not sequencer._idle:
            await asyncio.sleep(0.001)
        half = [asyncio.create_task(one(number)) for number in range(8)]
        while len(seen) < 2:
            await asyncio.sleep(0.001)
        other = [asyncio.create_task(one(number)) for number in range(8, 16)]
        await asyncio.sleep(0.01)  # they wait beside the commit of the first half
        for _ in range(8):
            gate.release()
        await asyncio.wait_for(asyncio.gather(*half, *other), 20)

    asyncio.run(ask())
    sequencer.close()
    assert [len(batch) for batch in seen] == [1, 8, 16, 8]


def test_who_comes_alone_again_and_again_is_left_to_no_turn_of_the_loop() -> None:
    sequencer, seen, gate = gated()

    async def ask() -> None:
        for number in range(3):
            gate.release()
            await sequencer.submit_from_loop(number)
            assert not sequencer._is_few(1)

    asyncio.run(ask())
    sequencer.close()
    assert [len(batch) for batch in seen] == [1, 1, 1]


def test_crowd_that_does_not_come_back_keeps_nobody_waiting() -> None:
    sequencer, seen, gate = gated()
    asyncio.run(crowd_of_eight(sequencer, seen, gate, come_back=False))
    sequencer.close()
    assert [len(batch) for batch in seen] == [1, 8, 1]


def test_thread_waits_for_no_crowd_of_a_loop() -> None:
    sequencer, seen, gate = gated()

    async def ask() -> None:
        eight = await eight_in_a_commit(sequencer, seen, gate)
        thread = sequencer.submit("thread")
        for _ in range(8):
            gate.release()
        assert thread.result(20) == "thread"  # the loop stands still meanwhile
        await asyncio.gather(*eight)

    asyncio.run(ask())
    sequencer.close()
    assert [len(batch) for batch in seen] == [1, 8, 1]


def test_what_is_left_to_a_loop_that_ends_is_written_by_whoever_comes_next() -> None:
    sequencer, seen, gate = gated()

    async def leaves() -> None:
        await eight_in_a_commit(sequencer, seen, gate)
        sequencer.submit_from_loop("straggler")

    asyncio.run(leaves())
    for _ in range(8):
        gate.release()

    async def comes() -> Any:
        return await sequencer.submit_from_loop("came")

    assert asyncio.run(asyncio.wait_for(comes(), 20)) == "came"
    sequencer.close()
    assert [request for batch in seen for request in batch] == ["first", *range(8), "straggler", "came"]


def test_close_writes_what_was_left_to_a_loop() -> None:
    sequencer, seen, gate = gated()

    async def ask() -> None:
        eight = await eight_in_a_commit(sequencer, seen, gate)
        straggler = sequencer.submit_from_loop("straggler")
        for _ in range(8):
            gate.release()
        sequencer.close()  # blocks the loop, which therefore calls nobody
        assert await straggler == "straggler"
        await asyncio.gather(*eight)

    asyncio.run(asyncio.wait_for(ask(), 30))
    assert [len(batch) for batch in seen] == [1, 8, 1]
