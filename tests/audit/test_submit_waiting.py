"""Those who wait in a loop are told together and in order, each of what became of its own request."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from audit._append_request import append_request
from audit._sequencer import Sequencer
from audit.errors import (
    AuditError,
    EventIdConflictError,
    LedgerBusyError,
    LedgerClosedError,
    LedgerWriteError,
)
from audit.ledger import Ledger, Sequenced


class Waiter:
    """Writes down what it is told; "turn" stands after what was told in one turn of its loop."""

    def __init__(self, name: Any, heard: list[Any], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.name, self._heard = name, heard
        self._loop = loop or asyncio.get_running_loop()
        self.told: list[Any] = []
        self.has_left = False

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def done(self) -> bool:
        return self.has_left or bool(self.told)

    def set_result(self, result: Any, /) -> None:
        assert asyncio.get_running_loop() is self._loop
        if not self._heard or self._heard[-1] == "turn":
            self._loop.call_soon(self._heard.append, "turn")
        self.told.append(result)
        self._heard.append(self.name)

    set_exception = set_result


class Gated:
    """A sequencer that commits a batch for each release, and echoes it."""

    def __init__(self, *, max_batch: int = 64, max_pending: int = 100) -> None:
        self.seen: list[list[Any]] = []
        self._gate = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)
        self.sequencer: Sequencer[Any, Any] = Sequencer(
            self._commit, max_batch=max_batch, max_pending=max_pending
        )

    def _commit(self, batch: list[Any]) -> list[Any]:
        self.seen.append(batch)
        self._begun.release()
        assert self._gate.acquire(timeout=20)
        return [self.outcome(request) for request in batch]

    def outcome(self, request: Any) -> Any:
        return ("written", request)

    def release(self, count: int = 1) -> None:
        self._gate.release(count)

    def until_begun(self) -> None:
        """Wait, with the loop standing still, until another commit has begun."""
        assert self._begun.acquire(timeout=20)


async def many_in_a_commit(gated: Gated) -> list[asyncio.Future[Any]]:
    """Return what thirty wait for whose commit has begun and waits for the gate."""
    if not gated.seen:
        gated.release()
        await gated.sequencer.submit_from_loop("first")  # the thread is there
        gated.until_begun()
    while not gated.sequencer._idle:
        await asyncio.sleep(0.001)
    many = [gated.sequencer.submit_from_loop(number) for number in range(30)]
    while gated.seen[-1] != list(range(30)):
        await asyncio.sleep(0.001)
    gated.until_begun()
    return many


def waiters(names: Any, heard: list[Any]) -> list[tuple[Any, Waiter]]:
    return [(name, Waiter(name, heard)) for name in names]


async def until_told(pairs: list[tuple[Any, Waiter]]) -> None:
    async with asyncio.timeout(20):
        while not all(waiter.done() for _, waiter in pairs):
            await asyncio.sleep(0.001)
    await asyncio.sleep(0)


def all_told(pairs: list[tuple[Any, Waiter]]) -> None:
    assert [waiter.told for _, waiter in pairs] == [[("written", name)] for name, _ in pairs]


def test_those_of_one_batch_are_told_in_one_turn_in_order() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        pairs = waiters(range(40), heard)
        gated.sequencer.submit_waiting(pairs)
        gated.release()
        await until_told(pairs)
        all_told(pairs)

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [list(range(40))]
    assert heard == [*range(40), "turn"]


def test_loop_is_called_once_for_each_batch() -> None:
    gated, heard, calls = Gated(max_batch=4), [], []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *given, **more: (calls.append(given), call(*given, **more))[1]  # type: ignore[method-assign,assignment,func-returns-value]
        pairs = waiters(range(10), heard)
        gated.sequencer.submit_waiting(pairs)
        gated.release(3)
        await until_told(pairs)
        all_told(pairs)

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [name for name in heard if name != "turn"] == list(range(10))
    assert len(calls) == 3


def test_over_the_limit_none_is_queued_and_those_who_wait_are_unharmed() -> None:
    gated, heard = Gated(max_pending=4), []

    async def main() -> None:
        first, two, three = (waiters(names, heard) for names in ("a", "bc", "def"))
        gated.sequencer.submit_waiting(first)
        gated.until_begun()
        gated.sequencer.submit_waiting(two)
        with pytest.raises(LedgerBusyError) as caught:
            gated.sequencer.submit_waiting(three)
        assert caught.value.retry_after_s > 0
        assert caught.value.pending == 2
        with pytest.raises(LedgerBusyError):
            gated.sequencer.submit_waiting(waiters("12345", heard))
        fits = waiters("gh", heard)
        gated.sequencer.submit_waiting(fits)
        gated.release(5)
        await until_told([*first, *two, *fits])
        all_told([*first, *two, *fits])
        assert [waiter.told for _, waiter in three] == [[]] * 3

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [["a"], ["b", "c", "g", "h"]]


def test_closed_ledger_takes_none_and_tells_none() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        before = waiters("ab", heard)
        gated.sequencer.submit_waiting(before)
        gated.release()
        gated.sequencer.close()  # finishes those that wait
        after = waiters("cd", heard)
        with pytest.raises(LedgerClosedError):
            gated.sequencer.submit_waiting(after)
        with pytest.raises(LedgerClosedError):
            gated.sequencer.submit_waiting([])
        await until_told(before)
        all_told(before)
        assert [waiter.told for _, waiter in after] == [[], []]

    asyncio.run(main())
    assert gated.seen == [["a", "b"]]


def test_who_has_left_before_its_commit_is_not_written() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        first, rest = waiters("a", heard), waiters("bcdef", heard)
        gated.sequencer.submit_waiting(first)
        gated.until_begun()
        gated.sequencer.submit_waiting(rest)
        for place in (0, 2, 4):
            rest[place][1].has_left = True
        gated.release(2)
        await until_told([*first, *rest])

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [["a"], ["c", "e"]]
    assert [name for name in heard if name != "turn"] == ["a", "c", "e"]


def test_who_has_left_during_its_commit_is_written_and_not_told() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        pairs = waiters("abc", heard)
        gated.sequencer.submit_waiting(pairs)
        gated.until_begun()
        pairs[1][1].has_left = True
        gated.release()
        await until_told(pairs)
        assert pairs[1][1].told == []

    asyncio.run(main())
    gated.sequencer.close()
    assert (gated.seen, heard) == ([["a", "b", "c"]], ["a", "c", "turn"])


def test_crowd_that_has_left_as_a_whole_needs_no_commit() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        first, gone, last = (waiters(names, heard) for names in ("a", "bc", "d"))
        gated.sequencer.submit_waiting(first)
        gated.until_begun()
        gated.sequencer.submit_waiting(gone)
        for _, waiter in gone:
            waiter.has_left = True
        gated.release()
        await until_told(first)
        gated.sequencer.submit_waiting(last)
        gated.release()
        await until_told(last)

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [["a"], ["d"]]


@pytest.mark.parametrize(
    "error", [LedgerWriteError("full"), LedgerBusyError(retry_after_s=1.0, pending=1), OSError(5)]
)
def test_commit_that_fails_tells_each_of_its_batch_and_no_other(error: Exception) -> None:
    answers: list[Any] = [error, None]
    heard: list[Any] = []

    def commit(batch: list[Any]) -> list[Any]:
        failure = answers.pop(0)
        if failure is not None:
            raise failure
        return [("written", request) for request in batch]

    sequencer: Sequencer[Any, Any] = Sequencer(commit, max_batch=4, max_pending=10)

    async def main() -> None:
        pairs, later = waiters("abcd", heard), waiters("ef", heard)
        sequencer.submit_waiting(pairs)
        await until_told(pairs)
        assert heard == ["a", "b", "c", "d", "turn"]
        for _, waiter in pairs:
            (told,) = waiter.told
            assert isinstance(told, AuditError)
            if isinstance(error, AuditError):
                assert told is error
            else:
                assert isinstance(told, LedgerWriteError)
                assert told.__cause__ is error
        sequencer.submit_waiting(later)
        await until_told(later)
        all_told(later)

    asyncio.run(main())
    sequencer.close()


def test_one_that_is_refused_harms_no_neighbour() -> None:
    refusal, heard = LedgerWriteError("this one"), []
    sequencer: Sequencer[Any, Any] = Sequencer(
        lambda batch: [refusal if name == "b" else ("written", name) for name in batch],
        max_batch=9,
        max_pending=9,
    )

    async def main() -> None:
        pairs = waiters("abc", heard)
        sequencer.submit_waiting(pairs)
        await until_told(pairs)
        assert [waiter.told for _, waiter in pairs] == [[("written", "a")], [refusal], [("written", "c")]]

    asyncio.run(main())
    sequencer.close()
    assert heard == ["a", "b", "c", "turn"]


@pytest.mark.parametrize("comes", ["during the commit", "after it"])
def test_crowd_is_written_without_a_turn_of_the_loop_though_the_last_batches_were_larger(comes: str) -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        for _ in range(2):
            large = waiters(range(32), heard)
            gated.sequencer.submit_waiting(large)
            gated.until_begun()
            gated.release()
            await until_told(large)
        if comes == "during the commit":
            busy = await many_in_a_commit(gated)
        few = waiters("ab", heard)
        gated.sequencer.submit_waiting(few)
        gated.release()
        gated.until_begun()  # the loop stands still: nobody can have waited for it
        gated.release()
        await until_told(few)
        all_told(few)
        if comes == "during the commit":
            assert await asyncio.gather(*busy) == [("written", number) for number in range(30)]

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen[-1] == ["a", "b"]


def test_futures_that_are_held_for_a_crowd_go_with_it() -> None:
    """Fewer than the last batch wait for turns of the loop; a crowd that comes takes them along at once."""
    gated, heard = Gated(), []

    async def main() -> None:
        large = await many_in_a_commit(gated)
        held = gated.sequencer.submit_from_loop("held")
        few = waiters("ab", heard)
        gated.sequencer.submit_waiting(few)
        gated.release()
        gated.until_begun()
        gated.release()
        await until_told(few)
        assert await held == ("written", "held")
        await asyncio.gather(*large)

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen[2:] == [["held", "a", "b"]]


def test_empty_crowd_is_nothing() -> None:
    gated, heard = Gated(), []

    async def main() -> None:
        gated.sequencer.submit_waiting([])
        pairs = waiters("ab", heard)
        gated.sequencer.submit_waiting(pairs)
        gated.sequencer.submit_waiting([])
        gated.release()
        await until_told(pairs)
        gated.sequencer.submit_waiting([])
        all_told(pairs)

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [["a", "b"]]


def test_future_of_the_loop_is_a_waiter_too() -> None:
    gated = Gated()

    async def main() -> None:
        futures = [asyncio.get_running_loop().create_future() for _ in range(3)]
        gated.sequencer.submit_waiting(list(zip("abc", futures, strict=True)))
        gated.until_begun()
        futures[1].cancel()
        gated.release()
        assert await asyncio.gather(futures[0], futures[2]) == [("written", "a"), ("written", "c")]

    asyncio.run(main())
    gated.sequencer.close()


def test_batch_of_two_loops_is_told_in_each_of_them_though_one_has_closed() -> None:
    gated, heard = Gated(), []
    gone = asyncio.new_event_loop()
    left = Waiter("left", heard, gone)

    async def main() -> None:
        first = waiters("a", heard)
        gated.sequencer.submit_waiting(first)
        gated.until_begun()
        pairs = waiters("bc", heard)
        gated.sequencer.submit_waiting([pairs[0], ("left", left), pairs[1]])
        gone.close()
        gated.release(2)
        await until_told([*first, *pairs])
        all_told([*first, *pairs])

    asyncio.run(main())
    gated.sequencer.close()
    assert gated.seen == [["a"], ["b", "left", "c"]]
    assert left.told == []


def test_crowds_of_loops_and_requests_of_threads_get_each_their_own() -> None:
    seen: list[list[Any]] = []
    sequencer: Sequencer[Any, Any] = Sequencer(
        lambda batch: (seen.append(batch), [("written", request) for request in batch])[1],
        max_batch=16,
        max_pending=10_000,
    )
    failures: list[Exception] = []

    def thread(place: int) -> None:
        try:
            for number in range(60):
                request = ("thread", place, number)
                assert sequencer.submit(request).result(20) == ("written", request)
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    def loop(place: int) -> None:
        async def main() -> None:
            heard: list[Any] = []
            for turn in range(20):
                pairs = waiters(
                    [("loop", place, turn * 50 + number) for number in range(1 + turn * 2)], heard
                )
                sequencer.submit_waiting(pairs)
                alone = sequencer.submit_from_loop(("alone", place, turn))
                await until_told(pairs)
                all_told(pairs)
                assert await alone == ("written", ("alone", place, turn))
            names = [name for name in heard if name != "turn"]
            assert names == sorted(names)

        try:
            asyncio.run(main())
        except Exception as error:  # noqa: BLE001 - told to the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2) for work in (thread, loop)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    sequencer.close()
    assert failures == []
    written = [request for batch in seen for request in batch]
    assert len(written) == len(set(written)) == 2 * (60 + 20 + sum(1 + turn * 2 for turn in range(20)))
    for kind, place in {(request[0], request[1]) for request in written}:
        numbers = [request[2] for request in written if request[:2] == (kind, place)]
        assert numbers == sorted(numbers)
    assert max(map(len, seen)) <= 16


def test_crowd_at_a_ledger_has_each_its_place_durable_when_it_is_told(
    ledger: Ledger, log_tools: SimpleNamespace
) -> None:
    log_tools.fill(ledger, range(3))

    class Durable(Waiter):
        def set_result(self, result: Any, /) -> None:
            super().set_result(result)
            if isinstance(result, Sequenced):
                assert ledger.entry(result.leaf_index) == log_tools.make_entry(self.name).body

        set_exception = Waiter.set_exception

    async def main() -> list[Any]:
        heard: list[Any] = []
        numbers = [1, *range(3, 200)]  # the first is known
        made = {number: log_tools.make_entry(number) for number in numbers}
        pairs = [
            (append_request(made[n].body, made[n].event_id, made[n].columns), Durable(n, heard))
            for n in numbers
        ]
        other = log_tools.make_entry(2, text="changed")
        pairs.append((append_request(other.body, other.event_id, other.columns), Waiter("changed", heard)))
        ledger.append_waiting(pairs)
        await until_told(pairs)
        return [waiter.told for _, waiter in pairs]

    told = asyncio.run(main())
    assert [placed.leaf_index for (placed,) in told[:-1]] == [1, *range(3, 200)]
    assert isinstance(told[-1][0], EventIdConflictError)
    assert ledger.tree_size == 200
