"""Quotas: exact over threads, processes and machines whose clocks differ, on both databases."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from sqlalchemy import text

from audit.location import DATABASE
from server import quotas as counting
from server.errors import LedgerUnavailableError
from server.quotas import CLOCKS_S, Limit, Quotas, Taken
from tests.postgresql import running_server

PREDICT = "/v1/models/toy/predict"
START = datetime(2026, 11, 29, 12, 0, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def server():
    with running_server() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request, tmp_path, monkeypatch):
    if request.param == "postgresql":
        monkeypatch.setenv(DATABASE, request.getfixturevalue("server").new_schema())
    return tmp_path


@pytest.fixture(autouse=True)
def _patient(request, monkeypatch):
    """A machine that stands still keeps no count locked: only the test that locks one gives up on it."""
    if "locked" not in request.node.name:
        monkeypatch.setattr(counting, "_SETTINGS", text(counting._SETTINGS.text.replace("'500'", "'60000'")))


class Now:
    def __init__(self) -> None:
        self.moment = START

    def __call__(self) -> datetime:
        return self.moment


@pytest.fixture
def quotas(home):
    made = []

    def make(*limits: Limit, clock: Now | None = None) -> Quotas:
        made.append(Quotas(home, clock or Now(), limits))
        return made[-1]

    yield make
    for found in made:
        found.close()


def test_what_fits_is_taken_and_what_does_not_is_refused_whole(quotas):
    found = quotas(Limit(60, 10))
    assert [found.take("p", rows).allowed for rows in (4, 4, 4, 2, 1)] == [True, True, False, True, False]
    assert found.take("q", 10).allowed, "another principal has a window of its own"
    assert not found.take("r", 11).allowed, "more than any window holds"


def test_refusal_says_how_long_and_only_the_first_is_first(quotas):
    clock = Now()
    clock.moment += timedelta(seconds=20)
    one, two = quotas(Limit(60, 1), clock=clock), quotas(Limit(60, 1), clock=clock)
    assert one.take("p", 1).allowed
    assert [(r.retry_after_s, r.is_first) for r in (two.take("p", 1), one.take("p", 1))] == [
        (40, True),
        (40, False),
    ]
    clock.moment += timedelta(seconds=40)
    assert two.take("p", 1).allowed


def test_minute_that_has_room_gives_back_when_the_day_has_none(quotas):
    clock = Now()
    found = quotas(Limit(60, 5), Limit(86_400, 7), clock=clock)
    assert found.take("p", 5).allowed
    clock.moment += timedelta(seconds=60)
    assert not found.take("p", 3).allowed
    assert found.take("p", 2).allowed, "the three were not counted in the minute"
    assert found.take("p", 1).retry_after_s > 3_600


def test_threads_of_two_workers_take_exactly_the_limit(quotas):
    workers, taken = [quotas(Limit(60, 200)), quotas(Limit(60, 200))], []

    def ask(worker: Quotas) -> None:
        taken.extend(worker.take("p", 1).allowed for _ in range(60))

    threads = [threading.Thread(target=ask, args=(workers[n % 2],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 480
    assert sum(taken) == 200


def test_processes_take_exactly_the_limit(home, quotas):
    script = textwrap.dedent("""
        import sys, datetime, pathlib, sqlalchemy
        import server.quotas as counting
        from server.quotas import Limit, Quotas
        counting._SETTINGS = sqlalchemy.text(counting._SETTINGS.text.replace("'500'", "'60000'"))
        now = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)
        found = Quotas(pathlib.Path(sys.argv[1]), lambda: now, (Limit(60, 150),))
        sys.stdin.readline()
        print(sum(found.take("p", 1).allowed for _ in range(100)))
    """)
    command = [sys.executable, "-c", script, str(home)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert sum(int(worker.communicate(timeout=60)[0]) for worker in workers) == 150
    assert not quotas(Limit(60, 150)).take("p", 1).allowed


@pytest.mark.parametrize("ahead_s", [50, 100])
def test_machine_whose_clock_is_ahead_gives_nobody_a_second_window(quotas, ahead_s):
    ours, theirs = Now(), Now()
    theirs.moment += timedelta(seconds=ahead_s)
    here, there = quotas(Limit(60, 10), clock=ours), quotas(Limit(60, 10), clock=theirs)
    assert there.take("p", 6).allowed
    assert not here.take("p", 6).allowed
    assert here.take("p", 4).allowed


@pytest.mark.parametrize("skew_s", [0, 1, 30, 59, 60, 90, -90, 121, -121, 3_600, -3_600, 86_400, -86_400])
def test_machines_whose_clocks_differ_give_one_quota_a_window(quotas, skew_s):
    """Over window after window, whoever asks first in it, and for the day's limit as for the minute's."""
    ours, theirs = Now(), Now()
    theirs.moment += timedelta(seconds=skew_s)
    limits = Limit(60, 5), Limit(86_400, 23)
    here, there = quotas(*limits, clock=ours), quotas(*limits, clock=theirs)
    ahead, behind = (there, here) if skew_s > 0 else (here, there)
    for number, (allowed, firsts) in enumerate([(5, 1), (5, 1), (5, 1), (5, 1), (3, 1), (0, 0)]):
        order = (behind, ahead) if number % 2 else (ahead, behind)
        taken = [order[ask % 2].take("p", 1) for ask in range(40)]
        assert sum(found.allowed for found in taken) == allowed
        assert sum(found.is_first for found in taken) == firsts, "one entry a window, whichever refused"
        assert all(found.retry_after_s > 0 for found in taken if not found.allowed)
        for clock in (ours, theirs):
            clock.moment += timedelta(seconds=60)


@pytest.mark.parametrize("skew_s", [90, 121, 3_600])
def test_machine_further_ahead_that_joins_begins_one_window_early_and_no_more(quotas, skew_s):
    ours, theirs = Now(), Now()
    theirs.moment += timedelta(seconds=skew_s)
    here, there = quotas(Limit(60, 5), clock=ours), quotas(Limit(60, 5), clock=theirs)
    assert here.take("p", 5).allowed
    assert sum((there, here)[ask % 2].take("p", 1).allowed for ask in range(100)) == 5


@pytest.mark.parametrize("skew_s", [121, 3_600])
def test_who_is_behind_alone_waits_for_as_long_as_it_is_told(quotas, skew_s):
    """The machine that was ahead is gone, and its window is used up."""
    ours, theirs = Now(), Now()
    theirs.moment += timedelta(seconds=skew_s)
    assert quotas(Limit(60, 5), clock=theirs).take("p", 5).allowed
    here = quotas(Limit(60, 5), clock=ours)
    refused = here.take("p", 1)
    assert not refused.allowed
    assert skew_s < refused.retry_after_s <= skew_s + 60
    ours.moment += timedelta(seconds=refused.retry_after_s - 1)
    assert not here.take("p", 1).allowed
    ours.moment += timedelta(seconds=1)
    assert here.take("p", 5).allowed


def test_clock_that_is_set_back_begins_no_window_anew(quotas):
    clock = Now()
    found = quotas(Limit(60, 5), clock=clock)
    assert found.take("p", 5).allowed
    for back_s in (60, 121, 3_600):
        clock.moment = START - timedelta(seconds=back_s)
        assert not found.take("p", 1).allowed
    clock.moment = START + timedelta(seconds=60)
    assert found.take("p", 5).allowed


@pytest.mark.parametrize("span_s", [60, 86_400])
def test_window_begins_anew_only_behind_a_clock_that_cannot_be_right(quotas, span_s):
    far = Now()
    far.moment += timedelta(seconds=CLOCKS_S + span_s)
    assert quotas(Limit(span_s, 1), clock=far).take("p", 1).allowed
    assert not quotas(Limit(span_s, 1)).take("p", 1).allowed, "a day and a window ahead still counts"
    far.moment += timedelta(seconds=span_s)
    assert quotas(Limit(span_s, 1), clock=far).take("p", 1).allowed
    assert quotas(Limit(span_s, 1)).take("p", 1).allowed


def test_window_far_in_the_future_stops_nobody_for_ever(quotas):
    far, now = Now(), Now()
    far.moment += timedelta(days=400)
    assert quotas(Limit(60, 1), clock=far).take("p", 1).allowed
    assert quotas(Limit(60, 1), clock=now).take("p", 1).allowed


def test_counts_that_cannot_be_read_answer_nobody(tmp_path):
    found = Quotas(tmp_path, Now(), (Limit(60, 1),))
    found.close()
    (tmp_path / "quota.db").write_bytes(b"no database at all, whatever the name says" * 100)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"quota.db{suffix}").unlink(missing_ok=True)
    with pytest.raises(LedgerUnavailableError):
        found.take("p", 1)


def test_no_limit_costs_no_database(tmp_path):
    found = Quotas(tmp_path, Now(), ())
    assert found.take("p", 10**9).allowed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_counted_together_is_as_counted_one_after_the_other(quotas, tmp_path_factory, monkeypatch, seed):
    """Whoever cannot have all of it has what there is, in the order in which it was asked for."""
    dice, clock = random.Random(seed), Now()
    limits = (Limit(60, 20), Limit(86_400, 45))
    together = quotas(*limits, clock=clock)
    monkeypatch.delenv(DATABASE, raising=False)
    apart = Quotas(tmp_path_factory.mktemp("apart"), clock, limits)
    for _ in range(12):
        asks = [(dice.choice("pqr"), dice.choice([1, 1, 1, 2, 5, 30])) for _ in range(dice.randrange(1, 14))]
        told: dict[str, list[Taken]] = {}
        for principal, taken in zip([p for p, _ in asks], together.take_all(asks), strict=True):
            told.setdefault(principal, []).append(taken)
        for principal, answers in told.items():
            assert answers == [apart.take(p, rows) for p, rows in asks if p == principal]
        clock.moment += timedelta(seconds=dice.choice([0, 7, 60]))
    apart.close()


def test_coroutines_take_exactly_the_limit_in_few_transactions(quotas, monkeypatch):
    workers, batches = [quotas(Limit(60, 150)), quotas(Limit(60, 150))], []
    for worker in workers:
        monkeypatch.setattr(worker, "_counted", partial(_noted, worker._counted, batches))

    async def ask() -> list[Taken]:
        return await asyncio.gather(*(workers[n % 2].taken("p", 1) for n in range(400)))

    taken = asyncio.run(ask())
    assert sum(found.allowed for found in taken) == 150
    assert sum(found.is_first for found in taken) == 1
    assert sum(batches) == 400
    assert len(batches) < 40


def _noted(counted, batches, asks):
    batches.append(len(asks))
    return counted(asks)


def test_workers_whose_crowds_come_in_other_orders_wait_for_each_other_and_not_for_ever(quotas):
    """On a server each principal's row is locked until the crowd's transaction ends."""
    names = [f"principal-{n}" for n in range(12)]
    workers, errors = [quotas(Limit(60, 10**6)), quotas(Limit(60, 10**6))], []

    def ask(worker: Quotas, order: list[str]) -> None:
        try:
            for _ in range(60):
                assert all(taken.allowed for taken in worker.take_all([(name, 1) for name in order]))
        except LedgerUnavailableError as error:
            errors.append(error)

    threads = [
        threading.Thread(target=ask, args=pair) for pair in zip(workers, (names, names[::-1]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert workers[0].take("principal-3", 10**6 - 120).allowed
    assert not workers[1].take("principal-3", 1).allowed


def test_count_that_somebody_keeps_locked_stops_its_own_principal_alone(server, tmp_path, monkeypatch):
    """As a worker that stands still in its transaction would, for as long as the server bears it."""
    psycopg = pytest.importorskip("psycopg")
    url = server.new_schema()
    monkeypatch.setenv(DATABASE, url)
    found = Quotas(tmp_path, Now(), (Limit(60, 100),))
    assert found.take("b", 1).allowed

    async def ask() -> list[object]:
        asked = (found.taken(name, 1) for name in "abcabd")
        return await asyncio.gather(*asked, return_exceptions=True)

    with psycopg.connect(url) as holder:
        holder.execute("UPDATE quota_use SET used = used WHERE principal = 'b'")
        told = asyncio.run(ask())
        assert [type(answer) for answer in told] == [
            Taken, LedgerUnavailableError, Taken, Taken, LedgerUnavailableError, Taken,
        ]  # fmt: skip
        holder.rollback()
    assert found.take("b", 99).allowed, "nothing was counted that was not answered"
    assert not found.take("a", 99).allowed
    assert found.take("a", 98).allowed
    found.close()


def test_time_is_looked_at_once_nobody_else_counts(tmp_path):
    """Who waits for the lock over a window's end would begin a window that is over, and end the others'."""
    looked = []

    def clock() -> datetime:
        looked.append(START)
        return START

    found = Quotas(tmp_path, clock, (Limit(60, 10),))
    with closing(sqlite3.connect(tmp_path / "quota.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        thread = threading.Thread(target=found.take, args=("p", 1))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert looked == []
        holder.execute("ROLLBACK")
        thread.join(60)
    assert looked == [START]
    found.close()


def test_forked_child_counts_too(tmp_path):
    script = textwrap.dedent("""
        import asyncio, datetime, os, pathlib, sys
        from server.quotas import Limit, Quotas
        now = datetime.datetime(2026, 11, 29, 12, tzinfo=datetime.UTC)
        made = lambda: Quotas(pathlib.Path(sys.argv[1]), lambda: now, (Limit(60, 10),))
        found = made()
        assert asyncio.run(found.taken("p", 1)).allowed
        child = os.fork()
        if child == 0:
            found._engine = made()._engine  # a child opens its database anew
            assert asyncio.run(asyncio.wait_for(found.taken("p", 9), 30)).allowed
            sys.exit()
        assert os.waitpid(child, 0)[1] == 0
        assert not asyncio.run(found.taken("p", 1)).allowed
    """)
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)


def test_counts_that_cannot_be_read_answer_nobody_of_a_crowd(tmp_path, caplog):
    found = Quotas(tmp_path, Now(), (Limit(60, 100),))

    async def ask() -> list[object]:
        return await asyncio.gather(*(found.taken("p", 1) for _ in range(6)), return_exceptions=True)

    assert [taken.allowed for taken in asyncio.run(ask())] == [True] * 6
    found._engine.dispose()
    (tmp_path / "quota.db").write_bytes(b"no database at all, whatever the name says" * 100)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"quota.db{suffix}").unlink(missing_ok=True)
    assert {type(error) for error in asyncio.run(ask())} == {LedgerUnavailableError}
    assert "audit.ledger_corrupt" in caplog.text, "the operator is told why"
    found.close()


def test_who_gives_up_waiting_takes_nothing_from_the_others(quotas):
    found = quotas(Limit(60, 100))

    async def ask() -> list[object]:
        asked = [asyncio.ensure_future(found.taken("p", 1)) for _ in range(8)]
        await asyncio.sleep(0)
        for task in asked[::2]:
            task.cancel()
        return await asyncio.gather(*asked, return_exceptions=True)

    told = asyncio.run(ask())
    assert [taken.allowed for taken in told[1::2]] == [True] * 4
    assert all(isinstance(error, asyncio.CancelledError) for error in told[::2])
