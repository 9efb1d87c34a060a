"""A coordinator's home: the log, its signer and the files by digest, opened together.

home/config.yaml, home/log.db (or a PostgreSQL database that config.yaml names), home/blobs/, home/runs/; the
signer's home is a directory of its own. Several processes may open one home: the database orders their
entries, and one of them at a time holds the lease to publish.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import yaml

from audit._files import write_durably
from audit.checkpoints import add_signatures, open_checkpoint, parse_checkpoint_note
from audit.entries import (
    Body,
    Entry,
    KeyRotated,
    LogCompromised,
    LogCreated,
    SiteEnrolled,
    body_document,
    decode_entry,
    encode_entry,
    index_columns,
    new_entry,
    signing_payload,
)
from audit.errors import AuditError, LocationError
from audit.ledger import MAX_BATCH, Ledger, Sequenced, StoredEntry
from audit.location import LOG_FILE, Location, log_location
from audit.notes import NoteSigner, NoteVerifier, SignatureLine
from audit.signer import Signer
from audit.signing_home import named_for, publisher_of, signer_home_of, signer_passphrase, watchers_of
from federation.blobs import BlobStore
from federation.errors import HomeError

B = TypeVar("B")
Addition = tuple[Body, str, str | None]
"""(body, actor, event id or None for a new one): one entry to be."""

CONFIG = "config.yaml"
LOG = LOG_FILE
_LOOKED_UP: Final = 300  # event ids in one question to the database
_APPEND_TIMEOUT_S: Final = 60.0


class Clock(Protocol):
    """Where the time comes from; tests bring their own."""

    def now(self) -> datetime:
        """Return the time, aware, UTC."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


