"""A limit that stands in a request's body ends that request, and nothing else does by its name."""

from __future__ import annotations

import asyncio

import pytest

from server.deadlines import Deadlines, OwnLimit
from server.errors import DeadlineError
from tests.server.skipping import run
from tests.server.test_deadlines import is_empty, limited


async def within(limit: OwnLimit, seconds: float | None, work, *, set_after: float = 0.0) -> str:
    """What becomes of work under a limit that somebody else sets."""
    loop = asyncio.get_running_loop()
    with limit:
        if seconds is not None:
            loop.call_later(set_after, limit.set, seconds)
        await work
    return "done"


@pytest.mark.parametrize("set_after", [0, 3, 9])
def test_own_limit_counts_from_where_it_was_entered(set_after):
    async def main():
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(DeadlineError, match="within 5 s"):
            await within(OwnLimit(), 5, asyncio.sleep(60), set_after=set_after)
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(1)
        return loop.time() - begun - 1

    assert run(main()) == max(5, set_after)


@pytest.mark.parametrize("seconds", [None, 5, 100])
def test_work_in_time_hears_nothing_of_its_own_limit(seconds):
    async def main():
        limit = OwnLimit()
        assert await within(limit, seconds, asyncio.sleep(4)) == "done"
        limit.set(1)  # too late to mean anything
        await asyncio.sleep(200)
        return asyncio.current_task().cancelling()

    assert run(main()) == 0


def test_first_own_limit_alone_counts():
    async def main():
        limit = OwnLimit()
        with limit:
            limit.set(50)
            limit.set(1)
            await asyncio.sleep(10)

    run(main())


def test_cancellation_by_others_is_not_taken_for_an_own_limit():
    async def main():
        task = asyncio.create_task(within(OwnLimit(), 50, asyncio.sleep(60)))
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        both = asyncio.create_task(within(OwnLimit(), 5, asyncio.sleep(60)))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(5, both.cancel)
        with pytest.raises(asyncio.CancelledError):
            await both

    run(main())


def test_own_limit_within_the_servers_gives_way_to_it():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        said = await limited(deadlines, 5, within(OwnLimit(), 50, asyncio.sleep(60)))
        begun = loop.time()
        with pytest.raises(DeadlineError):
            await limited(deadlines, 50, within(OwnLimit(), 5, asyncio.sleep(60)))
        assert is_empty(deadlines)
        return said, loop.time() - begun

    assert run(main()) == ("late", 5)
