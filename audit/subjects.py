"""Use cases about one person: open what was sealed, hand it all out (GDPR Art. 15), erase it (Art. 17).

Each asks the authoriser before it looks anybody up, so that a refusal says nothing about who is known. The
log is believed over the vault: whom an entry `subject.erased` names is erased, whatever a vault from a backup
still holds, and `reconcile` makes the vault agree.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from audit._integrate import Sequenced
from audit._vault_seal import sha256_hex
from audit.access_bodies import SubjectErased, SubjectExported
from audit.checkpoints import parse_checkpoint_note
from audit.closure import BlobSource, EvidenceLog, StoredLeaf
from audit.disclosure import DisclosedPart, SealedPart, choose, roots_of, verify_disclosed, whole
from audit.entries import Entry, IndexColumns, columns_of, decode_entry, encode_entry, new_entry
from audit.errors import AuditError
from audit.evidence import Evidence, EvidenceTooLargeError, read_evidence, write_evidence
from audit.merkle import hash_leaf
from audit.principal import Authorizer, Principal, Question, require
from audit.service import best_checkpoint, export_evidence
from audit.vault import Vault
from audit.vault_key import SealBrokenError
from audit.vault_records import PERSON, Erasure, RecordMissingError

MAX_ENTRIES: Final = 9_000
NOBODY: Final = "0" * 32  # the pseudonym that a search uses for whoever is unknown
ORPHAN_AGE_S: Final = 3_600  # an append waits far less for its entry
_PAGE: Final = 500
_RESOURCE: Final = "subjects"


class NotSealedError(AuditError):
    """The entry holds nothing that the vault could open."""

    code = "vault.not_sealed"

    def __init__(self, leaf_index: int) -> None:
        super().__init__(f"leaf {leaf_index} names no person, so nothing of it is in the vault")
        self.leaf_index = leaf_index


class ErasedError(AuditError):
    """What the entry stood for was erased; the entry and its proof stay."""

    code = "vault.erased"

    def __init__(self, leaf_index: int, erasure: StoredLeaf) -> None:
        super().__init__(f"what leaf {leaf_index} stood for was erased; leaf {erasure.leaf_index} says so")
        self.leaf_index = leaf_index
        self.erasure = {"leaf_index": erasure.leaf_index, "leaf_hash": erasure.leaf_hash.hex()}


class SubjectLog(EvidenceLog, Protocol):
    """What these use cases need of a ledger."""

    def logged_events(self, event_ids: Sequence[str]) -> set[str]: ...
    def append_wait(self, entry_bytes: bytes, *, event_id: str, index_columns: IndexColumns) -> Sequenced: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """One entry with fields of it opened."""

    leaf_index: int
    entry: Entry
    parts: Mapping[str, DisclosedPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """An erasure as the log tells it."""

    subject: str
    records: int
    leaf_index: int
    leaf_hash: str
    left: str  # what still holds traces, and the remedy; empty when nothing does


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What it took to make the vault agree with the log."""

    finished: int  # erasures that a crash had cut off
    forgotten: int  # people whom the log says were erased and who were still here
    swept: int  # records whose entry never came


def find_subject(vault: Vault, principal: Principal, authorizer: Authorizer, name: str) -> str:
    """Return the pseudonym of a person.

    Raises:
        AccessDeniedError: the caller may not know.
        SubjectUnknownError: never seen, or erased.
        VaultRequestError: the id is out of form.
    """
    require(authorizer, principal, Question(action="subjects.find", resource=_RESOURCE))
    return vault.pseudonym(name)


def open_entry(
    ledger: SubjectLog,
    vault: Vault,
    principal: Principal,
    authorizer: Authorizer,
    leaf_index: int,
    fields: Iterable[str] = (),
) -> Opened:
    """Open an entry's fields, all of them where none are named; what is returned makes the entry's roots.

    Raises:
        AccessDeniedError: the caller may not.
        EntryNotFoundError, NotSealedError: there is nothing to open.
        ErasedError: it was erased; names the entry that says so.
        RecordMissingError: the vault lacks it and no erasure says why.
        SealBrokenError, DisclosureError: the vault holds something else, or no such field.
    """
    require(authorizer, principal, Question(action="subjects.open", resource=_RESOURCE))
    entry = decode_entry(ledger.entry(leaf_index))
    sealed = _sealed_parts(ledger, vault, leaf_index, entry)
    wanted = list(fields)
    parts = choose(sealed, wanted) if wanted else whole(sealed)
    verify_disclosed(entry.body, parts)
    return Opened(leaf_index=leaf_index, entry=entry, parts=parts)


