"""C2SP checkpoints: a log's name, size and root as a signed note, cosigned by witnesses.

`sign_checkpoint` is the log's act, `cosign` a witness's, `open_checkpoint` the reader's. Extension lines are
refused, because implementations disagree on whether a cosignature covers them; whatever else must be said is
an entry.

Source: C2SP tlog-checkpoint v1.0.0 and tlog-cosignature v1.0.1.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from audit.errors import KeyFormatError, MalformedCheckpointError, MalformedNoteError, OriginMismatchError
from audit.merkle import EMPTY_ROOT, HASH_SIZE, MAX_TREE_SIZE
from audit.notes import (
    MAX_NOTE_BYTES,
    MAX_SIGNATURES,
    KeyType,
    NoteSigner,
    NoteVerifier,
    SignatureLine,
    VerifiedSignature,
    check_key_name,
    open_note,
    parse_note,
    sign_note,
)

MAX_FUTURE_S = 300

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A log's claim: under this name, this many entries have this root."""

    origin: str
    tree_size: int
    root_hash: bytes  # 32 bytes

    def __post_init__(self) -> None:
        try:
            check_key_name(self.origin)
        except KeyFormatError as error:
            raise MalformedCheckpointError(f"origin {self.origin!r} cannot name a log's key") from error
        if not 0 <= self.tree_size <= MAX_TREE_SIZE or len(self.root_hash) != HASH_SIZE:
            raise MalformedCheckpointError(f"size {self.tree_size} or its root is out of range")
        if self.tree_size == 0 and self.root_hash != EMPTY_ROOT:
            raise MalformedCheckpointError("an empty tree has the root SHA-256 of nothing")

    def body(self) -> bytes:
        """Return the three lines that are signed."""
        return f"{self.origin}\n{self.tree_size}\n{base64.b64encode(self.root_hash).decode()}\n".encode()

    @classmethod
    def parse(cls, body: bytes) -> Checkpoint:
        """Read exactly the three lines `body` writes.

        Raises:
            MalformedCheckpointError: other lines, a size or root not in canonical form, or extension lines.
        """
        try:
            lines = body.decode().split("\n")
        except UnicodeDecodeError as error:
            raise MalformedCheckpointError("a checkpoint is UTF-8") from error
        if len(lines) != 4 or lines[3]:
            raise MalformedCheckpointError(
                "a checkpoint has three lines: origin, size, root; extensions are refused"
            )
        if not _SIZE.fullmatch(lines[1]):
            raise MalformedCheckpointError(f"tree size is not canonical: {lines[1][:40]!r}")
        try:
            root_hash = base64.b64decode(lines[2], validate=True)
        except ValueError as error:
            raise MalformedCheckpointError(f"root is not base64: {lines[2][:60]!r}") from error
        checkpoint = cls(lines[0], int(lines[1]), root_hash)
        if checkpoint.body() != body:
            raise MalformedCheckpointError("the checkpoint is not in canonical form")
        return checkpoint


@dataclass(frozen=True, slots=True)
class Cosignature:
    verifier: NoteVerifier
    timestamp: int  # POSIX seconds: "as of then, the largest consistent tree I have seen"

    @property
    def name(self) -> str:
        return self.verifier.name


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """What `open_checkpoint` proved: the log signed it, and these witnesses did too."""

    checkpoint: Checkpoint
    cosignatures: tuple[Cosignature, ...]
    from_the_future: tuple[Cosignature, ...]  # valid, but dated beyond the reader's clock: never counted
    note: bytes
    log_keys: tuple[NoteVerifier, ...] = ()  # those of the log's keys that signed


def sign_checkpoint(checkpoint: Checkpoint, signer: NoteSigner) -> bytes:
    """Return the checkpoint as a note signed by the log.

    Raises:
        OriginMismatchError: the signer bears another name than the log.
        KeyFormatError: the signer is of cosigner type.
    """
    if signer.name != checkpoint.origin:
        raise OriginMismatchError(expected=signer.name, found=checkpoint.origin)
    if signer.kind is not KeyType.ED25519:
        raise KeyFormatError("a log signs checkpoints with a key of type 0x01")
    return sign_note(checkpoint.body(), signer)


def cosign(note: bytes, signer: NoteSigner, timestamp: int) -> bytes:
    """Return a witness's signature line over the note's text. Checks nothing: `audit.witness` decides.

    Raises:
        MalformedNoteError, MalformedCheckpointError: the note is no checkpoint.
        KeyFormatError: the signer is not of cosigner type.
    """
    if signer.kind is not KeyType.COSIGNATURE:
        raise KeyFormatError("a witness cosigns with a key of type 0x04")
    text = parse_note(note).text
    Checkpoint.parse(text)
    return signer.line(text, timestamp)


def add_signatures(note: bytes, lines: Iterable[bytes]) -> bytes:
    """Return the note with `lines` added; a line replaces an earlier one of the same name and key id.

    Raises:
        MalformedNoteError: the note or a line is malformed, or the result is over the caps.
    """
    parsed = parse_note(note)
    merged = {(line.name, line.key_id): line for line in parsed.signatures}
    for raw in lines:
        line = SignatureLine.parse(raw)
        merged[line.name, line.key_id] = line
    joined = parsed.text + b"\n" + b"".join(line.format() for line in merged.values())
    if len(merged) > MAX_SIGNATURES or len(joined) > MAX_NOTE_BYTES:
        raise MalformedNoteError("the note would be over the caps on signatures or bytes")
    return joined


@lru_cache(maxsize=16)
def parse_checkpoint_note(note: bytes) -> Checkpoint:
    """Read a note's checkpoint without believing any signature."""
    return Checkpoint.parse(parse_note(note).text)


def open_checkpoint(
    note: bytes,
    *,
    log: NoteVerifier | Sequence[NoteVerifier],
    witnesses: Iterable[NoteVerifier] = (),
    now: int,
    max_future_s: int = MAX_FUTURE_S,
) -> OpenedCheckpoint:
    """Prove that the log signed a checkpoint and find which witnesses cosigned it.

    `log` is the log's key, or its keys while one takes over from another: one signature suffices.
    `now` is the reader's clock, POSIX seconds: a cosignature more than `max_future_s` ahead is not counted.

    Raises:
        MalformedNoteError, MalformedCheckpointError: the note is no checkpoint.
        OriginMismatchError: it is another log's.
        NoKnownSignatureError: the log has not signed it.
        BadSignatureError: a line by the log or by a known witness does not verify.
    """
    witness_keys = tuple(witnesses)
    log_keys = (log,) if isinstance(log, NoteVerifier) else tuple(log)
    checkpoint = parse_checkpoint_note(note)
    for key in log_keys:
        if checkpoint.origin != key.name:
            raise OriginMismatchError(expected=key.name, found=checkpoint.origin)
    signed = tuple(signature.verifier for signature in open_note(note, log_keys).signatures)
    signatures = open_note(note, [*log_keys, *witness_keys]).signatures if witness_keys else ()
    latest: dict[NoteVerifier, Cosignature] = {}
    future: list[Cosignature] = []
    for cosignature in _cosignatures(signatures):
        if cosignature.timestamp > now + max_future_s:
            future.append(cosignature)
        elif cosignature.timestamp >= latest.get(cosignature.verifier, cosignature).timestamp:
            latest[cosignature.verifier] = cosignature
    return OpenedCheckpoint(checkpoint, tuple(latest.values()), tuple(future), note, signed)


def _cosignatures(signatures: Iterable[VerifiedSignature]) -> list[Cosignature]:
    return [Cosignature(s.verifier, s.timestamp) for s in signatures if s.timestamp is not None]
