"""Salted commitments and random pseudonyms: how a leaf speaks of a value it must not hold.

A commitment's salt is fresh for each field of each event and lives outside the log; without it neither a
low-entropy value can be guessed nor two equal values be linked. Giving someone (salt, value) opens exactly
that commitment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from functools import lru_cache

from audit.chance import PIECE, piece
from audit.errors import CommitmentError

SALT_SIZE = PIECE

_FIELD = re.compile(r"[a-z][a-z0-9_.]{0,63}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


def new_salt() -> bytes:
    return piece()  # of `SALT_SIZE` bytes


def new_pseudonym() -> str:
    """Return 128 random bits in hex; its mapping to a person is kept, and erased, elsewhere."""
    return secrets.token_hex(16)


def commit(field: str, salt: bytes, value: bytes) -> str:
    """Return hex SHA-256("affidavit/commit/v1" 0x00 field 0x00 salt value).

    Raises:
        CommitmentError: the field's name or the salt's length is out of form.
    """
    begun = _begun(field)
    if len(salt) != SALT_SIZE:
        raise CommitmentError(f"the salt of {field!r} has {len(salt)} bytes, not {SALT_SIZE}")
    return hashlib.sha256(begun + salt + value).hexdigest()


@lru_cache(maxsize=256)
def _begun(field: str) -> bytes:
    if not _FIELD.fullmatch(field):
        raise CommitmentError(f"field {field[:80]!r} is not a lower-case name of at most 64 characters")
    return b"affidavit/commit/v1\x00" + field.encode() + b"\x00"


def parse_salt(text: str) -> bytes:
    """Return the salt that lower-case hex digits write, and no other text does.

    Raises:
        CommitmentError: it is none; `bytes.fromhex` alone takes capitals and spaces too.
    """
    if not _HEX64.fullmatch(text):
        raise CommitmentError(f"a salt is {2 * SALT_SIZE} lower-case hex digits")
    return bytes.fromhex(text)


def verify_opening(commitment: str, *, field: str, salt: bytes, value: bytes) -> None:
    """Prove that `commitment` was made from this field, salt and value.

    Raises:
        CommitmentError: it was not.
    """
    if not _HEX64.fullmatch(commitment):
        raise CommitmentError(f"the commitment of {field!r} is not a lower-case hex SHA-256")
    if not hmac.compare_digest(commit(field, salt, value), commitment):
        raise CommitmentError(f"salt and value do not open the commitment of {field!r}")