def disclose(
    ledger: SubjectLog,
    vault: Vault,
    blobs: BlobSource,
    principal: Principal,
    authorizer: Authorizer,
    leaf_index: int,
    fields: Iterable[str] = (),
) -> bytes:
    """Return the evidence file of one entry with these fields opened and the others closed.

    Raises:
        AuditError: as `open_entry` and `audit.service.export_evidence`.
    """
    opened = open_entry(ledger, vault, principal, authorizer, leaf_index, fields)
    evidence = read_evidence(export_evidence(ledger, blobs, leaf_index=leaf_index))
    return write_evidence(replace(evidence, disclosed={leaf_index: opened.parts}))


def begin_export(
    ledger: SubjectLog,
    vault: Vault,
    principal: Principal,
    authorizer: Authorizer,
    name: str,
    *,
    request_id: str,
) -> SubjectExported:
    """Return the entry that records the export; append it and publish, then `build_export`.

    Raises:
        AccessDeniedError, SubjectUnknownError, VaultRequestError: as `find_subject`.
        EvidenceTooLargeError: more than a file holds.
    """
    require(authorizer, principal, Question(action="subjects.export", resource=_RESOURCE))
    pseudonym = vault.pseudonym(name)
    count = sum(1 for _ in about(ledger, pseudonym))
    if count > MAX_ENTRIES:
        raise EvidenceTooLargeError("file", f"{count} entries are about this person; at most {MAX_ENTRIES}")
    return SubjectExported(
        subject=pseudonym,
        entries=count,
        principal=principal.id,
        role=principal.role,
        request_id=request_id,
    )


def build_export(ledger: SubjectLog, vault: Vault, record_index: int) -> bytes:
    """Return the evidence file: every entry about the person, opened, under one checkpoint.

    Its subject is the entry that records the export, leaf `record_index`. An entry whose record the vault
    lacks is in the file, closed.

    Raises:
        NoCheckpointError: no checkpoint covers that entry yet.
        SealBrokenError: a record is not what was sealed.
    """
    data = ledger.entry(record_index)
    body: Any = decode_entry(data).body
    entries, disclosed = {0: ledger.entry(0), record_index: data}, {}
    for leaf in about(ledger, body.subject):
        if leaf.leaf_index >= record_index:
            break
        entries[leaf.leaf_index] = leaf.body
        entry = decode_entry(leaf.body)
        if roots_of(entry.body):
            try:
                sealed = _sealed_parts(ledger, vault, leaf.leaf_index, entry)
            except RecordMissingError:
                continue
            disclosed[leaf.leaf_index] = whole(sealed)
            verify_disclosed(entry.body, disclosed[leaf.leaf_index])
    for leaf in _search(ledger, type=("key.rotated", "log.compromise")):
        if leaf.leaf_index < record_index:
            entries[leaf.leaf_index] = leaf.body
    note = best_checkpoint(ledger, record_index)
    size = parse_checkpoint_note(note).tree_size
    return write_evidence(
        Evidence(
            scope="entry",
            leaf_index=record_index,
            leaf_hash=hash_leaf(data).hex(),
            checkpoint=note,
            entries=dict(sorted(entries.items())),
            proofs={index: tuple(ledger.inclusion_proof(index, size)) for index in sorted(entries)},
            disclosed=disclosed,
        )
    )


