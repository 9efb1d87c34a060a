"""Several processes, killed processes and torn files: nothing acknowledged is ever lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from audit import _store, merkle
from audit.errors import LedgerBusyError, LedgerUnreachableError
from audit.fsck import fsck
from audit.ledger import MAX_BATCH, MAX_PENDING, Ledger
from tests.soak_report import Report
from tests.waiting import wait_until

WRITER = """
import sys, json, time
from audit.entries import IndexColumns
from audit.ledger import Ledger
path, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def entry(n):
    body = json.dumps({"actor": "tester", "event_id": f"{who}-{n}", "time": "t", "type": "test.event"},
                      separators=(",", ":")).encode()
    return body, IndexColumns(type="test.event", actor="tester", time="t")
with Ledger.open(path) as ledger:
    print("ready", flush=True)
    n = 0
    while n < count:
        futures = []
        for _ in range(1 + n % 7):
            body, columns = entry(n)
            futures.append((n, ledger.append(body, event_id=f"{who}-{n}", index_columns=columns)))
            n += 1
        for number, future in futures:
            print(number, future.result().leaf_index, flush=True)
"""

KILLER = """
import os, random, signal
for attempt in range(count):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        ledger = Ledger.open(path)
        for n in range(10**9):
            name = f"w{attempt}-{n}"
            body = entry(n)[0].replace(f"{who}-{n}".encode(), name.encode())
            future = ledger.append(body, event_id=name, index_columns=entry(n)[1])
            if n % 5 == 0:  # so that some entries are always on their way
                os.write(write_end, f"{name} {future.result().leaf_index}\\n".encode())
    os.close(write_end)
    acks = open(read_end)
    for _ in range(random.randrange(1, 20)):
        print(acks.readline(), end="")
    time.sleep(random.uniform(0, 0.003))
    os.kill(pid, signal.SIGKILL)
    print(acks.read(), end="")
    acks.close()
    os.waitpid(pid, 0)
"""


def start_writer(place: Path | str, who: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(place), who, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_forked_child_appends_through_its_own_thread(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    """In a process of its own: forking a test runner that has threads would warn."""
    script = (
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        + WRITER.split("with Ledger.open")[0]
        + """
ledger = Ledger.open(path)
def add(name):
    return ledger.append(entry(0)[0], event_id=name, index_columns=entry(0)[1]).result(20).leaf_index
add("before")
pid = os.fork()
found = [add(f"{os.getpid()}-{n}") for n in range(20)]
if pid == 0:
    os._exit(0 if ledger.tree_size >= 21 else 1)
