"""What goes into the vault and comes out of it, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from audit._store import blob
from audit.disclosure import SealedPart
from audit.errors import AuditError
from audit.vault_tables import SCRUBBED

PERSON, READER = "person", "reader"
MAX_NAME_BYTES: Final = 512
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SubjectUnknownError(AuditError):
    """No such person here: never seen, or erased. Nobody can tell which, and that is the point."""

    code = "vault.subject_unknown"

    def __init__(self) -> None:
        super().__init__(
            "no such subject: never seen here, or erased; after an erasure nobody can tell which"
        )


class RecordMissingError(AuditError):
    """The vault has no record for this entry."""

    code = "vault.record_missing"


class VaultRequestError(AuditError):
    """A subject's id or a request's id is out of form."""

    code = "vault.request"


@dataclass(frozen=True, slots=True, kw_only=True)
class SealRequest:
    """What to seal for one entry that is about to be appended."""

    kind: str  # PERSON or READER: two name spaces
    name: str  # the caller's own id for the person
    event_id: str
    type: str
    time: str
    parts: Mapping[str, SealedPart]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What the leaf may say of it."""

    pseudonym: str
    digest: str  # hex SHA-256 of the ciphertext


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was sealed for one entry, still sealed."""

    event_id: str
    pseudonym: str
    type: str
    ciphertext: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """One erasure: done in the vault; in the log when `leaf_index` is known."""

    request_id: str
    pseudonym: str
    records: int
    event_id: str
    entry: bytes
    leaf_index: int | None
    scrubbed: bool


def check_name(name: str) -> None:
    """Check the caller's own id for a person.

    Raises:
        VaultRequestError: it is empty, too long, or no text.
    """
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise VaultRequestError("subject: is not Unicode text") from error
    if not 0 < size <= MAX_NAME_BYTES or "\0" in name:
        raise VaultRequestError(f"subject: give 1 to {MAX_NAME_BYTES} bytes of text without U+0000")


def check_request_id(text: str) -> None:
    """Check the id of whoever asks for an erasure; it goes into the log, so it must name nobody.

    Raises:
        VaultRequestError: it is out of form.
    """
    if not _REQUEST_ID.fullmatch(text):
        raise VaultRequestError("request_id: 1 to 64 letters, digits, '.', '_' or '-', and no name")


def record_of(row: Any) -> Record:
    return Record(
        event_id=row.event_id,
        pseudonym=row.pseudonym,
        type=row.type,
        ciphertext=blob(row.ciphertext, "vault_record.ciphertext"),
    )


def erasure_of(row: Any) -> Erasure:
    return Erasure(
        request_id=row.request_id,
        pseudonym=row.pseudonym,
        records=row.records,
        event_id=row.event_id,
        entry=blob(row.entry, "vault_erasure.entry"),
        leaf_index=row.leaf_index,
        scrubbed=row.scrubbed == SCRUBBED,
    )
