from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import _store, merkle
from audit._sequencer import Sequencer
from audit.checkpoints import Checkpoint, cosign, sign_checkpoint
from audit.errors import (
    AuditError,
    EntryNotFoundError,
    EntrySizeError,
    EventIdConflictError,
    EventIdError,
    LedgerBusyError,
    LedgerClosedError,
    LedgerCorruptError,
    LedgerExistsError,
    LedgerMissingError,
    LedgerWriteError,
    MalformedCheckpointError,
    MalformedNoteError,
    OriginMismatchError,
    RootMismatchError,
    TreeRangeError,
)
from audit.fsck import fsck
from audit.keys import SigningKey
from audit.ledger import MAX_ENTRY_BYTES, Ledger
from audit.notes import KeyType, NoteSigner, parse_note

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


def start_writer(path: Path, who: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), who, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_every_proof_over_tiles_verifies(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    sequenced = log_tools.fill(ledger, range(600))
    assert [s.leaf_index for s in sequenced] == list(range(600))
    hashes = ledger.leaf_hashes(0, 600)
    assert merkle.root_of(hashes) == ledger.root_hash == ledger.root_at(600)
    for size in (1, 2, 255, 256, 257, 511, 512, 513, 600):
        root = merkle.root_of(hashes[:size])
        assert ledger.root_at(size) == root
        for index in {0, size // 2, size - 1}:
            merkle.verify_inclusion(
                leaf_index=index,
                tree_size=size,
                leaf_hash=hashes[index],
                proof=ledger.inclusion_proof(index, size),
                root_hash=root,
            )
        merkle.verify_consistency(
            size1=size,
            size2=600,
            root1=root,
            root2=ledger.root_hash,
            proof=ledger.consistency_proof(size, 600),
        )
    assert ledger.consistency_proof(0, 600) == []


def test_log_survives_reopening(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(300))
        root = ledger.root_hash
    with Ledger.open(tmp_path / "log.db") as ledger:
        assert (ledger.origin, ledger.tree_size, ledger.root_hash) == (log_tools.ORIGIN, 300, root)
        assert log_tools.fill(ledger, range(300, 310))[-1].tree_size == 310
        assert ledger.entry(299) == log_tools.make_entry(299).body
    assert sorted(os.listdir(tmp_path)) == ["log.db"]


def test_same_event_id_and_bytes_keep_their_index(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    made = log_tools.make_entry(1)
    first = ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns)
    again = [ledger.append(made.body, event_id=made.event_id, index_columns=made.columns) for _ in range(20)]
    assert {future.result(10).leaf_index for future in again} == {first.leaf_index}
    assert ledger.tree_size == 1


def test_same_event_id_with_other_bytes_is_refused_and_adds_nothing(
    ledger: Ledger, log_tools: SimpleNamespace
) -> None:
    made, other = log_tools.make_entry(1), log_tools.make_entry(1, "other")
    in_one_batch = [
        ledger.append(body, event_id=made.event_id, index_columns=made.columns)
        for body in (made.body, other.body, other.body)
    ]
    assert in_one_batch[0].result(10).leaf_index == 0
    for future in in_one_batch[1:]:
        with pytest.raises(EventIdConflictError) as caught:
            future.result(10)
        assert caught.value.leaf_index == 0
    assert log_tools.fill(ledger, range(2, 4))[0].leaf_index == 1
    assert ledger.tree_size == 3


@pytest.mark.parametrize("size", [0, MAX_ENTRY_BYTES + 1])
def test_entry_of_impossible_size_is_refused(ledger: Ledger, log_tools: SimpleNamespace, size: int) -> None:
    made = log_tools.make_entry(1)
    with pytest.raises(EntrySizeError) as caught:
        ledger.append(b"x" * size, event_id="a", index_columns=made.columns)
    assert caught.value.size_bytes == size


@pytest.mark.parametrize("event_id", ["", "a b", "a\n", "\u00e9", "x" * 129, "\x00"])
def test_event_id_out_of_form_is_refused(ledger: Ledger, log_tools: SimpleNamespace, event_id: str) -> None:
    made = log_tools.make_entry(1)
    with pytest.raises(EventIdError):
        ledger.append(made.body, event_id=event_id, index_columns=made.columns)


def test_opening_never_creates(tmp_path: Path) -> None:
    with pytest.raises(LedgerMissingError) as caught:
        Ledger.open(tmp_path / "log.db")
    assert caught.value.code == "audit.ledger_missing"
    with pytest.raises(LedgerMissingError):
        Ledger.open(tmp_path)
    assert os.listdir(tmp_path) == []


def test_creating_never_overwrites(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(3))
    with pytest.raises(LedgerExistsError):
        Ledger.create(tmp_path / "log.db", log_tools.ORIGIN)
    with Ledger.open(tmp_path / "log.db") as ledger:
        assert ledger.tree_size == 3
    with pytest.raises(LedgerMissingError):
        Ledger.create(tmp_path / "no folder" / "log.db", log_tools.ORIGIN)
    with pytest.raises(MalformedCheckpointError):
        Ledger.create(tmp_path / "other.db", "two words")
    assert os.listdir(tmp_path) == ["log.db"]


def test_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_bytes(b"hello " * 1000)
    (tmp_path / "empty.db").write_bytes(b"")
    with sqlite3.connect(tmp_path / "foreign.db") as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    for name in ("text.db", "empty.db", "foreign.db"):
        with pytest.raises((LedgerMissingError, LedgerCorruptError)):
            Ledger.open(tmp_path / name)


def test_log_of_another_schema_is_refused(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    with sqlite3.connect(tmp_path / "log.db") as connection:
        connection.execute("UPDATE head SET schema_version = 99")
    connection.close()
    with pytest.raises(LedgerMissingError, match="schema 99"):
        Ledger.open(tmp_path / "log.db")


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM head",
        "UPDATE head SET size = 4",
        "UPDATE head SET edge = x'00'",
        "DELETE FROM leaf WHERE idx = 4",
    ],
)
def test_log_that_contradicts_itself_is_refused(
    tmp_path: Path, log_tools: SimpleNamespace, damage: str
) -> None:
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(5))
    with sqlite3.connect(tmp_path / "log.db") as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(LedgerCorruptError):
        Ledger.open(tmp_path / "log.db")


