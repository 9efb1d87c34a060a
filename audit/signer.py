"""The log's signer: signs a tree only if it provably extends the one signed last.

The key and the last signed tree live in a home of their own, outside the database, so that an old backup,
a bug or a database administrator cannot make the log sign two histories. The home is locked during one
signature and its state read inside the lock, so several processes may sign through one home. The operator,
who holds the home too, is answered by witnesses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from audit._files import locked, write_durably
from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import Checkpoint, parse_checkpoint_note, sign_checkpoint
from audit.errors import (
    AuditError,
    ProofError,
    SignerBusyError,
    SignerExistsError,
    SignerMissingError,
    SignerRewriteError,
    SignerRollbackError,
    SignerSplitError,
    SignerStateError,
)
from audit.keys import SigningKey
from audit.merkle import EMPTY_ROOT, CompactRange, verify_consistency
from audit.notes import NoteSigner, NoteVerifier, open_note

KEY_FILE = "key.pem"
STATE_FILE = "state.json"
LOCK_TIMEOUT_S = 10.0

Prover = Callable[[int], Sequence[bytes]]


class SignableLog(Protocol):
    """What `publish` needs of a ledger."""

    @property
    def origin(self) -> str: ...
    def edge(self) -> CompactRange: ...
    def consistency_proof(self, size1: int, size2: int) -> list[bytes]: ...
    def store_checkpoint(self, note: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SignerState:
    """The tree signed last; `note` is None before the first signature."""

    checkpoint: Checkpoint
    note: bytes | None

    def encode(self) -> bytes:
        return canonical_bytes(
            {
                "origin": self.checkpoint.origin,
                "tree_size": self.checkpoint.tree_size,
                "root_hash": self.checkpoint.root_hash.hex(),
                "note": "" if self.note is None else self.note.decode(),
            }
        )


class Signer:
    """Made by `create` once for a log's life; `open`ed by every process that publishes."""

    def __init__(self, home: Path, key: SigningKey, origin: str) -> None:
        self.home, self.key, self.origin = home, key, origin
        self.note_signer = NoteSigner(origin, key)

    @classmethod
    def create(cls, home: Path | str, origin: str, passphrase: bytes | None = None) -> Signer:
        """Make a key and an empty state for a new log.

        Raises:
            SignerExistsError: the home holds a key or state already.
            SignerMissingError: the home cannot be made.
        """
        home = Path(home)
        state = SignerState(Checkpoint(origin, 0, EMPTY_ROOT), None)
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (home / KEY_FILE).exists():
                raise SignerExistsError(f"{home} holds a signer already; a log keeps its signer for life")
            write_durably(home / STATE_FILE, state.encode(), replace=False)
        except FileExistsError as error:
            raise SignerExistsError(
                f"{home} holds a signer already; a log keeps its signer for life"
            ) from error
        except OSError as error:
            raise SignerMissingError(f"cannot make a signer in {home}: {error.strerror}") from error
        SigningKey.generate().save(home / KEY_FILE, passphrase)
        return cls.open(home, passphrase)

    @classmethod
    def open(cls, home: Path | str, passphrase: bytes | None = None) -> Signer:
        """Open a signer's home.

        Raises:
            SignerMissingError: there is none.
            SignerStateError: the state is missing or damaged; it is never replaced by an empty one.
            KeyFileError: the key cannot be read.
        """
        home = Path(home)
        if not (home / KEY_FILE).is_file():
            raise SignerMissingError(f"no signer in {home}: {KEY_FILE} is missing")
        signer = cls(home, SigningKey.load(home / KEY_FILE, passphrase), _read_origin(home))
        signer.state()
        return signer

    @property
    def verifier(self) -> NoteVerifier:
        return self.note_signer.verifier

    @property
    def vkey(self) -> str:
        """The log's line in a policy."""
        return self.note_signer.vkey

    def state(self) -> SignerState:
        """Return what was signed last; raises `SignerStateError` when the file is damaged."""
        state = _read_state(self.home)
        if state.checkpoint.origin != self.origin:
            raise SignerStateError(f"{self.home} changed its log from {self.origin!r}")
        if state.note is not None:
            try:
                open_note(state.note, [self.verifier])
                matches = parse_checkpoint_note(state.note) == state.checkpoint
            except AuditError as error:
                raise SignerStateError(
                    f"the note in {self.home / STATE_FILE} is not ours: {error}"
                ) from error
            if not matches:
                raise SignerStateError(f"{self.home / STATE_FILE} contradicts the note it holds")
        elif state.checkpoint.tree_size:
            raise SignerStateError(f"{self.home / STATE_FILE} names a tree but lacks its note")
        return state

    def sign(self, tree_size: int, root_hash: bytes, consistency_proof: Sequence[bytes] | Prover) -> bytes:
        """Return the signed checkpoint of a tree; the state is durable before the note exists anywhere else.

        `consistency_proof` leads from the tree signed last, or makes the proof from that tree's size,
        which may be newer than the caller knows. Signing the same tree again returns the same note.

        Raises:
            SignerRollbackError, SignerSplitError, SignerRewriteError: the tree does not extend the last one.
            SignerBusyError: another process is signing.
            SignerStateError: the state cannot be believed or written.
        """
        proof = consistency_proof
        prove: Prover = proof if callable(proof) else lambda _: proof
        with self._locked():
            return self._sign(Checkpoint(self.origin, tree_size, root_hash), prove)

    def sign_edge(self, log: SignableLog) -> bytes:
        """Sign the log's newest tree, read inside the lock so that no other signer can overtake it."""
        with self._locked():
            edge = log.edge()
            checkpoint = Checkpoint(self.origin, edge.size, edge.root())
            return self._sign(checkpoint, lambda size: log.consistency_proof(size, edge.size))

    def _sign(self, checkpoint: Checkpoint, prove: Prover) -> bytes:
        state = self.state()
        last = state.checkpoint
        if checkpoint.tree_size < last.tree_size:
            raise SignerRollbackError(
                signed_size=last.tree_size, signed_root=last.root_hash, offered_size=checkpoint.tree_size
            )
        if checkpoint.tree_size == last.tree_size:
            if checkpoint.root_hash != last.root_hash:
                raise SignerSplitError(
                    tree_size=last.tree_size, signed_root=last.root_hash, offered_root=checkpoint.root_hash
                )
            if state.note is not None:
                return state.note
        elif last.tree_size:
            try:
                verify_consistency(
                    size1=last.tree_size,
                    size2=checkpoint.tree_size,
                    root1=last.root_hash,
                    root2=checkpoint.root_hash,
                    proof=prove(last.tree_size),
                )
            except ProofError as error:
                raise SignerRewriteError(
                    signed_size=last.tree_size,
                    signed_root=last.root_hash,
                    offered_size=checkpoint.tree_size,
                    offered_root=checkpoint.root_hash,
                    reason=str(error),
                ) from error
        note = sign_checkpoint(checkpoint, self.note_signer)
        try:
            write_durably(self.home / STATE_FILE, SignerState(checkpoint, note).encode())
        except OSError as error:
            raise SignerStateError(f"cannot write {self.home / STATE_FILE}: {error.strerror}") from error
        return note

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.home / "lock", LOCK_TIMEOUT_S):
                yield
        except TimeoutError as error:
            raise SignerBusyError(f"another process is signing in {self.home}; try again") from error


