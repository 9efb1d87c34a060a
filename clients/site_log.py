"""The site's own log: what its agent signed, declined and was told to do, in a Merkle tree of the site's.

    log.db        the entries; an `audit.ledger` of origin `site.<name>`
    log-signer/   the key that signs its checkpoints, and the last tree it signed

The first entry names the log's key, the second one binds that key to the site's identity. The agent and the
commands of the site's people append to it side by side; the database orders them. What is released is
entered here before it is sent, so this log and the federation's can be compared: `affidavit verify LOG
--site SITE-LOG`.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from audit.entries import TYPE_OF as _TYPE_OF
from audit.entries import (
    Body,
    Entry,
    LogCreated,
    columns_of,
    decode_entry,
    encode_entry,
    new_entry,
)
from audit.errors import AuditError, EventIdConflictError
from audit.ledger import Ledger, StoredEntry
from audit.signer import Signer, publish
from audit.site_bodies import SiteLogOpened
from clients.errors import HomeError
from clients.identity import SiteKeys

B = TypeVar("B")
Clock = Callable[[], datetime]

LOG: Final = "log.db"
SIGNER: Final = "log-signer"
_PAGE: Final = 500


def _utc_now() -> datetime:
    return datetime.now(UTC)


def event_id(*parts: str) -> str:
    """Name an event by what it is, so that writing it again changes nothing."""
    text = "\x00".join(parts)
    return hashlib.sha256(b"affidavit/site-event/v1\x00" + text.encode()).hexdigest()[:32]


def origin_of(site: str) -> str:
    return f"site.{site}"


class Diary(Protocol):
    """What an agent asks of its site's own log; `SiteLog` keeps it on disk, `clients.virtual` in memory."""

    site: str

    @property
    def log_key(self) -> str: ...
    @property
    def tree_size(self) -> int: ...
    def append(self, body: Body, *, event_id: str | None = None) -> int: ...
    def publish(self) -> bytes: ...
    def anchor(self) -> tuple[int, str]: ...
    def entries(
        self, kind: type[B], *, run: str | None = None, since: datetime | None = None
    ) -> Iterator[tuple[int, Entry, B]]: ...
    def latest(self, kind: type[B], *, run: str | None = None) -> B | None: ...
    def count(self, kind: type[Any]) -> int: ...
    def close(self) -> None: ...


