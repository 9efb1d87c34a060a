from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import _store, merkle
from audit._sequencer import Sequencer
from audit.checkpoints import Checkpoint, cosign, sign_checkpoint
from audit.entries import MAX_ENTRY_BYTES
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
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner, parse_note


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
    assert sorted(os.listdir(tmp_path)) == ["log.db", "log.db-turn.lock"]


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
    assert sorted(os.listdir(tmp_path)) == ["log.db", "log.db-turn.lock"]


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


def test_requests_queued_together_share_batches_or_are_refused_together() -> None:
    batches: list[list[int]] = []

    def commit(batch: list[int]) -> list[int | AuditError]:
        batches.append(batch)
        return list(batch)

    sequencer: Sequencer[int, int] = Sequencer(commit, max_batch=4, max_pending=6)
    assert [future.result(10) for future in sequencer.submit_all(range(6))] == list(range(6))
    assert batches == [[0, 1, 2, 3], [4, 5]]
    assert sequencer.submit_all([]) == []
    with pytest.raises(LedgerBusyError):
        sequencer.submit_all(range(7))
    assert sequencer.submit(7).result(10) == 7
    sequencer.close()
    assert batches == [[0, 1, 2, 3], [4, 5], [7]], "nothing of those that were too many"
    with pytest.raises(LedgerClosedError):
        sequencer.submit_all([1])


def test_entries_queued_together_are_refused_together(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    made = [log_tools.make_entry(n) for n in range(3)]
    entries = [(m.body, m.event_id, m.columns) for m in made]
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        with pytest.raises(EntrySizeError):
            ledger.append_all([*entries[:2], (b"", *entries[2][1:])])
        assert ledger.tree_size == 0
        assert [future.result(10).leaf_index for future in ledger.append_all(entries)] == [0, 1, 2]
        ids = [m.event_id for m in made]
        assert ledger.logged_events([*ids, "other"]) == set(ids)
        assert ledger.logged_events([]) == set()
        kind = made[0].columns.type
        assert [ledger.has_since(kind, after) for after in (-1, 1, 2)] == [True, True, False]
        assert not ledger.has_since("no.such_type", -1)


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