def publish(log: SignableLog, signer: Signer) -> bytes:
    """Sign the log's current tree, store the checkpoint in the log and return its note.

    The note bears earlier cosignatures too when this tree was published before.

    Raises:
        SignerError: the log does not extend what was signed, or is another log.
    """
    if log.origin != signer.origin:
        raise SignerStateError(f"this signer signs for {signer.origin!r}, not {log.origin!r}")
    return log.store_checkpoint(signer.sign_edge(log))


def _read_origin(home: Path) -> str:
    return _read_state(home).checkpoint.origin


def _read_state(home: Path) -> SignerState:
    path = home / STATE_FILE
    try:
        match parse_canonical(path.read_bytes()):
            case {
                "origin": str(origin),
                "tree_size": int(size),
                "root_hash": str(root),
                "note": str(note),
                **others,
            } if not others:
                checkpoint = Checkpoint(origin, size, bytes.fromhex(root))
                return SignerState(checkpoint, note.encode() if note else None)
        raise SignerStateError(f"{path} is not a signer's state")
    except OSError as error:
        raise SignerStateError(f"cannot read {path}: {error.strerror}; never start it anew") from error
    except SignerStateError:
        raise
    except (AuditError, ValueError) as error:
        raise SignerStateError(f"{path} is damaged: {error}") from error
