"""One timer does for many tasks what `asyncio.timeout` does for one, beside which it is played."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.deadlines import Deadlines
from tests.server.skipping import run


def is_empty(deadlines: Deadlines) -> bool:
    return not deadlines._ends and not deadlines._late


async def limited(deadlines: Deadlines, seconds: float, work) -> str:
    """What becomes of some work: "late" is what asyncio.timeout makes a TimeoutError of."""
    loop = asyncio.get_running_loop()
    task = deadlines.start(loop, loop.time() + seconds)
    try:
        await work
    except asyncio.CancelledError:
        if not deadlines.stop(task):
            raise
        return "late"
    finally:
        deadlines.stop(task)
    return "done"


def test_late_task_is_cancelled_once_and_rid_of_it():
    async def main():
        deadlines, loop, heard = Deadlines(), asyncio.get_running_loop(), []
        begun, task = loop.time(), deadlines.start(loop, loop.time() + 5)
        for _ in range(2):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard.append(loop.time() - begun)
        assert task is asyncio.current_task()
        assert (heard, task.cancelling()) == ([5], 1)
        assert deadlines.stop(task) is True
        assert task.cancelling() == 0
        await asyncio.sleep(60)
        assert is_empty(deadlines)
        return loop.time() - begun

    assert run(main()) == 5 + 60 + 60


def test_task_in_time_hears_nothing_then_or_later():
    async def main():
        deadlines = Deadlines()
        assert await limited(deadlines, 5, asyncio.sleep(4.999)) == "done"
        assert is_empty(deadlines)
        await asyncio.sleep(60)
        assert asyncio.current_task().cancelling() == 0

    run(main())


@pytest.mark.parametrize("at", [0, 2])
def test_cancellation_by_others_stays_one(at):
    async def main():
        deadlines = Deadlines()
        task = asyncio.create_task(limited(deadlines, 5, asyncio.sleep(60)))
        await asyncio.sleep(at)
        task.cancel("by others")
        with pytest.raises(asyncio.CancelledError, match="by others" if at else None):
            await task
        assert task.cancelled()
        await asyncio.sleep(60)
        assert is_empty(deadlines)

    run(main())


def test_stop_of_a_task_that_others_cancelled_says_that_it_was_not_late():
    async def main():
        deadlines, loop, said = Deadlines(), asyncio.get_running_loop(), []

        async def work():
            task = deadlines.start(loop, loop.time() + 5)
            try:
                await asyncio.sleep(60)
            finally:
                said.extend([deadlines.stop(task), task.cancelling()])

        task = asyncio.create_task(work())
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.wait([task])
        assert (said, task.cancelled()) == ([False, 1], True)

    run(main())


@pytest.mark.parametrize("others_begin", [True, False])
@pytest.mark.parametrize("others_at", [4, 5, 6])
def test_task_that_is_late_and_cancelled_by_others_stays_cancelled(others_at, others_begin):
    """In one turn, or one of the two while the task puts away what it had for the other."""

    async def main():
        deadlines, loop, said = Deadlines(), asyncio.get_running_loop(), []

        async def work():
            task = deadlines.start(loop, begun + 5)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(3)
                said.extend([task.cancelling(), deadlines.stop(task)])
                raise

        begun = loop.time()
        task = asyncio.create_task(work())
        if not others_begin:
            await asyncio.sleep(0)  # the timer is there before theirs
        loop.call_at(begun + others_at, task.cancel)
        await asyncio.wait([task])
        assert task.cancelled()
        assert said == [2, False]
        assert is_empty(deadlines)

    run(main())


def test_task_that_finishes_in_the_turn_in_which_it_becomes_late_leaves_no_cancellation_behind():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        waited_for = loop.create_future()
        loop.call_at(loop.time() + 5, waited_for.set_result, None)
        said = await limited(deadlines, 5, waited_for)
        task = asyncio.current_task()
        assert task.cancelling() == 0
        await asyncio.sleep(60)
        return said

    assert run(main()) in ("late", "done")


def test_work_that_ignores_its_lateness_is_done_and_leaves_no_cancellation_behind():
    async def stubborn():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(60)

    async def main():
        deadlines = Deadlines()
        assert await limited(deadlines, 5, stubborn()) == "done"
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(60)
        assert is_empty(deadlines)

    run(main())


def test_work_that_fails_when_it_is_late_fails_as_it_says():
    async def failing():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("put away badly") from None

    async def main():
        deadlines = Deadlines()
        with pytest.raises(ValueError, match="put away badly"):
            await limited(deadlines, 5, failing())
        assert asyncio.current_task().cancelling() == 0
        assert is_empty(deadlines)

    run(main())


@pytest.mark.parametrize("limits", [[9, 1], [1, 9], [9, 5, 1], [5, 9, 1], [1, 1, 1], [3, 2, 9, 2, 1]])
def test_each_is_late_at_its_own_time_in_whichever_order_they_began(limits):
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        begun, late_after = loop.time(), {}

        async def one(place, limit):
            assert await limited(deadlines, limit, asyncio.sleep(60)) == "late"
            late_after[place] = loop.time() - begun

        await asyncio.gather(*(one(*pair) for pair in enumerate(limits)))
        assert is_empty(deadlines)
        return late_after

    assert run(main()) == dict(enumerate(limits))


def test_earlier_deadline_of_a_task_that_comes_later_is_kept():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        slow = asyncio.create_task(limited(deadlines, 60, asyncio.sleep(600)))
        await asyncio.sleep(10)
        begun = loop.time()
        assert await limited(deadlines, 1, asyncio.sleep(600)) == "late"
        assert loop.time() - begun == 1
        assert await slow == "late"
        assert loop.time() - begun == 50

    run(main())


def test_deadline_after_the_timer_has_looked_for_a_task_that_is_gone_is_kept():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        assert await limited(deadlines, 5, asyncio.sleep(1)) == "done"
        begun = loop.time()
        assert await limited(deadlines, 20, asyncio.sleep(60)) == "late"
        assert loop.time() - begun == 20
        begun = loop.time()
        assert await limited(deadlines, 20, asyncio.sleep(60)) == "late"
        assert loop.time() - begun == 20

    run(main())


@pytest.mark.parametrize("seconds", [0, -5])
def test_deadline_that_has_passed_is_kept_at_once(seconds):
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        begun = loop.time()
        assert await limited(deadlines, seconds, asyncio.sleep(60)) == "late"
        assert loop.time() == begun

    run(main())


def test_move_gives_more_time_and_no_more_than_that():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        begun = loop.time()
        task = deadlines.start(loop, begun + 5)
        await asyncio.sleep(4)
        deadlines.move(task, begun + 20)
        await asyncio.sleep(10)
        deadlines.move(task, begun + 30)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        assert loop.time() - begun == 30
        assert deadlines.stop(task) is True
        assert task.cancelling() == 0
        assert is_empty(deadlines)

    run(main())


def test_move_takes_no_time_of_another():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        begun = loop.time()
        other = asyncio.create_task(limited(deadlines, 6, asyncio.sleep(60)))
        await asyncio.sleep(0)
        task = deadlines.start(loop, begun + 5)
        deadlines.move(task, begun + 50)
        assert await other == "late"
        assert loop.time() - begun == 6
        assert deadlines.stop(task) is False

    run(main())


def test_stop_again_is_harmless_late_or_not():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        task = deadlines.start(loop, loop.time() + 5)
        assert [deadlines.stop(task) for _ in range(3)] == [False] * 3
        deadlines.start(loop, loop.time() + 5)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(60)
        assert [deadlines.stop(task) for _ in range(3)] == [True, False, False]
        assert task.cancelling() == 0
        assert await limited(deadlines, 5, asyncio.sleep(1)) == "done"  # it may begin again
        assert await limited(deadlines, 5, asyncio.sleep(6)) == "late"

    run(main())


def test_second_stop_takes_back_no_cancellation_by_others():
    async def main():
        deadlines, loop, counts = Deadlines(), asyncio.get_running_loop(), []

        async def work():
            task = deadlines.start(loop, loop.time() + 5)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                deadlines.stop(task)
            try:
                await asyncio.sleep(60)
            finally:
                deadlines.stop(task)
                counts.append(task.cancelling())

        task = asyncio.create_task(work())
        await asyncio.sleep(10)
        task.cancel()
        await asyncio.wait([task])
        assert (task.cancelled(), counts) == (True, [1])

    run(main())


@pytest.mark.parametrize("order", [1, -1])
def test_hundreds_of_tasks_have_one_timer_and_leave_nothing(order):
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        tasks = [
            asyncio.create_task(limited(deadlines, 10 + number / 64, asyncio.sleep(11 if number % 3 else 60)))
            for number in range(600)[::order]
        ]
        armed = []
        for _ in range(30):
            armed.append(loop.armed(deadlines._look))
            await asyncio.sleep(0.25)
        assert await asyncio.gather(*tasks) == [
            "late" if number % 3 == 0 or number <= 64 else "done" for number in range(600)[::order]
        ]
        assert set(armed[1:]) == {1}
        assert is_empty(deadlines)
        await asyncio.sleep(60)
        assert loop.armed(deadlines._look) == 0
        assert deadlines._timer is None

    run(main())


def test_requests_that_follow_each_other_set_no_timer_each():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        for _ in range(500):
            assert await limited(deadlines, 10, asyncio.sleep(0.01)) == "done"
        assert sum(called == deadlines._look for _, called in loop.timers) <= 2
        assert is_empty(deadlines)

    run(main())


@dataclass(frozen=True)
class Script:
    """A task's doings; "cancelled_at" is when somebody else cancels it."""

    begins_after: int
    limit: int
    sleeps: tuple[int, ...]
    is_stubborn: bool
    more: int  # time that it is given after its first sleep
    cancelled_at: int | None


