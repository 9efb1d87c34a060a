"""Bells, held questions, the pace of a SuperNode: a lost ring loses nothing and keeps nobody waiting."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import types

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesResponse
from flwr.proto.message_pb2 import Message

from clients.network.supernode import HELD_S, Pace, quicken
from federation.network.bell import Bell, ring, with_sleep
from federation.network.ringing import GATEWAY, RingingGrid, bells_folder, with_bells
from server.network.holding import PullHold
from tests.waiting import took_at_best

EMPTY = PullMessagesResponse().SerializeToString()
FULL = PullMessagesResponse(messages_list=[Message()]).SerializeToString()


def soon(play):
    """Run it to its end, which is far from any time for which something may be held."""
    return asyncio.run(asyncio.wait_for(play, 60))


async def never():
    await asyncio.Event().wait()


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("b")  # short: Unix sockets have 107 characters


def test_a_ring_before_the_wait_is_kept_and_many_are_one(folder):
    with Bell(folder / "bell") as bell:
        for _ in range(5):
            ring(folder / "bell")
        assert bell.wait(0)
        assert not bell.wait(0)
        for _ in range(3):
            ring(folder / "bell")
        assert (bell.hush(), bell.hush()) == (3, 0)


def test_only_its_user_rings_and_nobody_hangs_on_a_long_path(folder):
    with Bell(folder / "bell"):
        assert os.stat(folder / "bell").st_mode & 0o077 == 0
    assert not (folder / "bell").exists()
    ring(folder / "bell")  # nobody there: nothing happens
    with pytest.raises(OSError, match="too long"):
        Bell(folder / ("x" * 110))


def test_a_changed_sleep_is_one_modules_alone():
    slept = []
    changed = with_sleep(time, slept.append)
    changed.sleep(3)
    assert slept == [3]
    assert changed.monotonic is time.monotonic
    assert time.sleep is not changed.sleep


def hold_of(folder, **options):
    hold = PullHold(**options)
    assert hold.start(folder / "bells" / GATEWAY)
    return hold


def test_a_question_waits_only_after_an_empty_answer_and_until_it_rings(folder):
    async def play():
        hold = hold_of(folder, hold_s=500)
        try:
            begun = time.monotonic()
            assert await hold.wait("a", never)  # the first is passed on at once
            hold.answered("a", hold.rings, FULL)
            assert await hold.wait("a", never)  # after a message there may be another
            hold.answered("a", hold.rings, EMPTY)
            asyncio.get_running_loop().call_later(0.05, ring, folder / "bells" / GATEWAY)
            assert await hold.wait("a", never)
            assert time.monotonic() - begun > 0.04
            before = hold.rings
            hold.answered("a", before - 1, EMPTY)  # it rang while SuperLink was being asked
            assert await hold.wait("a", never)
        finally:
            hold.stop()

    soon(play())


async def is_held(hold, node="a"):
    try:
        await asyncio.wait_for(hold.wait(node, never), 0.05)
    except TimeoutError:
        return True
    return False


async def ringing(folder, times):
    for _ in range(times):
        ring(folder / "bells" / GATEWAY)
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_after_as_many_messages_as_rings_the_next_question_waits(folder, runs):
    """Runs that send at the same moment ring as often as there are, however few times anybody looks."""

    async def play():
        hold = hold_of(folder, hold_s=500)
        hold.answered("a", hold.rings, EMPTY)
        for _ in range(2):
            await ringing(folder, runs)
            for _ in range(runs):
                assert not await is_held(hold)
                hold.answered("a", hold.rings, FULL)
            assert await is_held(hold)
        hold.stop()

    soon(play())


def test_a_message_that_was_not_rung_for_uses_up_no_later_ring(folder):
    async def play():
        hold = hold_of(folder, hold_s=500)
        hold.answered("a", hold.rings, EMPTY)
        for _ in range(3):
            hold.answered("a", hold.rings, FULL)  # found when the hold was over
        await ringing(folder, 1)
        assert not await is_held(hold)
        hold.stop()

    soon(play())


def test_a_ring_for_somebody_else_costs_one_empty_answer(folder):
    async def play():
        hold = hold_of(folder, hold_s=500)
        for node in ("a", "b"):
            hold.answered(node, hold.rings, EMPTY)
        await ringing(folder, 1)
        hold.answered("b", hold.rings, FULL)
        assert not await is_held(hold, "a")
        hold.answered("a", hold.rings, EMPTY)
        assert await is_held(hold, "a")
        assert await is_held(hold, "b")
        hold.stop()

    soon(play())


def test_a_ring_while_superlink_was_asked_is_another_message(folder):
    async def play():
        hold = hold_of(folder, hold_s=500)
        hold.answered("a", hold.rings, EMPTY)
        await ringing(folder, 1)
        before = hold.rings
        await ringing(folder, 1)
        hold.answered("a", before, FULL)
        assert not await is_held(hold)
        hold.answered("a", hold.rings, FULL)
        assert await is_held(hold)
        hold.stop()

    soon(play())


def test_a_lost_ring_costs_the_hold_and_no_more(folder):
    async def play():
        hold = hold_of(folder, hold_s=0.1)
        hold.answered("a", hold.rings, EMPTY)
        begun = time.monotonic()
        assert await hold.wait("a", never)
        assert time.monotonic() - begun > 0.09
        hold.stop()

    soon(play())


def test_nothing_is_pulled_for_a_node_that_hung_up(folder):
    async def gone():
        await asyncio.sleep(0.02)

    async def play():
        hold = hold_of(folder, hold_s=500)
        hold.answered("a", hold.rings, EMPTY)
        assert not await hold.wait("a", gone)
        hold.stop()

    soon(play())


def test_who_floods_the_hold_is_passed_on(folder):
    async def play():
        hold = hold_of(folder, hold_s=500, most=1)
        for node in ("a", "b"):
            hold.answered(node, hold.rings, EMPTY)
        first = asyncio.ensure_future(hold.wait("a", never))
        await asyncio.sleep(0)
        assert await hold.wait("b", never)
        hold.stop()
        assert await first

    soon(play())


@pytest.mark.parametrize("content", [b"\xff\xff", FULL])
def test_an_answer_that_is_not_plainly_empty_holds_nobody(folder, content):
    async def play():
        hold = hold_of(folder, hold_s=500)
        hold.answered("a", hold.rings, content)
        assert await hold.wait("a", never)
        hold.stop()

    soon(play())


def test_a_run_is_told_when_a_reply_is_whole_and_not_before(folder):
    async def play():
        hold = hold_of(folder)
        with Bell(folder / "bells" / "run-1") as bell:
            hold.reply_begun("a", PushMessagesResponse(objects_to_push=["x", "y"]).SerializeToString())
            hold.reply_part("a")
            assert not bell.wait(0)
            hold.reply_part("a")
            assert bell.wait(0)
            hold.reply_begun("b", PushMessagesResponse().SerializeToString())
            assert bell.wait(0)
            hold.reply_begun("b", b"\xff")
            assert not bell.wait(0)
        hold.stop()

    asyncio.run(play())


class PlayedGrid:
    def __init__(self):
        self.answers, self.pulls, self.pushed = [], 0, []

    def push_messages(self, messages):
        self.pushed += list(messages)
        return ["id"]

    def pull_messages(self, ids):
        self.pulls += 1
        return self.answers.pop(0) if self.answers else []


def test_a_sent_message_rings_the_gateway_and_a_ring_brings_the_reply(folder):
    grid = PlayedGrid()
    (folder / "network" / "bells").mkdir(parents=True)
    with Bell(bells_folder(folder) / GATEWAY) as gateway, with_bells(grid, folder) as heard:
        assert isinstance(heard, RingingGrid)
        assert heard.push_messages(["question"]) == ["id"]
        assert gateway.wait(0)
        (own,) = (path for path in bells_folder(folder).iterdir() if path.name.startswith("run-"))

        def rung():
            grid.answers = [["reply"]]
            threading.Timer(0.05, ring, (own,)).start()
            assert list(heard.pull_messages(["id"])) == ["reply"]

        assert took_at_best(rung, 0.9) < 0.9, "it did not wait until it looks anyway"
        pulls, grid.answers = grid.pulls, [["early"]]
        ring(own)  # for what came before anybody looked
        assert list(heard.pull_messages(["id"])) == ["early"]
        grid.answers = [["unrung"]]
        assert list(heard.pull_messages(["id"])) == ["unrung"], "after a second it looks all the same"
        assert grid.pulls == pulls + 2
        assert list(heard.pull_messages([])) == []
    assert not own.exists()


def test_without_a_network_part_the_grid_is_itself(folder):
    grid = PlayedGrid()
    with with_bells(grid, folder) as heard:
        assert heard is grid


def test_a_supernode_never_sleeps_longer_than_it_would_and_not_at_all_when_held():
    now, slept = [0.0], []
    pace = Pace(0.25, sleep=slept.append, monotonic=lambda: now[0])
    pace.sleep(3)
    pace.asked(0.01, got=True)
    pace.sleep(3)
    pace.sleep(0.5)
    now[0] = 60.0
    pace.sleep(3)
    pace.asked(HELD_S, got=False)
    pace.sleep(3)
    assert slept[:2] == [1.0, 0.25]
    assert slept[2] == slept[4] < 0.1
    assert slept[3] == 1.0


def test_the_relay_is_rung_for_each_message_that_was_taken_in():
    rung, found = [], iter([None, 7, None])
    module = types.SimpleNamespace(time=time, _pull_and_store_message=lambda **_: next(found))
    quicken(module, Pace(0.25), lambda: rung.append(1))
    assert [module._pull_and_store_message() for _ in range(3)] == [None, 7, None]
    assert rung == [1]


def test_flowers_supernode_still_has_what_is_changed():
    import flwr.supercore.superexec.run_superexec as superexec
    import flwr.supernode.start_client_internal as internal

    assert internal.time is time
    assert callable(internal._pull_and_store_message)
    assert superexec.time is time
    assert callable(superexec.get_executor)