class Coordinator:
    """The open home. Make it with `create` or `open`, end it with `close`."""

    def __init__(
        self, home: Path, signer_home: Path, ledger: Ledger, signer: Signer, clock: Clock | None = None
    ) -> None:
        self.home, self.signer_home = home, signer_home
        self.ledger, self.signer = ledger, signer
        self.watchers = watchers_of(home, ledger.origin)
        self.publisher = publisher_of(ledger, signer, self.watchers)
        self.clock: Clock = clock or SystemClock()
        self.simulated = _is_simulated(home)
        self.blobs = BlobStore(home / "blobs", durable=not self.simulated)
        self._enrolled: dict[str, SiteEnrolled] = {}
        self._enrolled_until: int | None = None

    @classmethod
    def create(
        cls,
        home: Path | str,
        signer_home: Path | str,
        origin: str,
        *,
        clock: Clock | None = None,
        database: str | None = None,
        simulated: bool = False,
    ) -> Coordinator:
        """Make a new log named `origin` with a signer of its own, and write its first entry.

        `database` is a path or URL without a password; by default the log is a SQLite file in the home. The
        `simulated` marks a home of virtual sites alone, whose files by digest are not forced to disk. The
        signer's key is encrypted when AFFIDAVIT_SIGNER_PASSPHRASE, or the file that
        AFFIDAVIT_SIGNER_PASSPHRASE_FILE names, gives a passphrase.

        Raises:
            HomeError: the home holds a log already.
            AuditError: the origin or a folder cannot be used.
        """
        home, signer_home = Path(home), Path(signer_home)
        if (home / LOG).exists() or (home / CONFIG).exists():
            raise HomeError(str(home), "holds a log already; open it, or choose another --home")
        home.mkdir(mode=0o700, parents=True, exist_ok=True)  # models, and updates of sites
        (home / "runs").mkdir(exist_ok=True)
        signer_home.parent.mkdir(parents=True, exist_ok=True)
        config = {"origin": origin, "signer_home": named_for(home, signer_home)}
        if database is not None:
            url = Location.parse(database).url
            if url is not None and url.password:
                raise HomeError(str(home), "would keep a password; give it by AFFIDAVIT_DATABASE_PASSWORD")
            config["database"] = database
        if simulated:
            config["simulated"] = "yes"
        location = log_location(home, {**os.environ, "AFFIDAVIT_DATABASE": database or ""})
        if database is None:
            location = log_location(home)
        ledger = Ledger.create(location, origin)
        try:
            signer = Signer.create(signer_home, origin, signer_passphrase())
        except AuditError:
            ledger.close()
            if location.path is not None:
                location.path.unlink()
            raise
        (home / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        coordinator = cls(home, signer_home, ledger, signer, clock)
        coordinator.append(LogCreated(origin=origin, log_key=signer.vkey), "coordinator")
        return coordinator

    @classmethod
    def open(
        cls, home: Path | str, signer_home: Path | str | None = None, *, clock: Clock | None = None
    ) -> Coordinator:
        """Open an existing home; never creates one. Without `signer_home` it is the one that the home names.

        Raises:
            HomeError: there is none, or its configuration cannot be read.
            SignerElsewhereError: the home is a copy, and names the original's signer.
            SignerRollbackError, SignerSplitError: the log is an old copy, or another than was signed.
            AuditError: the log or the signer's state is missing or contradicts itself.
        """
        home = Path(home)
        try:
            chosen = Path(signer_home) if signer_home is not None else signer_home_of(home)
        except LocationError as error:
            raise HomeError(
                str(home), "is not a coordinator's home; make one with `affidavit init`"
            ) from error
        if not (home / CONFIG).is_file():
            raise HomeError(str(home), "is not a coordinator's home; make one with `affidavit init`")
        ledger = Ledger.open(log_location(home))
        try:
            signer = Signer.open(chosen, signer_passphrase())
            signer.check_extended_by(ledger)
            return cls(home, chosen, ledger, signer, clock)
        except AuditError:
            ledger.close()
            raise

    def close(self) -> None:
        """Finish what was queued, give the lease back and let go of the files."""
        try:
            self.publisher.close()
        finally:
            self.ledger.close()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def origin(self) -> str:
        return self.ledger.origin

    @property
    def log_key(self) -> str:
        """The log's vkey, for policies."""
        return self.signer.vkey

    def append(self, body: Body, actor: str, event_id: str | None = None) -> Sequenced:
        """Write one entry and wait until it is durable; the same event id and body again is the same entry.

        Raises:
            AuditError: the entry breaks a rule, or the log cannot take it.
        """
        if event_id is not None and self.ledger.logged_events([event_id]):
            found = self.ledger.find_event(event_id)
            if found is not None and body_document(decode_entry(found.body).body) == body_document(body):
                return Sequenced(found.leaf_index, found.leaf_hash, event_id, self.ledger.tree_size)
        time = self.clock.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        entry = new_entry(body, actor=actor, time=time, event_id=event_id)
        data, columns = encode_entry(entry), index_columns(entry)
        return self.ledger.append_wait(data, event_id=entry.event_id, index_columns=columns)

    def append_all(self, additions: Sequence[Addition]) -> list[Sequenced]:
        """Write entries together and wait until all are durable: `append` for many, in the order given.

        They share commits, so a thousand cost hardly more than a few. Those that are there already, by event
        id and body, keep their place.

        Raises:
            AuditError: an entry breaks a rule, or the log cannot take it; entries before it may be durable.
        """
        ids = [event_id for _, _, event_id in additions if event_id is not None]
        known: set[str] = set()
        for start in range(0, len(ids), _LOOKED_UP):
            known |= self.ledger.logged_events(ids[start : start + _LOOKED_UP])
        time = self.clock.now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        placed: list[Sequenced] = []
        for start in range(0, len(additions), MAX_BATCH):
            batch = additions[start : start + MAX_BATCH]
            entries = [
                new_entry(body, actor=actor, time=time, event_id=event_id)
                for body, actor, event_id in batch
                if event_id not in known
            ]
            # all are written before the first is queued, so that the log's thread takes them together
            futures = iter(
                self.ledger.append_all(
                    [(encode_entry(entry), entry.event_id, index_columns(entry)) for entry in entries]
                )
            )
            placed += [
                self.append(body, actor, event_id)
                if event_id in known
                else next(futures).result(_APPEND_TIMEOUT_S)
                for body, actor, event_id in batch
            ]
        return placed

    def publish(self) -> bytes:
        """Return a checkpoint of the log as it is now, signed here or by the process that holds the lease."""
        self.ledger.warm(self.ledger.tree_size)  # what the proofs of this step are made of, in one question
        return self.publisher.publish()

    def alone(self) -> AbstractContextManager[None]:
        """For the length of a run: nobody else publishes this log, if all of its sites are virtual ones."""
        return self.publisher.keeping() if self.simulated else nullcontext()

    def rotate_log_key(self, overlap: int, actor: str = "coordinator") -> Sequenced:
        """Make a new key that signs beside the present one for `overlap` more entries, then alone.

        After a crash in the middle, the next call only writes the missing entry.

        Raises:
            SignerStateError: the last rotation's overlap is not over.
        """
        ring = self.signer.ring
        if ring.retiring and not self._is_in_log(ring.current):
            old, new = self.signer.note_signers
        else:
            old, new = self.signer.rotate(self.ledger.tree_size + overlap)
        body = KeyRotated(
            log_key=old.vkey,
            new_key=new.vkey,
            retire_at=self.signer.ring.retire_at,
            signature="",
            successor_proof="",
        )
        body = replace(body, signature=_signed(body, old), successor_proof=_signed(body, new))
        return self.append(body, actor, stable_event_id("key.rotated", new.vkey))

    def declare_compromised(
        self, reason: str, *, valid_size: int | None = None, actor: str = "coordinator"
    ) -> Sequenced:
        """Replace the present key at once and say that its signatures count up to `valid_size` entries only.

        By default that is the size signed last.
        """
        size = self.signer.state().checkpoint.tree_size if valid_size is None else valid_size
        ring = self.signer.ring
        if ring.past and not ring.retiring and not self._is_in_log(ring.current):
            lost, (new,) = ring.past[-1], self.signer.note_signers
        else:
            old, new = self.signer.replace_compromised()
            lost = old.vkey
        body = LogCompromised(log_key=lost, valid_size=size, successor=new.vkey, reason=reason, signature="")
        body = replace(body, signature=_signed(body, new))
        return self.append(body, actor, stable_event_id("log.compromise", lost))

    def _is_in_log(self, vkey: str) -> bool:
        keys = [body.new_key for _, body in self.bodies(KeyRotated)]
        keys += [body.successor for _, body in self.bodies(LogCompromised)]
        keys += [body.log_key for _, body in self.bodies(LogCreated)]
        return vkey in keys

    def cosign_round(self, collect: Callable[[bytes], Mapping[str, Sequence[bytes]]]) -> bytes:
        """Publish, let `collect` ask the sites, keep every valid cosignature; return the cosigned note.

        `collect` maps the signed note to signature lines by site; a line that is not by the site's enrolled
        witness key over this note is dropped.
        """
        note = self.publish()
        collected = collect(note)
        if not collected:
            return self.ledger.store_checkpoint(note)
        enrolled = self.enrolments()
        offered = [
            (line, NoteVerifier.parse(enrolled[site].witness_key))
            for site, lines in collected.items()
            if site in enrolled
            for line in lines
        ]
        good = [line for line, _ in offered]
        if not self._are_cosigned(note, good, [key for _, key in offered]):  # then each by itself
            good = [line for line, key in offered if self._are_cosigned(note, [line], [key])]
        return self.ledger.store_checkpoint(add_signatures(note, good) if good else note)

    def witness_keys(self) -> dict[str, NoteVerifier]:
        """Return each enrolled site's latest witness key."""
        return {site: NoteVerifier.parse(body.witness_key) for site, body in self.enrolments().items()}

    def enrolments(self) -> Mapping[str, SiteEnrolled]:
        """Return each site's latest enrolment in the log; what was read before is not read again."""
        after = -1 if self._enrolled_until is None else self._enrolled_until
        if not self.ledger.has_since("site.enrolled", after):
            return self._enrolled
        while page := self.ledger.search(type="site.enrolled", after=self._enrolled_until, limit=1000):
            for stored in page:
                body = decode_entry(stored.body).body
                if isinstance(body, SiteEnrolled):
                    self._enrolled[body.site] = body
            self._enrolled_until = page[-1].leaf_index
        return self._enrolled

    def _are_cosigned(self, note: bytes, lines: Sequence[bytes], keys: Sequence[NoteVerifier]) -> bool:
        """Whether each of the lines is a cosignature of the note by the key of the same place."""
        try:
            for line, key in zip(lines, keys, strict=True):
                parsed = SignatureLine.parse(line)
                if (parsed.name, parsed.key_id) != (key.name, key.key_id):
                    return False
            opened = open_checkpoint(
                add_signatures(note, lines),
                log=NoteVerifier.parse(self.log_key),
                witnesses=keys,
                now=int(self.clock.now().timestamp()),
            )
        except AuditError:
            return False
        return len(opened.cosignatures) == len(lines)

    def entries(self, **columns: Any) -> Iterator[tuple[StoredEntry, Entry]]:
        """Yield every entry that `Ledger.search` finds, in index order, page by page."""
        after: int | None = None
        while True:
            page = self.ledger.search(**columns, after=after, limit=1000)
            for stored in page:
                yield stored, decode_entry(stored.body)
            if len(page) < 1000:
                return
            after = page[-1].leaf_index

    def bodies(self, kind: type[B], **columns: Any) -> Iterator[tuple[StoredEntry, B]]:
        """Yield (stored entry, body) of every entry whose body is a `kind`."""
        from audit.entries import TYPE_OF

        for stored, entry in self.entries(type=TYPE_OF[kind], **columns):
            if isinstance(entry.body, kind):
                yield stored, entry.body

    def checkpoint_size(self, note: bytes) -> int:
        """Return the tree size of a note of this log."""
        return parse_checkpoint_note(note).tree_size

    def keep_run(self, run: str, document: Mapping[str, Any]) -> None:
        """Keep what a run needs to start, for the ServerApp that will carry it out; durable on return."""
        (self.home / "runs").mkdir(exist_ok=True)
        write_durably(self.home / "runs" / f"{run}.json", json.dumps(document).encode())

    def kept_run(self, run: str) -> dict[str, Any]:
        """Return what `keep_run` kept.

        Raises:
            HomeError: no run of that id was prepared here.
        """
        path = self.home / "runs" / f"{run}.json"
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise HomeError(
                str(path), "no such run was prepared here; start it with `affidavit train`"
            ) from error
        return document


def _signed(body: KeyRotated | LogCompromised, signer: NoteSigner) -> str:
    return base64.b64encode(signer.key.sign(*signing_payload(body))).decode()


def _is_simulated(home: Path) -> bool:
    try:
        document = yaml.safe_load((home / CONFIG).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return isinstance(document, dict) and document.get("simulated") == "yes"


def stable_event_id(*parts: str) -> str:
    """Return an event id that the same facts always give, so that a retry writes no second entry."""
    return hashlib.sha256(b"affidavit/event-id/v1\0" + "\0".join(parts).encode()).hexdigest()[:32]
