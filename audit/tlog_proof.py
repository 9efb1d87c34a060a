"""C2SP tlog-proof v1: one text file that proves an entry offline.

c2sp.org/tlog-proof@v1
[extra <base64>]          not authenticated
index <n>
<base64 hash>...          leaf's sibling first
<empty line>
<checkpoint note with cosignatures>
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from audit.checkpoints import parse_checkpoint_note
from audit.errors import AuditError, MalformedProofError
from audit.merkle import HASH_SIZE, MAX_TREE_SIZE, verify_inclusion
from audit.notes import MAX_NOTE_BYTES
from audit.tlog_policy import AcceptedCheckpoint

HEADER = "c2sp.org/tlog-proof@v1"
MAX_HASHES = 63
MAX_EXTRA_BYTES = 1 << 16

_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})")
_LINE = 44  # characters of a hash


@dataclass(frozen=True, slots=True, kw_only=True)
class TlogProof:
    leaf_index: int
    hashes: tuple[bytes, ...]  # 32 bytes each
    checkpoint_note: bytes
    extra: bytes | None = None  # not authenticated: never act on it

    def __post_init__(self) -> None:
        if not 0 <= self.leaf_index < MAX_TREE_SIZE or len(self.hashes) > MAX_HASHES:
            raise MalformedProofError(
                f"index {self.leaf_index} or {len(self.hashes)} hashes are out of range"
            )
        if any(len(item) != HASH_SIZE for item in self.hashes):
            raise MalformedProofError("a proof hash is not 32 bytes")
        if self.extra is not None and not 0 < len(self.extra) <= MAX_EXTRA_BYTES:
            raise MalformedProofError(f"extra data has 1 to {MAX_EXTRA_BYTES} bytes")

    def format(self) -> bytes:
        lines = [HEADER]
        if self.extra is not None:
            lines.append("extra " + base64.b64encode(self.extra).decode())
        lines.append(f"index {self.leaf_index}")
        lines += [base64.b64encode(item).decode() for item in self.hashes]
        return "\n".join([*lines, "", ""]).encode() + self.checkpoint_note

    @classmethod
    def parse(cls, data: bytes) -> TlogProof:
        """Read a proof and its checkpoint's form, believing nothing yet.

        Raises:
            MalformedProofError: another form, or over the caps.
        """
        head, separator, note = data.partition(b"\n\n")
        if not separator or len(note) > MAX_NOTE_BYTES or len(head) > 2 * MAX_EXTRA_BYTES:
            raise MalformedProofError("a proof has a head, an empty line and a checkpoint, within the caps")
        try:
            lines = head.decode("ascii").split("\n")
        except UnicodeDecodeError as error:
            raise MalformedProofError("a proof's head is ASCII") from error
        if lines.pop(0) != HEADER:
            raise MalformedProofError(f"the first line is not {HEADER!r}")
        extra = None
        if lines and lines[0].startswith("extra "):
            extra = _decode(lines.pop(0)[len("extra ") :])
        found = _INDEX.fullmatch(lines.pop(0)) if lines else None
        if not found:
            raise MalformedProofError("the line 'index <n>' is missing or not canonical")
        if len(lines) > MAX_HASHES:
            raise MalformedProofError(f"{len(lines)} hashes are over the cap of {MAX_HASHES}")
        try:
            parse_checkpoint_note(note)
        except AuditError as error:
            raise MalformedProofError(f"the proof's checkpoint is malformed: {error}") from error
        hashes = tuple([_decode_hash(line) if len(line) == _LINE else _decode(line) for line in lines])
        return cls(leaf_index=int(found[1]), hashes=hashes, checkpoint_note=note, extra=extra)


class Opener(Protocol):
    """What decides about a checkpoint: a `Policy`, or something that remembers what one said."""

    def open(self, note: bytes, *, now: int) -> AcceptedCheckpoint: ...


def verify_tlog_proof(proof: TlogProof, *, leaf_hash: bytes, policy: Opener, now: int) -> AcceptedCheckpoint:
    """Prove that `leaf_hash` is the entry at the proof's index of a log the policy believes.

    Returns:
        The checkpoint with its quorum; an unsatisfied quorum is reported, not raised.

    Raises:
        ProofError: the entry is not there.
        AuditError: as `Policy.open`.
    """
    accepted = policy.open(proof.checkpoint_note, now=now)
    verify_inclusion(
        leaf_index=proof.leaf_index,
        tree_size=accepted.opened.checkpoint.tree_size,
        leaf_hash=leaf_hash,
        proof=proof.hashes,
        root_hash=accepted.opened.checkpoint.root_hash,
    )
    return accepted


@lru_cache(maxsize=1024)
def _decode_hash(text: str) -> bytes:
    """As `_decode`: proofs of leaves that lie together share most of their hashes."""
    return _decode(text)


def _decode(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MalformedProofError(f"not base64: {text[:60]!r}") from error
    if base64.b64encode(raw).decode() != text:
        raise MalformedProofError(f"not canonical base64: {text[:60]!r}")
    return raw