assert os.waitpid(pid, 0)[1] == 0
assert ledger.tree_size == 41, ledger.tree_size
ledger.close()
"""
    )
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "log.db"), "x", "0"], check=True, timeout=60)


def test_two_processes_share_one_log_without_a_gap(place: Path | str, log_tools: SimpleNamespace) -> None:
    share_one_log(place, log_tools, count=250)  # ten thousand in the soak


@pytest.mark.soak
def test_two_processes_append_ten_thousand_entries_each(
    place: Path | str, log_tools: SimpleNamespace, report: Report
) -> None:
    entries = share_one_log(place, log_tools, count=10_000)
    report(
        "share",
        size=f"2 x 10,000 appends, {database(place)}",
        result=f"{entries:,} entries: no gap, no duplicate, one chain",
    )


def database(place: Path | str) -> str:
    return "SQLite" if isinstance(place, Path) else "PostgreSQL"


def share_one_log(place: Path | str, log_tools: SimpleNamespace, count: int) -> int:
    Ledger.create(place, log_tools.ORIGIN).close()
    writers = [start_writer(place, who, count) for who in ("a", "b")]
    acked = [
        line.split()
        for writer in writers
        for line in writer.communicate(timeout=60 + count // 20)[0].splitlines()[1:]
    ]
    assert [writer.returncode for writer in writers] == [0, 0]
    indices = sorted(int(index) for _, index in acked)
    assert indices == list(range(len(indices)))
    assert len(indices) >= 2 * count
    report = fsck(place, columns_of=log_tools.columns_of)
    assert report.ok, report
    assert report.entries == len(indices)
    return report.entries


def test_killed_writer_loses_nothing_that_was_acknowledged(
    place: Path | str, log_tools: SimpleNamespace
) -> None:
    kill_writers(place, log_tools, times=10)  # five hundred in the soak


@pytest.mark.soak
def test_five_hundred_killed_writers_lose_nothing(
    place: Path | str, log_tools: SimpleNamespace, report: Report
) -> None:
    acked, tail = kill_writers(place, log_tools, times=500)
    report(
        "kill",
        size=f"500 kills, {database(place)}",
        result=f"{acked:,} acknowledged, 0 lost; {tail:,} more were durable and 0 doubled when asked again",
    )


def kill_writers(place: Path | str, log_tools: SimpleNamespace, times: int) -> tuple[int, int]:
    """Fork writers from one process, to save its imports, and kill each while it appends."""
    Ledger.create(place, log_tools.ORIGIN).close()
    script = WRITER.split("with Ledger.open")[0] + KILLER
    command = [sys.executable, "-c", script, str(place), "x", str(times)]
    done = subprocess.run(command, check=True, timeout=60 + 2 * times, stdout=subprocess.PIPE, text=True)
    acked = {name: int(index) for name, index in (line.split() for line in done.stdout.splitlines())}
    assert len(acked) >= times
    stored = nothing_is_lost(place, log_tools, acked)
    unheard = stored.keys() - acked.keys()
    with Ledger.open(place) as ledger:  # whoever heard nothing asks again, and gets the place that it has
        for start in range(0, len(stored), 900):
            kept = [found for found in ledger.search(after=start - 1, limit=900) if found.event_id in unheard]
            again = [ledger.append(k.body, event_id=k.event_id, index_columns=k.columns) for k in kept]
            assert [future.result(60).leaf_index for future in again] == [k.leaf_index for k in kept]
        assert ledger.tree_size == len(stored)
    return len(acked), len(unheard)


def nothing_is_lost(place: Path | str, log_tools: SimpleNamespace, acked: dict[str, int]) -> dict[str, int]:
    report = fsck(place, columns_of=log_tools.columns_of)
    assert report.ok, report
    with Ledger.open(place) as ledger:
        stored = {s.event_id: s.leaf_index for n in range(0, ledger.tree_size, 900) for s in page(ledger, n)}
        assert len(stored) == ledger.tree_size
        assert {name: stored.get(name) for name in acked} == acked
    return stored


def append_while(
    server: Any, log_tools: SimpleNamespace, disturb: Callable[[], None], *, times: int, pause_s: float
) -> int:
    """Append without rest while `disturb` happens some times; return how many appends were refused.

    Whoever is refused asks again with the same event id, as callers must.
    """
    url = server.new_database()
    Ledger.create(url, log_tools.ORIGIN).close()
    acked: dict[str, int] = {}
    refused, done = 0, threading.Event()

    def write(ledger: Ledger, first: int) -> None:
        nonlocal refused
        with ledger:
            numbers = itertools.count(first, 2)
            while not done.is_set():
                batch = [log_tools.make_entry(next(numbers)) for _ in range(3)]
                while batch:
                    futures = [
                        ledger.append(m.body, event_id=m.event_id, index_columns=m.columns) for m in batch
                    ]
                    for made, future in zip(list(batch), futures, strict=True):
                        try:
                            acked[made.event_id] = future.result(60).leaf_index
                            batch.remove(made)
                        except (LedgerUnreachableError, LedgerBusyError):
                            refused += 1

    writers = [threading.Thread(target=write, args=(Ledger.open(url), first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    try:
        for number in range(times):
            time.sleep(pause_s * (1 + number % 3))
            deadline = time.monotonic() + 30
            while len(acked) <= number and time.monotonic() < deadline:  # a slow machine gets on, too
                time.sleep(0.01)
            disturb()
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert len(set(acked.values())) == len(acked) >= times
    nothing_is_lost(url, log_tools, acked)
    return refused


KILL_BACKENDS = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = 'affidavit' AND pid <> pg_backend_pid()"
)


def test_ended_server_sessions_lose_nothing(postgresql_server: Any, log_tools: SimpleNamespace) -> None:
    append_while(
        postgresql_server,
        log_tools,
        lambda: postgresql_server.execute(KILL_BACKENDS),
        times=20,
        pause_s=0.02,
    )


def crash(server: Any) -> None:
    """Kill one session's process the hard way: the server ends every other, and recovers before we return."""
    psycopg = pytest.importorskip("psycopg")
    asked = "SELECT pid FROM pg_stat_activity WHERE application_name = 'affidavit' LIMIT 1"
    with psycopg.connect(server.url("postgres"), autocommit=True) as witness:
        wait_until(lambda: killed(row[0]) if (row := witness.execute(asked).fetchone()) else False)
        with contextlib.suppress(psycopg.OperationalError):
            wait_until(lambda: witness.execute("SELECT 1") is None, "the server ends no other session")

    def is_back() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            return bool(server.execute("SELECT 1"))
        return False

    wait_until(is_back, "the server does not come back")