def erase_subject(
    ledger: SubjectLog,
    vault: Vault,
    principal: Principal,
    authorizer: Authorizer,
    name: str,
    *,
    request_id: str,
    time: str,
    kind: str = PERSON,
) -> Erased:
    """Erase a person: the vault first, in one transaction, then the entry that says so.

    The same request id again gives the same answer, and finishes what a crash cut off.

    Args:
        name: the caller's own id. request_id: goes into the log, so it names nobody. time: RFC 3339, now.
        kind: PERSON, or READER for the search terms of somebody who read the log.

    Raises:
        AccessDeniedError: the caller may not.
        SubjectUnknownError: never seen, or erased under another request id.
        VaultRequestError: an id is out of form.
        LedgerBusyError and its kin: the entry is not written yet; erased it is. Ask again.
    """
    require(authorizer, principal, Question(action="subjects.erase", resource=_RESOURCE))

    def leaf(pseudonym: str, records: int) -> tuple[str, bytes]:
        body = SubjectErased(
            subject=pseudonym,
            records=records,
            principal=principal.id,
            role=principal.role,
            request_id=request_id,
        )
        entry = new_entry(body, actor="vault", time=time)
        return entry.event_id, encode_entry(entry)

    return _finish(ledger, vault, vault.erase(name, request_id=request_id, leaf=leaf, kind=kind))


def reconcile(ledger: SubjectLog, vault: Vault, *, before: str) -> Reconciled:
    """Finish erasures that were cut off, apply the log's to this vault, sweep records without an entry.

    Args:
        before: RFC 3339; only records sealed before this may be swept, because their entry may still come.

    Raises:
        AuditError: the log or the vault cannot be read or written.
    """
    pending = vault.pending()
    for erasure in pending:
        _finish(ledger, vault, erasure)
    start, size, gone = vault.erased_until, ledger.tree_size, []
    for leaf in _search(ledger, type="subject.erased", after=start - 1):
        body: Any = decode_entry(leaf.body).body
        gone.append(body.subject)
    forgotten = vault.forget(gone, until=size) if gone or size != start else 0
    swept = vault.sweep(ledger.logged_events, before=before)
    return Reconciled(finished=len(pending), forgotten=forgotten, swept=swept)


def about(ledger: EvidenceLog, pseudonym: str) -> Iterator[StoredLeaf]:
    """Yield every entry about a person, in log order."""
    return _search(ledger, subject=pseudonym)


def erasure_for(ledger: EvidenceLog, pseudonym: str) -> StoredLeaf | None:
    """Return the entry that says this pseudonym was erased."""
    found = ledger.search(type="subject.erased", subject=pseudonym, limit=1)
    return found[0] if found else None


def _finish(ledger: SubjectLog, vault: Vault, erasure: Erasure) -> Erased:
    left = "" if erasure.scrubbed else vault.scrub().left
    sequenced = ledger.append_wait(
        erasure.entry, event_id=erasure.event_id, index_columns=columns_of(erasure.entry)
    )
    vault.settle(erasure.request_id, sequenced.leaf_index)
    return Erased(
        subject=erasure.pseudonym,
        records=erasure.records,
        leaf_index=sequenced.leaf_index,
        leaf_hash=sequenced.leaf_hash.hex(),
        left=left,
    )


def _sealed_parts(ledger: SubjectLog, vault: Vault, leaf_index: int, entry: Entry) -> dict[str, SealedPart]:
    body: Any = entry.body
    if not roots_of(body):
        raise NotSealedError(leaf_index)
    erasure = erasure_for(ledger, body.subject)
    if erasure is not None:
        raise ErasedError(leaf_index, erasure)
    record = vault.record(entry.event_id)
    if record is None:
        raise RecordMissingError(
            f"the vault lacks the record of leaf {leaf_index}, and no erasure says why: restore the vault"
        )
    if not hmac.compare_digest(sha256_hex(record.ciphertext), body.sealed):
        raise SealBrokenError(f"the vault's record for leaf {leaf_index} is not the one that the leaf names")
    return vault.parts(entry.event_id, type=entry.type, pseudonym=body.subject)


def _search(ledger: EvidenceLog, *, after: int | None = None, **columns: Any) -> Iterator[StoredLeaf]:
    while rows := ledger.search(**columns, after=after, limit=_PAGE):
        yield from rows
        if len(rows) < _PAGE:
            return
        after = rows[-1].leaf_index