class SiteLog:
    """One site's open log. Several processes of the site may hold it open. Thread-safe."""

    def __init__(self, site: str, ledger: Ledger, signer: Signer, clock: Clock = _utc_now) -> None:
        self.site = site
        self._ledger, self._signer, self._clock = ledger, signer, clock
        self._published: tuple[int, bytes] | None = None

    @classmethod
    def create(
        cls, home: Path, site: str, population: str, keys: SiteKeys, *, clock: Clock = _utc_now
    ) -> SiteLog:
        """Make a new site's empty log, once, and bind its key to the site's identity.

        Raises:
            HomeError: there is one already, or it cannot be made.
        """
        try:
            ledger = Ledger.create(home / LOG, origin_of(site))
            signer = Signer.create(home / SIGNER, origin_of(site))
        except AuditError as error:
            raise HomeError(home / LOG, str(error), "restore it; a site's log never starts over") from error
        log = cls(site, ledger, signer, clock)
        log.append(LogCreated(origin=origin_of(site), log_key=signer.vkey))
        opened = SiteLogOpened(
            site=site,
            population=population,
            identity_key=keys.identity.text,
            log_key=signer.vkey,
            signature="",
        )
        log.append(keys.signed(opened))
        log.publish()
        return log

    @classmethod
    def open(cls, home: Path, site: str, *, clock: Clock = _utc_now) -> SiteLog:
        """Open the log that `create` made.

        Raises:
            HomeError: it is missing, damaged, or another site's.
        """
        try:
            ledger = Ledger.open(home / LOG)
            try:
                signer = Signer.open(home / SIGNER)
            except AuditError:
                ledger.close()
                raise
        except AuditError as error:
            raise HomeError(
                home / LOG, str(error), "restore it and log-signer/ from the site's own backup"
            ) from error
        if ledger.origin != origin_of(site):
            ledger.close()
            raise HomeError(home / LOG, f"is the log of {ledger.origin}", f"restore that of site {site}")
        return cls(site, ledger, signer, clock)

    @property
    def log_key(self) -> str:
        """The vkey of this log's checkpoints, as a policy names it."""
        return self._signer.vkey

    @property
    def tree_size(self) -> int:
        return self._ledger.tree_size

    def append(self, body: Body, *, event_id: str | None = None) -> int:
        """Write an entry durably and return its index; an event id that is there already keeps its entry.

        Raises:
            AuditError: it is not durable.
        """
        now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = new_entry(body, actor=f"site:{self.site}", time=now, event_id=event_id)
        data = encode_entry(entry)
        try:
            done = self._ledger.append_wait(data, event_id=entry.event_id, index_columns=columns_of(data))
        except EventIdConflictError:
            found = self._ledger.find_event(entry.event_id)
            if found is None or decode_entry(found.body).type != entry.type:
                raise
            return found.leaf_index
        return done.leaf_index

    def publish(self) -> bytes:
        """Sign the log as it stands and keep the checkpoint with it; return the note.

        Raises:
            AuditError: the log no longer extends what was signed: an old copy was put back.
        """
        size = self._ledger.tree_size
        if self._published is None or self._published[0] != size:
            self._published = (size, publish(self._ledger, self._signer))
        return self._published[1]

    def anchor(self) -> tuple[int, str]:
        """Return size and root of the log as it stands: what the federation's log is told of it."""
        edge = self._ledger.edge()
        return edge.size, edge.root().hex()

    def entries(
        self, kind: type[B], *, run: str | None = None, since: datetime | None = None
    ) -> Iterator[tuple[int, Entry, B]]:
        """Yield (index, entry, body) of one kind, oldest first."""
        after: int | None = None
        mark = None if since is None else since.strftime("%Y-%m-%dT%H:%M:%SZ")
        while True:
            page = self._ledger.search(
                type=_TYPE_OF[kind], run=run or None, since=mark, after=after, limit=_PAGE
            )
            for stored in page:
                entry = decode_entry(stored.body)
                body: Any = entry.body
                yield stored.leaf_index, entry, body
            if len(page) < _PAGE:
                return
            after = page[-1].leaf_index

    def latest(self, kind: type[B], *, run: str | None = None) -> B | None:
        """Return the newest body of one kind."""
        page = self._newest(_TYPE_OF[kind], run)
        if not page:
            return None
        body: B = decode_entry(page[0].body).body  # type: ignore[assignment]
        return body

    def count(self, kind: type[Any]) -> int:
        return self._ledger.count(type=_TYPE_OF[kind])

    def export(self, target: Path) -> int:
        """Copy the log, signed as it stands, into one new file; return how many entries it has.

        Raises:
            HomeError: the file exists, or cannot be written.
        """
        self.publish()
        place = self._ledger.location.path
        if place is None or target.exists():
            raise HomeError(target, "is there already", "choose a new file")
        try:
            with closing(sqlite3.connect(place)) as source, closing(sqlite3.connect(target)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, whole in itself
        except sqlite3.Error as error:
            raise HomeError(target, f"cannot be written: {error}", "choose another place") from error
        return self._ledger.tree_size

    def close(self) -> None:
        """Sign what came last, then let go of the file."""
        try:
            if self._ledger.tree_size:
                self.publish()
        finally:
            self._ledger.close()

    def release(self) -> None:
        """Let go of the file without signing anything; for readers."""
        self._ledger.close()

    def _newest(self, kind: str, run: str | None) -> list[StoredEntry]:
        return self._ledger.search(type=kind, run=run, limit=1, newest_first=True)
