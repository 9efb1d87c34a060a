"""What the vault's ciphertexts hold, and the place that each of them is bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from audit.canonical import canonical_bytes, parse_canonical
from audit.commitments import SALT_SIZE
from audit.disclosure import SealedPart
from audit.errors import AuditError
from audit.vault_key import SealBrokenError

_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Places:
    """The additional data of each ciphertext of one log's vault: moved elsewhere, it does not open."""

    origin: str

    def key(self, pseudonym: str) -> bytes:
        return canonical_bytes({"what": "key", "origin": self.origin, "subject": pseudonym})

    def identity(self, pseudonym: str) -> bytes:
        return canonical_bytes({"what": "id", "origin": self.origin, "subject": pseudonym})

    def record(self, event_id: str, type: str, pseudonym: str) -> bytes:
        place = {"event_id": event_id, "origin": self.origin, "subject": pseudonym, "type": type}
        return canonical_bytes({"what": "record", **place})


def encode_parts(parts: Mapping[str, SealedPart]) -> bytes:
    """Return the plaintext of a record."""
    found: dict[str, Any] = {
        name: {"salt": part.salt.hex(), "values": dict(part.values)} for name, part in parts.items()
    }
    return canonical_bytes({"v": _VERSION, "parts": found})


def parse_parts(data: bytes) -> dict[str, SealedPart]:
    """Read the plaintext of a record.

    Raises:
        SealBrokenError: it is none of this release.
    """
    try:
        document: Any = parse_canonical(data)
        if document["v"] != _VERSION:
            raise SealBrokenError(f"the record is of version {document['v']!r}, not of this release")
        parts = {
            name: SealedPart(bytes.fromhex(part["salt"]), part["values"])
            for name, part in document["parts"].items()
        }
    except (AuditError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SealBrokenError(f"the record cannot be read: {error}") from error
    if any(len(part.salt) != SALT_SIZE for part in parts.values()):
        raise SealBrokenError("a salt of the record is of another length")
    return parts


def encode_identity(kind: str, name: str) -> bytes:
    return canonical_bytes({"kind": kind, "name": name})


def parse_identity(data: bytes) -> tuple[str, str]:
    document: Any = parse_canonical(data)
    return document["kind"], document["name"]


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