SCRIPTS = st.builds(
    Script,
    begins_after=st.integers(0, 3),
    limit=st.integers(1, 6),
    sleeps=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    is_stubborn=st.booleans(),
    more=st.sampled_from([0, 0, 1, 5]),
    cancelled_at=st.none() | st.integers(1, 9),
)


async def played(script: Script, enter, move, leave) -> tuple[str, float, int]:
    """What became of a script, when, and how many cancellations were left."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    await asyncio.sleep(script.begins_after)
    at = loop.time() + script.limit

    async def work(limit) -> None:
        swallowed = False
        for number, seconds in enumerate(script.sleeps):
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                if not script.is_stubborn:
                    raise
                swallowed = True
            if number == 0 and script.more and not swallowed:
                move(limit, at + script.more)

    limit = await enter(loop, at)
    try:
        await work(limit)
        said = "done"
    except asyncio.CancelledError as error:
        said = await leave(limit, error)
    else:
        await leave(limit, None)
    return said, loop.time(), task.cancelling()


async def as_asyncio_has_it(script: Script) -> tuple[str, float, int]:
    async def enter(loop, at):
        limit = asyncio.timeout_at(at)
        await limit.__aenter__()
        return limit

    async def leave(limit, error):
        try:
            await limit.__aexit__(type(error) if error else None, error, None)
        except TimeoutError:
            return "late"
        return "cancelled"

    return await played(script, enter, lambda limit, at: limit.reschedule(at), leave)


async def as_deadlines_have_it(script: Script, deadlines: Deadlines) -> tuple[str, float, int]:
    async def enter(loop, at):
        return deadlines.start(loop, at)

    async def leave(task, error):
        was_late = deadlines.stop(task)
        deadlines.stop(task)
        return "late" if was_late else "cancelled"

    return await played(script, enter, deadlines.move, leave)


async def all_of(scripts: list[Script], one) -> list[object]:
    loop = asyncio.get_running_loop()
    tasks = [asyncio.create_task(one(script)) for script in scripts]
    for task, script in zip(tasks, scripts, strict=True):
        if script.cancelled_at is not None:
            loop.call_at(loop.time() + script.cancelled_at, task.cancel)
    await asyncio.wait(tasks)
    return ["cancelled before" if task.cancelled() else task.result() for task in tasks]


@given(st.lists(SCRIPTS, min_size=1, max_size=6))
@example([Script(0, 5, (5,), False, 0, None)])
@example([Script(0, 5, (9,), False, 0, 5)])
@example([Script(0, 5, (9, 9), True, 0, 2)])
@example([Script(0, 5, (4, 4), False, 5, None), Script(1, 2, (9,), True, 0, None)])
def test_what_becomes_of_tasks_is_what_asyncio_timeout_makes_of_each(scripts):
    async def main():
        deadlines = Deadlines()
        found = await all_of(scripts, lambda script: as_deadlines_have_it(script, deadlines))
        assert is_empty(deadlines)
        return found

    assert run(main()) == run(all_of(scripts, as_asyncio_has_it))


def test_second_loop_after_one_that_ended_with_its_timer_armed():
    deadlines = Deadlines()

    async def quick():
        return await limited(deadlines, 0.03, asyncio.sleep(0))

    async def slow():
        return await asyncio.wait_for(limited(deadlines, 0.05, asyncio.sleep(0.5)), 5)

    asyncio.run(quick())
    assert asyncio.run(slow()) == "late"


def test_task_that_put_a_cancellation_aside_before_is_late_all_the_same():
    async def main():
        task = asyncio.current_task()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        return await limited(Deadlines(), 5, asyncio.sleep(60))

    assert run(main()) == "late"


def test_more_time_comes_too_late_for_a_task_that_is_late():
    async def main():
        deadlines, loop = Deadlines(), asyncio.get_running_loop()
        task = deadlines.start(loop, loop.time() + 5)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        deadlines.move(task, loop.time() + 100)
        await asyncio.sleep(600)
        return deadlines.stop(task), task.cancelling()

    assert run(main()) == (True, 0)
