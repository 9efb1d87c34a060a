"""Processes that write to one file come in order: who has just written waits for who asked meanwhile."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine

from audit import _store
from audit.errors import LedgerBusyError
from audit.ledger import Ledger
from audit.location import Location
from tests.waiting import wait_until


@pytest.fixture
def path(tmp_path: Path, log_tools: SimpleNamespace) -> Path:
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    return tmp_path / "log.db"


@pytest.fixture
def engines(path: Path) -> Iterator[list[Engine]]:
    """Two that know nothing of each other, as in two processes."""
    found = [_store.open_engine(Location.parse(path)) for _ in range(2)]
    yield found
    for engine in found:
        engine.dispose()


def queue_of(path: Path) -> Path:
    return path.with_name(path.name + _store.QUEUE_SUFFIX)


def is_waited_for(path: Path) -> bool:
    """Whether somebody is the next to take the write lock."""
    with queue_of(path).open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_who_wrote_last_lets_the_next_one_write_first(path: Path, engines: list[Engine]) -> None:
    order: list[str] = []

    def write(engine: Engine, name: str) -> None:
        with _store.writing(engine):
            order.append(name)

    for turn in range(10):
        order.clear()
        with _store.writing(engines[0]):
            other = threading.Thread(target=write, args=(engines[1], "other"))
            other.start()
            wait_until(lambda: is_waited_for(path))
        write(engines[0], "again")  # at once
        other.join()
        assert order == ["other", "again"], turn


def test_one_that_waits_for_its_turn_and_stands_still_holds_nobody_up_for_ever(
    path: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "_QUEUE_S", 0.05)
    with queue_of(path).open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for engine in engines:
            with _store.writing(engine):
                pass


def test_folder_that_takes_no_such_file_costs_the_order_alone(path: Path, engines: list[Engine]) -> None:
    queue_of(path).mkdir()
    for engine in engines:
        with _store.writing(engine):
            pass


def test_turn_ends_where_the_write_lock_is_refused(
    path: Path, engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "BUSY_TIMEOUT_S", 0.05)
    with _store.writing(engines[0]):
        began = time.monotonic()
        with pytest.raises(LedgerBusyError), _store.writing(engines[1]):
            raise AssertionError("two write")
        assert time.monotonic() - began >= 0.05
        assert not is_waited_for(path)