def test_reads_outside_the_log_are_refused(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    log_tools.fill(ledger, range(5))
    with pytest.raises(EntryNotFoundError) as caught:
        ledger.entry(5)
    assert (caught.value.leaf_index, caught.value.tree_size) == (5, 5)
    with pytest.raises(EntryNotFoundError):
        ledger.entry(-1)
    for call in (
        lambda: ledger.root_at(6),
        lambda: ledger.root_at(-1),
        lambda: ledger.inclusion_proof(5, 5),
        lambda: ledger.inclusion_proof(0, 6),
        lambda: ledger.inclusion_proof(-1, 5),
        lambda: ledger.consistency_proof(3, 6),
        lambda: ledger.consistency_proof(4, 3),
    ):
        with pytest.raises(TreeRangeError):
            call()
    assert ledger.entries(3, 99) == [log_tools.make_entry(n).body for n in (3, 4)]


def test_search_by_every_column_and_page(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    log_tools.fill(ledger, range(10), run="run-1", round=1)
    log_tools.fill(ledger, range(10, 20), run="run-2", round=2)
    log_tools.fill(ledger, range(20, 22), time="2026-12-01T00:00:00Z", type="other.event", actor="boss")

    def indices(**query: object) -> list[int]:
        return [found.leaf_index for found in ledger.search(**query)]  # type: ignore[arg-type]

    assert indices(run="run-2") == list(range(10, 20))
    assert indices(run="run-1", round=2) == []
    assert indices(type="other.event") == indices(actor="boss") == [20, 21]
    assert indices(type=["other.event", "test.event"], limit=3) == [0, 1, 2]
    assert indices(after=5, limit=2) == [6, 7]
    assert indices(after=5, limit=2, newest_first=True) == [4, 3]
    assert indices(since="2026-12-01T00:00:00Z") == [20, 21]
    assert indices(until="2026-12-01T00:00:00Z", after=18) == [19]
    assert indices(version="x") == indices(site="x") == indices(model="x") == indices(principal="x") == []
    assert indices(actor="' OR 1=1 --") == []
    found = ledger.search(run="run-2", limit=1)[0]
    assert (found.columns.run, found.columns.round, found.columns.site) == ("run-2", 2, None)
    for limit in (0, -1, 1001):
        with pytest.raises(TreeRangeError):
            ledger.search(limit=limit)


def test_event_is_found_by_its_id(ledger: Ledger, log_tools: SimpleNamespace) -> None:
    log_tools.fill(ledger, range(3))
    found = ledger.find_event(log_tools.make_entry(2).event_id)
    assert found is not None
    assert found.leaf_index == 2
    assert ledger.find_event("absent") is None


def test_closed_ledger_refuses_and_what_was_queued_is_durable(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    ledger = Ledger.create(tmp_path / "log.db", log_tools.ORIGIN)
    made = [log_tools.make_entry(n) for n in range(700)]
    futures = [ledger.append(m.body, event_id=m.event_id, index_columns=m.columns) for m in made]
    ledger.close()
    ledger.close()
    assert [future.result(0).leaf_index for future in futures] == list(range(700))
    with pytest.raises(LedgerClosedError):
        ledger.append(made[0].body, event_id="x", index_columns=made[0].columns)


def test_full_queue_refuses_instead_of_losing() -> None:
    release, started = threading.Event(), threading.Event()

    def commit(batch: list[int]) -> list[int | AuditError]:
        started.set()
        release.wait(10)
        return list(batch)

    sequencer: Sequencer[int, int] = Sequencer(commit, max_batch=1, max_pending=3)
    futures = [sequencer.submit(0)]
    assert started.wait(10)
    futures += [sequencer.submit(n) for n in (1, 2, 3)]
    with pytest.raises(LedgerBusyError) as caught:
        sequencer.submit(4)
    assert caught.value.retry_after_s > 0
    assert caught.value.pending == 3
    release.set()
    assert [future.result(10) for future in futures] == [0, 1, 2, 3]
    sequencer.close()


def test_sequencer_outlives_a_failing_batch_and_tells_every_caller() -> None:
    def commit(batch: list[int]) -> list[int | AuditError]:
        if 13 in batch:
            raise OSError("disk full")
        return list(batch)

    sequencer: Sequencer[int, int] = Sequencer(commit, max_batch=1, max_pending=9)
    with pytest.raises(LedgerWriteError, match="disk full"):
        sequencer.submit(13).result(10)
    assert sequencer.submit(14).result(10) == 14
    sequencer.close()


def test_cancelled_request_is_not_written() -> None:
    release, started = threading.Event(), threading.Event()
    seen: list[int] = []

    def commit(batch: list[int]) -> list[int | AuditError]:
        started.set()
        release.wait(10)
        seen.extend(batch)
        return list(batch)

    sequencer: Sequencer[int, int] = Sequencer(commit, max_batch=1, max_pending=9)
    first = sequencer.submit(1)
    assert started.wait(10)
    second = sequencer.submit(2)
    assert second.cancel()
    assert not first.cancel()
    release.set()
    sequencer.close()
    assert seen == [1]


def test_write_that_the_database_refuses_is_never_acknowledged(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(3))
        with sqlite3.connect(tmp_path / "log.db") as connection:
            connection.execute(
                "CREATE TRIGGER full BEFORE INSERT ON leaf BEGIN SELECT RAISE(ABORT, 'no space'); END"
            )
        with pytest.raises(AuditError, match="no space"):
            log_tools.fill(ledger, range(3, 5))
        assert ledger.tree_size == 3
        connection.execute("DROP TRIGGER full")
        connection.close()
        assert [s.leaf_index for s in log_tools.fill(ledger, range(3, 5))] == [3, 4]


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


def test_two_processes_share_one_log_without_a_gap(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    path = tmp_path / "log.db"
    Ledger.create(path, log_tools.ORIGIN).close()
    writers = [start_writer(path, who, 200) for who in ("a", "b")]
    acked = [
        line.split() for writer in writers for line in writer.communicate(timeout=60)[0].splitlines()[1:]
    ]
    assert [writer.returncode for writer in writers] == [0, 0]
    indices = sorted(int(index) for _, index in acked)
    assert indices == list(range(len(indices)))
    assert len(indices) >= 400
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report
    assert report.entries == len(indices)


def test_killed_writer_loses_nothing_that_was_acknowledged(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    kill_writers(tmp_path / "log.db", log_tools, times=20)


@pytest.mark.soak
def test_five_hundred_killed_writers_lose_nothing(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    kill_writers(tmp_path / "log.db", log_tools, times=500)


def kill_writers(path: Path, log_tools: SimpleNamespace, times: int) -> None:
    """Fork writers from one process, to save its imports, and kill each while it appends."""
    Ledger.create(path, log_tools.ORIGIN).close()
    script = WRITER.split("with Ledger.open")[0] + KILLER
    command = [sys.executable, "-c", script, str(path), "x", str(times)]
    done = subprocess.run(command, check=True, timeout=30 + times, stdout=subprocess.PIPE, text=True)
    acked = {name: int(index) for name, index in (line.split() for line in done.stdout.splitlines())}
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report
    with Ledger.open(path) as ledger:
        stored = {s.event_id: s.leaf_index for n in range(0, ledger.tree_size, 900) for s in page(ledger, n)}
        assert len(stored) == ledger.tree_size
        assert {name: stored.get(name) for name in acked} == acked
    assert len(acked) >= times


def page(ledger: Ledger, start: int) -> list[SimpleNamespace]:
    found = ledger.search(after=start - 1, limit=900)
    return [SimpleNamespace(event_id=s.event_id, leaf_index=s.leaf_index) for s in found]


def test_torn_write_ahead_log_yields_a_consistent_prefix(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    """Power lost in the middle of a write: the file ends anywhere; what opens is some batch's exact end."""
    chooser = random.Random(9)
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        sizes = [0, *(log_tools.fill(ledger, range(n, n + 3))[-1].tree_size for n in range(0, 30, 3))]
        hashes = ledger.leaf_hashes(0, 30)
        data, wal = (tmp_path / "log.db").read_bytes(), (tmp_path / "log.db-wal").read_bytes()
    seen = set()
    for number in range(40):
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
    assert len(seen) > 3
    assert max(seen) <= sizes[-1]


def test_every_connection_is_fully_durable(ledger: Ledger) -> None:
    for context in (_store.reading, _store.writing):
        with context(ledger._engine) as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_checkpoints_of_this_tree_are_kept_and_merged(
    ledger: Ledger, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    log_tools.fill(ledger, range(5))
    note = sign_checkpoint(Checkpoint(log_tools.ORIGIN, 5, ledger.root_hash), log_signer)
    sites = [NoteSigner(f"site-{c}", SigningKey.generate(), KeyType.COSIGNATURE) for c in "ab"]
    ledger.store_checkpoint(note)
    for site in sites:
        merged = ledger.store_checkpoint(note + cosign(note, site, 100))
    assert [line.name for line in parse_note(merged).signatures] == [log_tools.ORIGIN, "site-a", "site-b"]
    assert ledger.latest_checkpoint() == ledger.checkpoint_at(5) == merged
    log_tools.fill(ledger, range(5, 8))
    newer = sign_checkpoint(Checkpoint(log_tools.ORIGIN, 8, ledger.root_hash), log_signer)
    ledger.store_checkpoint(newer)
    assert ledger.checkpoints() == [merged, newer]
    assert ledger.latest_checkpoint() == newer
    assert ledger.latest_checkpoint(lambda n: len(parse_note(n).signatures) == 3) == merged
    assert ledger.latest_checkpoint(lambda n: False) is None
    assert ledger.checkpoint_at(6) is None


def test_checkpoint_of_another_tree_is_not_kept(
    ledger: Ledger, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    log_tools.fill(ledger, range(5))
    other = NoteSigner("other.example", SigningKey.generate())
    root = ledger.root_hash
    with pytest.raises(OriginMismatchError):
        ledger.store_checkpoint(sign_checkpoint(Checkpoint("other.example", 5, root), other))
    with pytest.raises(RootMismatchError):
        ledger.store_checkpoint(sign_checkpoint(Checkpoint(log_tools.ORIGIN, 4, root), log_signer))
    with pytest.raises(TreeRangeError):
        ledger.store_checkpoint(sign_checkpoint(Checkpoint(log_tools.ORIGIN, 6, root), log_signer))
    with pytest.raises(MalformedNoteError):
        ledger.store_checkpoint(b"hello")
    assert ledger.checkpoints() == []
