"""The write-ahead log is copied back beside the writer: it stays short, and no fault there loses an entry."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import _store
from audit._wal_backfill import WalBackfill
from audit.errors import LedgerBusyError
from audit.fsck import fsck
from audit.ledger import Ledger

PAGE = 4096


def wal_pages(path: Path) -> int:
    return path.with_name(f"{path.name}-wal").stat().st_size // PAGE


def append_each(ledger: Ledger, log_tools: SimpleNamespace, numbers: range) -> None:
    for number in numbers:
        made = log_tools.make_entry(number)
        ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns)


@pytest.fixture
def path(tmp_path: Path, log_tools: SimpleNamespace) -> Path:
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    return tmp_path / "log.db"


def test_log_of_many_commits_stays_short(path: Path, log_tools: SimpleNamespace) -> None:
    with Ledger.open(path) as ledger:
        ledger._backfill._commits = 10
        append_each(ledger, log_tools, range(400))
        pages = wal_pages(path)
        assert ledger.tree_size == 400
    assert pages < 2000  # of the 400 commits' four to five thousand; SQLite's own limit is 4000
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report


def test_reader_that_stays_keeps_the_log_long_and_harms_nobody(
    path: Path, log_tools: SimpleNamespace
) -> None:
    with Ledger.open(path) as ledger:
        ledger._backfill._commits = 5
        append_each(ledger, log_tools, range(3))
        with _store.reading(ledger._engine) as connection:
            before = connection.exec_driver_sql("SELECT size FROM head").scalar()
            append_each(ledger, log_tools, range(3, 60))
            assert connection.exec_driver_sql("SELECT size FROM head").scalar() == before == 3
        append_each(ledger, log_tools, range(60, 80))
        assert ledger.tree_size == 80
    assert fsck(path, columns_of=log_tools.columns_of).ok


@pytest.mark.parametrize(
    "fault", [LedgerBusyError(retry_after_s=1, pending=0), sqlite3.OperationalError("disk")]
)
def test_copy_that_fails_fails_no_commit(
    path: Path, log_tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with Ledger.open(path) as ledger:
        ledger._backfill._commits = 2

        class Refusing:
            dialect = ledger._engine.dialect

            def connect(self) -> None:
                raise fault

        ledger._backfill._engine = Refusing()
        append_each(ledger, log_tools, range(30))
        assert ledger.tree_size == 30
    assert "could not be copied back" in caplog.text


def test_close_waits_for_the_copy(path: Path, log_tools: SimpleNamespace) -> None:
    ledger = Ledger.open(path)
    backfill = ledger._backfill
    backfill._commits = 1
    gate, done = threading.Event(), threading.Event()
    copy = backfill._copy

    def slow() -> None:
        if threading.current_thread().name == "affidavit-wal-backfill":
            assert gate.wait(20)
            copy()
            done.set()

    backfill._copy = slow
    append_each(ledger, log_tools, range(2))
    closing = threading.Thread(target=ledger.close)
    closing.start()
    assert not done.is_set()
    gate.set()
    closing.join(20)
    assert done.is_set()
    assert not closing.is_alive()


def test_server_has_nothing_to_copy() -> None:
    class Engine:
        dialect = SimpleNamespace(name="postgresql")

    backfill = WalBackfill(Engine(), commits=1)
    for _ in range(5):
        backfill.committed()
    assert backfill._thread is None


def test_write_lock_of_another_process_is_waited_for_and_taken_at_once(
    path: Path, log_tools: SimpleNamespace
) -> None:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with Ledger.open(path) as ledger:
        made = log_tools.make_entry(1)
        future = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
        time.sleep(0.2)
        assert not future.done()
        other.execute("ROLLBACK")
        assert future.result(20).leaf_index == 0
    other.close()


def test_write_lock_that_is_never_let_go_is_said(
    path: Path, log_tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "BUSY_TIMEOUT_S", 0.2)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with Ledger.open(path) as ledger:
        made = log_tools.make_entry(1)
        future = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
        with pytest.raises(LedgerBusyError):
            future.result(20)
        other.execute("ROLLBACK")
        placed = ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns)
        assert placed.leaf_index == 0
    other.close()


def test_thread_whose_turn_does_not_come_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_store, "BUSY_TIMEOUT_S", 0.2)
    engine = _store.open_engine(Ledger.open(path).location)
    told: list[Exception] = []

    def second() -> None:
        try:
            with _store.writing(engine):
                pass
        except LedgerBusyError as error:
            told.append(error)

    with _store.writing(engine):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(20)
    assert [error.code for error in told] == [LedgerBusyError.code]
    with _store.writing(engine):  # the turn was given back
        pass
    engine.dispose()
