"""SQLite's write-ahead log goes back into the database file beside the writer, not in the middle of a commit.

Left to SQLite, the commit that makes the log long enough also copies all of it and waits for the disk twice
more, while everybody whose entry is in that batch waits too. Here a thread copies what is committed while
the writer goes on; the writer copies the rest, a few pages, and the next commit begins the log's file again.
Where this thread fails or falls behind, SQLite's own limit (`audit._store`) still holds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Final

from sqlalchemy import Engine

from audit import _forks, _store
from audit.errors import AuditError

_logger = logging.getLogger(__name__)

COMMITS: Final = 60  # between two turns, where commits are small: at some twenty pages each, 1,200 pages
_ROWS: Final = 128  # that cost a commit the pages of another one and more


class WalBackfill:
    """Of one log's database; on a server it has nothing to do."""

    def __init__(self, engine: Engine, *, commits: int = COMMITS) -> None:
        self._engine, self._commits = engine, commits
        self._is_file = engine.dialect.name == "sqlite"
        self._since = 0
        self._thread: threading.Thread | None = None
        self._has_rest = False

    def committed(self, rows: int = 1) -> None:
        """Take note of a commit of so many rows; the one thread that writes calls this after each."""
        if not self._is_file:
            return
        self._since += 1 + rows // _ROWS
        if self._has_rest:
            self._has_rest = False
            self._copy()
        elif self._since >= self._commits and self._thread is None:
            self._since = 0
            self._thread = threading.Thread(target=self._beside, name="affidavit-wal-backfill", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Wait until the thread is done; nothing begins after the writer has ended."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _beside(self) -> None:
        try:
            self._copy()
            self._has_rest = True
        finally:
            self._thread = None

    def _copy(self) -> None:
        thread = _forks.enter()
        try:
            with _store.translated(), self._engine.connect() as connection:
                raw = connection.connection.driver_connection
                if raw is not None:
                    with contextlib.closing(raw.execute("PRAGMA wal_checkpoint(PASSIVE)")) as cursor:
                        cursor.fetchone()
        except AuditError as error:
            _logger.warning("the write-ahead log could not be copied back yet: %s", error)
        finally:
            _forks.leave(thread)
