"""A witness: cosigns a log's checkpoint only if it extends the one it cosigned last.

The state is durable before the cosignature is returned, so a crash can lose a cosignature but never lets the
witness vouch for two histories. Every refusal carries the HTTP status of the C2SP tlog-witness protocol.

Source: C2SP tlog-witness v1.0.0, "add-checkpoint".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from audit._files import locked, write_durably
from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import MAX_FUTURE_S, Checkpoint, cosign, parse_checkpoint_note
from audit.errors import (
    AuditError,
    KeyFormatError,
    ProofError,
    WitnessClockError,
    WitnessConflictError,
    WitnessError,
    WitnessProofError,
    WitnessRequestError,
    WitnessSignatureError,
    WitnessStateError,
    WitnessUnknownOriginError,
)
from audit.merkle import EMPTY_ROOT, verify_consistency
from audit.notes import KeyType, NoteSigner, NoteVerifier, open_note

Log = NoteVerifier | str | Sequence[NoteVerifier]

MAX_PROOF_HASHES = 63
LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class WitnessState:
    """The largest tree cosigned; `note` is None and the size 0 before the first."""

    checkpoint: Checkpoint
    note: bytes | None  # as the log signed it: half of a proof of misbehaviour, should one be needed
    timestamp: int  # POSIX seconds of the last cosignature

    def encode(self) -> bytes:
        return canonical_bytes(
            {
                "origin": self.checkpoint.origin,
                "tree_size": self.checkpoint.tree_size,
                "root_hash": self.checkpoint.root_hash.hex(),
                "note": "" if self.note is None else self.note.decode(),
                "timestamp": self.timestamp,
            }
        )


class Witness:
    """One witness of one log: `create` once, then construct. A lost state is never taken for a new start."""

    def __init__(self, path: Path | str, key: NoteSigner, log: Log) -> None:
        """Open the state at `path`. `log` is the log's key; several while one takes over from another.

        Raises:
            WitnessStateError: it is missing, damaged, or another log's.
            KeyFormatError: `key` is not of cosigner type, or `log` not the vkeys of one log.
        """
        self.path = Path(path)
        self.key = key
        self.log_keys = _keys_of(log)
        self.log = self.log_keys[0]
        if key.kind is not KeyType.COSIGNATURE:
            raise KeyFormatError("a witness has a key of type 0x04")
        self.state()

    @classmethod
    def create(cls, path: Path | str, key: NoteSigner, log: Log) -> Witness:
        """Write the state of a witness that has seen nothing yet.

        Raises:
            WitnessStateError: there is a state already, or it cannot be written.
        """
        origin = _keys_of(log)[0].name
        state = WitnessState(Checkpoint(origin, 0, EMPTY_ROOT), None, 0)
        try:
            write_durably(Path(path), state.encode(), replace=False)
        except FileExistsError as error:
            raise WitnessStateError(f"{path} exists already; a witness never starts over") from error
        except OSError as error:
            raise WitnessStateError(f"cannot write {path}: {error.strerror}") from error
        return cls(path, key, log)

    @property
    def vkey(self) -> str:
        """The witness's key for a policy's line."""
        return self.key.vkey

    @property
    def tree_size(self) -> int:
        """The size of the largest tree cosigned: where the next request's proof must start."""
        return self.state().checkpoint.tree_size

    def state(self) -> WitnessState:
        """Return the state on disk; raises `WitnessStateError`."""
        state = _read_state(self.path)
        if state.checkpoint.origin != self.log.name:
            raise WitnessStateError(
                f"{self.path} is of log {state.checkpoint.origin!r}, not {self.log.name!r}"
            )
        return state

    def cosign(self, note: bytes, old_size: int, consistency_proof: Sequence[bytes], now: int) -> bytes:
        """Return this witness's signature line for a checkpoint that extends the last one.

        `old_size` is the recorded size the proof starts from; `now` is POSIX seconds. The size seen last
        with the same root is cosigned again with a fresh time.

        Raises:
            WitnessRequestError: the note, sizes or proof are malformed (400).
            WitnessUnknownOriginError: another log's (404).
            WitnessSignatureError: the log's signature is missing or fails (403).
            WitnessConflictError: `old_size` is not the recorded size (409).
            WitnessProofError: the checkpoint does not extend the recorded one (422).
            WitnessStateError, WitnessClockError: this witness cannot act (500).
        """
        try:
            checkpoint = parse_checkpoint_note(note)
        except AuditError as error:
            raise WitnessRequestError(f"not a checkpoint: {error}") from error
        if checkpoint.origin != self.log.name:
            raise WitnessUnknownOriginError(
                f"this witness follows {self.log.name!r}, not {checkpoint.origin!r}"
            )
        try:
            open_note(note, self.log_keys)
        except AuditError as error:
            raise WitnessSignatureError(f"the log has not signed this checkpoint: {error}") from error
        if not 0 <= old_size <= checkpoint.tree_size or len(consistency_proof) > MAX_PROOF_HASHES:
            raise WitnessRequestError(
                f"old size {old_size} is not within 0 to {checkpoint.tree_size}, or the proof is too long"
            )
        with self._locked():
            return self._cosign(note, checkpoint, old_size, consistency_proof, now)

    def _cosign(
        self, note: bytes, checkpoint: Checkpoint, old_size: int, proof: Sequence[bytes], now: int
    ) -> bytes:
        state = self.state()
        seen = state.checkpoint
        if old_size != seen.tree_size:
            raise WitnessConflictError(recorded_size=seen.tree_size, old_size=old_size)
        try:
            if old_size:
                verify_consistency(
                    size1=old_size,
                    size2=checkpoint.tree_size,
                    root1=seen.root_hash,
                    root2=checkpoint.root_hash,
                    proof=proof,
                )
            elif proof:
                raise WitnessProofError(
                    "a proof from size 0 is empty", seen_note=state.note, offered_note=note
                )
        except ProofError as error:
            raise WitnessProofError(
                f"the checkpoint of size {checkpoint.tree_size} does not extend size {old_size}: {error}",
                seen_note=state.note,
                offered_note=note,
            ) from error
        if now < state.timestamp - MAX_FUTURE_S or now < 0:
            raise WitnessClockError(
                f"this clock says {now}, the last cosignature {state.timestamp}; set the clock right"
            )
        timestamp = max(now, state.timestamp)
        line = cosign(note, self.key, timestamp)
        self._keep(WitnessState(checkpoint, note, timestamp))
        return line

    def _keep(self, state: WitnessState) -> None:
        try:
            write_durably(self.path, state.encode())
        except OSError as error:
            raise WitnessStateError(f"cannot write {self.path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.path.with_name(f".{self.path.name}.lock"), LOCK_TIMEOUT_S):
                yield
        except TimeoutError as error:
            raise WitnessStateError(f"another process is cosigning with {self.path}") from error


def status_of(error: WitnessError) -> tuple[int, str, bytes]:
    """Return the HTTP status, content type and body that the protocol gives an error."""
    if isinstance(error, WitnessConflictError):
        return error.status, "text/x.tlog.size", b"%d\n" % error.recorded_size
    return error.status, "text/plain; charset=utf-8", f"{error}\n".encode()


def _keys_of(log: Log) -> tuple[NoteVerifier, ...]:
    """The keys of one log, at least one."""
    if isinstance(log, str):
        log = NoteVerifier.parse(log)
    keys = (log,) if isinstance(log, NoteVerifier) else tuple(log)
    if not keys or len({key.name for key in keys}) != 1 or any(k.kind is not KeyType.ED25519 for k in keys):
        raise KeyFormatError("a witness follows one log, whose keys are of type 0x01")
    return keys


def _read_state(path: Path) -> WitnessState:
    try:
        match parse_canonical(path.read_bytes()):
            case {
                "origin": str(origin),
                "tree_size": int(size),
                "root_hash": str(root),
                "note": str(note),
                "timestamp": int(timestamp),
                **others,
            } if not others and timestamp >= 0 and bool(note) >= bool(size):
                seen = Checkpoint(origin, size, bytes.fromhex(root))
                if note and parse_checkpoint_note(note.encode()) != seen:
                    raise WitnessStateError(f"{path} contradicts the note it holds")
                return WitnessState(seen, note.encode() if note else None, timestamp)
        raise WitnessStateError(f"{path} is not a witness's state")
    except OSError as error:
        raise WitnessStateError(
            f"cannot read {path}: {error.strerror}; never replace it by a new one"
        ) from error
    except WitnessStateError:
        raise
    except (AuditError, ValueError) as error:
        raise WitnessStateError(f"{path} is damaged: {error}") from error