def killed(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def restart(server: Any) -> None:
    server.stop("immediate")
    server.start()


@pytest.mark.parametrize("disturb", [crash, restart])
def test_crashed_server_loses_nothing(
    postgresql_server: Any, log_tools: SimpleNamespace, disturb: Callable[[Any], None]
) -> None:
    append_while(postgresql_server, log_tools, lambda: disturb(postgresql_server), times=3, pause_s=0.1)


@pytest.mark.soak
@pytest.mark.parametrize("disturb", [crash, restart])
def test_server_crashed_a_hundred_times_loses_nothing(
    postgresql_server: Any, log_tools: SimpleNamespace, disturb: Callable[[Any], None], report: Report
) -> None:
    refused = append_while(
        postgresql_server, log_tools, lambda: disturb(postgresql_server), times=100, pause_s=0.1
    )
    what = "a session's process killed" if disturb is crash else "stopped at once and started"
    report(
        "crash", size=f"100 times, {what}", result=f"0 acknowledged entries lost; {refused} appends refused"
    )


def test_server_that_stays_away_is_reported_and_the_retry_succeeds(
    postgresql_server: Any, log_tools: SimpleNamespace
) -> None:
    url = postgresql_server.new_schema()
    made = log_tools.make_entry(1)
    with Ledger.create(url, log_tools.ORIGIN) as ledger:
        postgresql_server.stop("immediate")
        try:
            future = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
            with pytest.raises(LedgerUnreachableError, match="same event id"):
                future.result(30)
            with pytest.raises(LedgerUnreachableError):
                ledger.edge()
        finally:
            postgresql_server.start()
        assert (
            ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns).leaf_index == 0
        )
        assert ledger.tree_size == 1


def test_writer_that_is_frozen_with_the_lock_is_told_and_others_go_on(
    postgresql_server: Any, log_tools: SimpleNamespace
) -> None:
    """A session that keeps the lock makes others wait, and then busy; nothing of theirs is half written."""
    url = postgresql_server.new_schema()
    with Ledger.create(url, log_tools.ORIGIN) as ledger, Ledger.open(url) as other:
        with _store.writing(ledger._engine), _store.reading(other._engine) as connection:
            assert connection.exec_driver_sql("SELECT size FROM head").scalar() == 0, "readers never wait"
        with _store.writing(ledger._engine), pytest.raises(LedgerBusyError) as caught:
            take_lock_impatiently(other)
        assert caught.value.retry_after_s > 0
        assert log_tools.fill(other, range(1))[0].leaf_index == 0


def take_lock_impatiently(ledger: Ledger) -> None:
    with _store.translated(), ledger._engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = 50")
        connection.exec_driver_sql("SELECT id FROM head FOR UPDATE")


def test_full_queue_is_told_and_nothing_of_it_is_lost_or_doubled(
    place: Path | str, log_tools: SimpleNamespace
) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        made = [log_tools.make_entry(n) for n in range(MAX_PENDING + 2 * MAX_BATCH)]
        futures = []

        def submit_all() -> None:
            for m in made:
                futures.append(ledger.append(m.body, event_id=m.event_id, index_columns=m.columns))

        with Ledger.open(place) as other, _store.writing(other._engine):  # the sequencer cannot go on
            with pytest.raises(LedgerBusyError) as caught:
                submit_all()
            assert MAX_PENDING <= len(futures) <= MAX_PENDING + MAX_BATCH
            assert (caught.value.pending, caught.value.retry_after_s > 0) == (MAX_PENDING, True)
        assert [future.result(60).leaf_index for future in futures] == list(range(len(futures)))
        again = [ledger.append(m.body, event_id=m.event_id, index_columns=m.columns) for m in made[:20]]
        assert [future.result(60).leaf_index for future in again] == list(range(20))


def page(ledger: Ledger, start: int) -> list[SimpleNamespace]:
    found = ledger.search(after=start - 1, limit=900)
    return [SimpleNamespace(event_id=s.event_id, leaf_index=s.leaf_index) for s in found]


def test_torn_write_ahead_log_yields_a_consistent_prefix(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    tear(tmp_path, log_tools, times=40)


@pytest.mark.soak
def test_write_ahead_log_torn_a_thousand_times_yields_a_consistent_prefix(
    tmp_path: Path, log_tools: SimpleNamespace, report: Report
) -> None:
    sizes = tear(tmp_path, log_tools, times=1000)
    report("torn", size="1,000 places", result=f"a whole batch's end each time, {sizes} different ones")


def tear(tmp_path: Path, log_tools: SimpleNamespace, times: int) -> int:
    """Power lost in the middle of a write: the file ends anywhere; what opens is some batch's exact end."""
    chooser = random.Random(9)
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        sizes = {0, *(s.tree_size for n in range(0, 30, 3) for s in log_tools.fill(ledger, range(n, n + 3)))}
        hashes = ledger.leaf_hashes(0, 30)
        data, wal = (tmp_path / "log.db").read_bytes(), (tmp_path / "log.db-wal").read_bytes()
    seen = set()
    for number in range(times):
        path = tmp_path / f"torn-{number}.db"
        path.write_bytes(data)
        kept = chooser.randrange(len(wal))
        torn = wal[:kept] + (bytes(len(wal) - kept) if number % 2 else b"")
        path.with_name(f"{path.name}-wal").write_bytes(torn)
        with Ledger.open(path) as ledger:
            size = ledger.tree_size
            assert ledger.root_hash == ledger.root_at(size) == merkle.root_of(hashes[:size])
        report = fsck(path, columns_of=log_tools.columns_of)
        assert (report.ok, report.entries) == (True, size)
        seen.add(size)
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    assert len(seen) > 3
    assert seen <= sizes
    return len(seen)
