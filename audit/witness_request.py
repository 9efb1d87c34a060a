"""The body of C2SP tlog-witness `add-checkpoint`, written and read in its only form.

old <size>
<base64 hash>...      the consistency proof from there, at most 63
<empty line>
<the checkpoint, a signed note>
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Final

from audit.errors import WitnessRequestError
from audit.merkle import HASH_SIZE, MAX_TREE_SIZE
from audit.notes import MAX_NOTE_BYTES
from audit.witness import MAX_PROOF_HASHES

MAX_REQUEST_BYTES: Final = MAX_NOTE_BYTES + 4096

_OLD = re.compile(rb"old (0|[1-9][0-9]{0,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddCheckpoint:
    """One request; nothing in it is believed yet."""

    old_size: int
    proof: tuple[bytes, ...]  # 32 bytes each
    note: bytes

    def format(self) -> bytes:
        lines = [b"old %d" % self.old_size, *(base64.b64encode(item) for item in self.proof), b"", b""]
        return b"\n".join(lines) + self.note

    @classmethod
    def parse(cls, body: bytes) -> AddCheckpoint:
        """Read a request's body.

        Raises:
            WitnessRequestError: another form, or over the caps (400).
        """
        if len(body) > MAX_REQUEST_BYTES:
            raise WitnessRequestError(f"a request has at most {MAX_REQUEST_BYTES} bytes")
        head, separator, note = body.partition(b"\n\n")
        lines = head.split(b"\n", MAX_PROOF_HASHES + 1)
        found = _OLD.fullmatch(lines[0])
        if not separator or not found or int(found[1]) > MAX_TREE_SIZE:
            raise WitnessRequestError(
                "a request begins with 'old <size>' and has an empty line before the note"
            )
        if len(lines) > MAX_PROOF_HASHES + 1:
            raise WitnessRequestError(f"a proof has at most {MAX_PROOF_HASHES} hashes")
        return cls(old_size=int(found[1]), proof=tuple(_hash(line) for line in lines[1:]), note=note)


def monitoring_name(origin: str) -> str:
    """Return the hex SHA-256 under which a witness shows its last checkpoint of a log."""
    return hashlib.sha256(origin.encode()).hexdigest()


def _hash(line: bytes) -> bytes:
    try:
        raw = base64.b64decode(line, validate=True)
    except ValueError as error:
        raise WitnessRequestError("a proof line is not base64") from error
    if len(raw) != HASH_SIZE or base64.b64encode(raw) != line:
        raise WitnessRequestError("a proof line is not the base64 of 32 bytes")
    return raw
