"""The vault: what an entry may not hold because it must be erasable, sealed under a key of each person's own.

    seal      one durable transaction: the person's row (made at first sight, with a random pseudonym and a
              random key wrapped by the master key) and the ciphertext, bound to event id, type, person and
              origin. Only then is the entry appended, so no acknowledged entry lacks its record; a crash
              between the two leaves a record without an entry, which nobody was told of and `sweep` deletes.
    erase     one durable transaction: key, mapping and ciphertexts go, a tombstone with the finished leaf
              comes. Then the file is rewritten (`scrub`), then the leaf is appended, then the tombstone is
              settled. A crash after the transaction is made good by `pending`; nothing is undone.
    forget    what the log's erasures ask of a vault that came from a backup.

Processes are ordered by the database. Nothing is cached but the master key.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, delete, func, insert, inspect, select, update

from audit import _store, _vault_store
from audit._sequencer import Sequencer
from audit._vault_seal import Places, encode_identity, encode_parts, parse_identity, parse_parts, sha256_hex
from audit._vault_store import Scrub, VaultMissingError
from audit.commitments import new_pseudonym
from audit.disclosure import SealedPart
from audit.errors import AuditError, EventIdConflictError
from audit.location import Location
from audit.vault_key import KEY_SIZE, MasterKey, VaultKeyError, seal, unseal
from audit.vault_records import (
    PERSON,
    Erasure,
    Record,
    RecordMissingError,
    Sealed,
    SealRequest,
    SubjectUnknownError,
    VaultRequestError,
    check_name,
    check_request_id,
    erasure_of,
    record_of,
)
from audit.vault_tables import (
    ERASURE,
    RECORD,
    REWRITTEN,
    SCRUBBED,
    SUBJECT,
    UNTOUCHED,
    VAULT_APPLICATION_ID,
    VAULT_HEAD,
    VAULT_SCHEMA_VERSION,
)

MAX_BATCH: Final = 256
MAX_PENDING: Final = 4096
_PAGE: Final = 500


class Vault:
    """One open vault. Make it with `create` or `open`, end it with `close`."""

    def __init__(
        self, location: Location, origin: str, key_path: Path, passphrase: bytes | None, key: MasterKey
    ) -> None:
        self.location, self.origin = location, origin
        self._key_path, self._passphrase, self._key = key_path, passphrase, key
        self._places = Places(origin)
        self._lock = threading.Lock()
        self._start()

    @classmethod
    def create(
        cls, place: Location | Path | str, key_path: Path, origin: str, passphrase: bytes | None = None
    ) -> Vault:
        """Make an empty vault for the log `origin`, and its key file where there is none.

        Raises:
            VaultMissingError, VaultKeyError: there is one already, or a folder cannot be written.
        """
        location = Location.parse(place)
        if key_path.exists():
            key = MasterKey.load(key_path, passphrase)
        else:
            key = MasterKey.new()
            key.save(key_path, passphrase)
        _vault_store.create(location, origin, key.check_value(origin))
        return cls.open(location, key_path, origin, passphrase)

    @classmethod
    def open(
        cls, place: Location | Path | str, key_path: Path, origin: str, passphrase: bytes | None = None
    ) -> Vault:
        """Open an existing vault; never creates one.

        Raises:
            VaultMissingError: there is none, or it is of another release or another log.
            VaultKeyError: the key file is missing, damaged, or of another vault.
        """
        location = Location.parse(place)
        if location.path is not None and not location.path.is_file():
            raise VaultMissingError(str(location), "no vault here; restore it with `affidavit vault restore`")
        key = MasterKey.load(key_path, passphrase)
        vault = cls(location, origin, key_path, passphrase, key)
        try:
            with _store.reading(vault._engine) as connection:
                _check_kind(connection, location)
                head = connection.execute(select(VAULT_HEAD)).one()
                if head.schema_version != VAULT_SCHEMA_VERSION:
                    raise VaultMissingError(str(location), f"is of schema {head.schema_version}, not ours")
                if head.origin != origin:
                    raise VaultMissingError(str(location), f"is the vault of {head.origin}, not of {origin}")
            vault._key_of(head)
        except BaseException:
            vault.close()
            raise
        return vault

    def close(self) -> None:
        """Finish what was queued, then let go of the database. Safe to call twice."""
        self._sequencer.close()
        self._engine.dispose()

    def __enter__(self) -> Vault:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # sealing and opening

    def seal(self, request: SealRequest) -> Future[Sealed]:
        """Queue a record; the future completes once it is durable.

        Raises:
            VaultRequestError: the person's id is empty, too long, or no text.
            LedgerBusyError, LedgerClosedError: the queue is full, or the vault was closed.
        """
        return self._sequencer_for(request).submit(request)

    def seal_from_loop(self, request: SealRequest) -> asyncio.Future[Sealed]:
        """`seal` for a coroutine: the future is of its running loop, which is woken once for a whole batch.

        Raises:
            VaultRequestError, LedgerBusyError, LedgerClosedError: as `seal`.
        """
        return self._sequencer_for(request).submit_from_loop(request)

    def _sequencer_for(self, request: SealRequest) -> Sequencer[SealRequest, Sealed]:
        check_name(request.name)
        with self._lock:
            if self._pid != os.getpid():
                self._start()
        return self._sequencer

    def parts(self, event_id: str, *, type: str, pseudonym: str | None = None) -> dict[str, SealedPart]:
        """Open what was sealed for one entry.

        Raises:
            RecordMissingError: there is nothing: swept, erased, or never sealed.
            SealBrokenError: the ciphertext was changed, or moved from another entry or person.
        """
        with _store.reading(self._engine) as connection:
            head = connection.execute(select(VAULT_HEAD)).one()
            query = select(RECORD, SUBJECT.c.wrapped_key).join(
                SUBJECT, SUBJECT.c.pseudonym == RECORD.c.pseudonym
            )
            row = connection.execute(query.where(RECORD.c.event_id == event_id)).first()
        if row is None:
            raise RecordMissingError(f"the vault holds nothing for event {event_id}")
        key = self._subject_key(self._key_of(head), pseudonym or row.pseudonym, row.wrapped_key)
        place = self._places.record(event_id, type, pseudonym or row.pseudonym)
        return parse_parts(unseal(key, row.ciphertext, place))

    def record(self, event_id: str) -> Record | None:
        """Return one record, still sealed."""
        with _store.reading(self._engine) as connection:
            row = connection.execute(select(RECORD).where(RECORD.c.event_id == event_id)).first()
        return None if row is None else record_of(row)

    # who is who

    def pseudonym(self, name: str, kind: str = PERSON) -> str:
        """Return the pseudonym of somebody.

        Raises:
            SubjectUnknownError: never seen here, or erased.
        """
        check_name(name)
        with _store.reading(self._engine) as connection:
            key = self._key_of(connection.execute(select(VAULT_HEAD)).one())
            query = select(SUBJECT.c.pseudonym).where(SUBJECT.c.lookup == key.lookup(kind, name))
            found = connection.execute(query).scalar()
        if found is None:
            raise SubjectUnknownError
        return str(found)

    def identify(self, pseudonym: str) -> tuple[str, str]:
        """Return (kind, name) behind a pseudonym.

        Raises:
            SubjectUnknownError: erased, or never given.
        """
        with _store.reading(self._engine) as connection:
            master = self._key_of(connection.execute(select(VAULT_HEAD)).one())
            row = connection.execute(select(SUBJECT).where(SUBJECT.c.pseudonym == pseudonym)).first()
        if row is None:
            raise SubjectUnknownError
        return self._identity(master, row)

    def records(self, pseudonym: str) -> list[Record]:
        """Return everything that is sealed for somebody, oldest first."""
        query = select(RECORD).where(RECORD.c.pseudonym == pseudonym)
        with _store.reading(self._engine) as connection:
            rows = connection.execute(query.order_by(RECORD.c.time, RECORD.c.event_id)).all()
        return [record_of(row) for row in rows]

    # forgetting

    def erase(
        self,
        name: str,
        *,
        request_id: str,
        leaf: Callable[[str, int], tuple[str, bytes]],
        kind: str = PERSON,
    ) -> Erasure:
        """Delete somebody's key, mapping and records for good, and keep the leaf that will say so.

        The same request again returns the same erasure. Scrub, append and `settle` come after.

        Args:
            name: the caller's own id. request_id: of whoever asked; goes into the log, so it names nobody.
            leaf: gives (event id, bytes) of the erasure's entry, from pseudonym and number of records.

        Raises:
            SubjectUnknownError: there is nobody of that id.
            VaultRequestError: an id is out of form, or the request id was another person's.
        """
        check_name(name)
        check_request_id(request_id)
        with _vault_store.writing(self._engine) as (connection, head):
            lookup = self._key_of(head).lookup(kind, name)
            found = connection.execute(select(SUBJECT.c.pseudonym).where(SUBJECT.c.lookup == lookup)).scalar()
            known = connection.execute(select(ERASURE).where(ERASURE.c.request_id == request_id)).first()
            if known is not None:
                if found is not None:
                    raise VaultRequestError("request_id: was used for another person; give a new one")
                return erasure_of(known)
            if found is None:
                raise SubjectUnknownError
            count = _forget(connection, [str(found)])
            event_id, data = leaf(str(found), count)
            row = {
                "request_id": request_id,
                "pseudonym": found,
                "records": count,
                "event_id": event_id,
                "entry": data,
                "leaf_index": None,
                "scrubbed": UNTOUCHED,
            }
            connection.execute(insert(ERASURE), row)
        return Erasure(**{**row, "scrubbed": False})

    def scrub(self, patience_s: float = _store.BUSY_TIMEOUT_S) -> Scrub:
        """Rewrite what was deleted away (`audit._vault_store.scrub`); say how far that was possible now."""
        with _store.reading(self._engine) as connection:
            query = select(ERASURE.c.request_id).where(ERASURE.c.scrubbed != SCRUBBED)
            waiting = [row.request_id for row in connection.execute(query)]
        done = _vault_store.scrub(self.location, patience_s)
        if waiting and done.rewritten:
            state = SCRUBBED if done else REWRITTEN
            with _vault_store.writing(self._engine) as (connection, _):
                connection.execute(
                    update(ERASURE).where(ERASURE.c.request_id.in_(waiting)).values(scrubbed=state)
                )
        return done

    def pending(self) -> list[Erasure]:
        """Return the erasures that are not in the log yet, or whose rows are not rewritten yet."""
        query = select(ERASURE).where((ERASURE.c.leaf_index.is_(None)) | (ERASURE.c.scrubbed == UNTOUCHED))
        with _store.reading(self._engine) as connection:
            return [erasure_of(row) for row in connection.execute(query)]

    def settle(self, request_id: str, leaf_index: int) -> None:
        """Remember that an erasure is in the log, at this leaf."""
        with _vault_store.writing(self._engine) as (connection, _):
            connection.execute(
                update(ERASURE).where(ERASURE.c.request_id == request_id).values(leaf_index=leaf_index)
            )

    @property
    def erased_until(self) -> int:
        """The log's erasures before this leaf are applied here."""
        with _store.reading(self._engine) as connection:
            return int(connection.execute(select(VAULT_HEAD.c.erased_until)).scalar_one())

    def forget(self, pseudonyms: Iterable[str], *, until: int) -> int:
        """Apply the log's erasures up to leaf `until`; return how many people were still here.

        Where others keep the vault busy, freed pages stay as they are, and the next call does it all again.
        """
        gone, here = list(pseudonyms), 0
        for start in range(0, len(gone), _PAGE):
            page = gone[start : start + _PAGE]
            with _vault_store.writing(self._engine) as (connection, _):
                query = select(func.count()).select_from(SUBJECT).where(SUBJECT.c.pseudonym.in_(page))
                here += int(connection.execute(query).scalar_one())
                _forget(connection, page)
        if gone and not self.scrub().rewritten:
            return here
        with _vault_store.writing(self._engine) as (connection, _):
            connection.execute(update(VAULT_HEAD).values(erased_until=until))
        return here

    def sweep(self, logged: Callable[[Sequence[str]], set[str]], *, before: str) -> int:
        """Delete records sealed before that time whose entry never came; return how many.

        Args:
            logged: which of some event ids are in the log. before: RFC 3339.
        """
        swept, (time, event_id) = 0, ("", "")
        with _store.reading(self._engine) as connection:
            time = str(connection.execute(select(VAULT_HEAD.c.swept_until)).scalar_one())
        while True:
            later = (RECORD.c.time > time) | ((RECORD.c.time == time) & (RECORD.c.event_id > event_id))
            query = select(RECORD.c.time, RECORD.c.event_id).where(later, RECORD.c.time < before)
            with _store.reading(self._engine) as connection:
                page = connection.execute(query.order_by(RECORD.c.time, RECORD.c.event_id).limit(_PAGE)).all()
            if not page:
                return swept
            time, event_id = page[-1]
            found = [row.event_id for row in page]
            orphans = sorted(set(found) - logged(found))
            with _vault_store.writing(self._engine) as (connection, _):
                connection.execute(delete(RECORD).where(RECORD.c.event_id.in_(orphans)))
                connection.execute(update(VAULT_HEAD).values(swept_until=time))
            swept += len(orphans)

    def rotate_key(self) -> int:
        """Wrap every person's key under a new master key and forget the old; return how many there are.

        Whatever the old key wrapped, in backups, write-ahead logs or freed blocks of a disk, is then closed
        for good. The new key is on disk before it is used, so a crash leaves a vault that opens.
        """
        new, beside = MasterKey.new(), _next_path(self._key_path)
        new.save(beside, self._passphrase, replace=True)
        with _vault_store.writing(self._engine) as (connection, head):
            old = self._key_of(head)
            rows = connection.execute(select(SUBJECT)).all()
            for row in rows:
                place = self._places.key(row.pseudonym)
                values = {
                    "lookup": new.lookup(*self._identity(old, row)),
                    "wrapped_key": new.wrap(old.unwrap(row.wrapped_key, place), place),
                }
                connection.execute(
                    update(SUBJECT).where(SUBJECT.c.pseudonym == row.pseudonym).values(**values)
                )
            connection.execute(update(VAULT_HEAD).values(key_check=new.check_value(self.origin)))
        os.replace(beside, self._key_path)
        self._key = new
        self.scrub()
        return len(rows)

    # inside

    def _start(self) -> None:
        self._pid = os.getpid()
        self._engine: Engine = _vault_store.open_engine(self.location)
        self._sequencer: Sequencer[SealRequest, Sealed] = Sequencer(
            self._commit, max_batch=MAX_BATCH, max_pending=MAX_PENDING
        )

    def _commit(self, batch: list[SealRequest]) -> list[Sealed | AuditError]:
        with _vault_store.writing(self._engine) as (connection, head):
            master = self._key_of(head)
            wanted = [request.event_id for request in batch]
            query = select(RECORD.c.event_id).where(RECORD.c.event_id.in_(wanted))
            done = {row.event_id for row in connection.execute(query)}
            people = self._people(connection, master, batch)
            outcomes: list[Sealed | AuditError] = []
            rows = []
            for request in batch:
                if request.event_id in done:
                    outcomes.append(EventIdConflictError(event_id=request.event_id, leaf_index=-1))
                    continue
                done.add(request.event_id)
                pseudonym, key = people[request.kind, request.name]
                place = self._places.record(request.event_id, request.type, pseudonym)
                ciphertext = seal(key, encode_parts(request.parts), place)
                rows.append(
                    {
                        "event_id": request.event_id,
                        "pseudonym": pseudonym,
                        "type": request.type,
                        "time": request.time,
                        "ciphertext": ciphertext,
                    }
                )
                outcomes.append(Sealed(pseudonym=pseudonym, digest=sha256_hex(ciphertext)))
            if rows:
                connection.execute(insert(RECORD), rows)
        return outcomes

    def _people(
        self, connection: Connection, master: MasterKey, batch: list[SealRequest]
    ) -> dict[tuple[str, str], tuple[str, bytes]]:
        """Return pseudonym and key of everybody whom the batch names; who is new gets theirs here."""
        lookups = {(r.kind, r.name): master.lookup(r.kind, r.name) for r in batch}
        query = select(SUBJECT).where(SUBJECT.c.lookup.in_(list(lookups.values())))
        known = {row.lookup: row for row in connection.execute(query)}
        people, rows = {}, []
        for (kind, name), lookup in lookups.items():
            row = known.get(lookup)
            if row is not None:
                people[kind, name] = (
                    row.pseudonym,
                    self._subject_key(master, row.pseudonym, row.wrapped_key),
                )
                continue
            pseudonym, key = new_pseudonym(), secrets.token_bytes(KEY_SIZE)
            people[kind, name] = (pseudonym, key)
            identity = encode_identity(kind, name)
            rows.append(
                {
                    "pseudonym": pseudonym,
                    "lookup": lookup,
                    "wrapped_key": master.wrap(key, self._places.key(pseudonym)),
                    "sealed_id": seal(key, identity, self._places.identity(pseudonym)),
                }
            )
        if rows:
            connection.execute(insert(SUBJECT), rows)
        return people

    def _key_of(self, head: Any) -> MasterKey:
        """Return the master key that fits the database, reading it again after somebody rotated it."""
        if self._key.fits(head.key_check, self.origin):
            return self._key
        for path in (self._key_path, _next_path(self._key_path)):
            if not path.exists():
                continue
            key = MasterKey.load(path, self._passphrase)
            if key.fits(head.key_check, self.origin):
                if path != self._key_path:  # a rotation was cut off after its transaction
                    os.replace(path, self._key_path)
                self._key = key
                return key
        raise VaultKeyError(f"{self._key_path}: is not the key of {self.location}; restore the right one")

    def _subject_key(self, master: MasterKey, pseudonym: str, wrapped: bytes) -> bytes:
        return master.unwrap(wrapped, self._places.key(pseudonym))

    def _identity(self, master: MasterKey, row: Any) -> tuple[str, str]:
        key = self._subject_key(master, row.pseudonym, row.wrapped_key)
        return parse_identity(unseal(key, row.sealed_id, self._places.identity(row.pseudonym)))


def _check_kind(connection: Connection, location: Location) -> None:
    if location.path is None:
        found = inspect(connection).has_table(VAULT_HEAD.name)
    else:
        found = connection.exec_driver_sql("PRAGMA application_id").scalar() == VAULT_APPLICATION_ID
    if not found:
        raise VaultMissingError(str(location), "what is there is no vault; restore it")


def _forget(connection: Connection, pseudonyms: list[str]) -> int:
    """Delete all that there is of these people; return how many records that were."""
    gone = connection.execute(delete(RECORD).where(RECORD.c.pseudonym.in_(pseudonyms))).rowcount
    connection.execute(delete(SUBJECT).where(SUBJECT.c.pseudonym.in_(pseudonyms)))
    return int(gone)


def _next_path(path: Path) -> Path:
    return path.with_name(path.name + ".next")
