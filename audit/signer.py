"""The log's signer: signs a tree only if it provably extends the one signed last.

The key and the last signed tree live in a home of their own, outside the database, so that an old backup,
a bug or a database administrator cannot make the log sign two histories. The home is locked during one
signature and its state read inside the lock, so several processes may sign through one home. A home that
takes over from another machine's first `adopt`s what the log has published. The operator, who holds the home
too, is answered by witnesses only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from audit._files import locked, write_durably
from audit._key_ring import KEY_FILE, KeyRing, Ring
from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import Checkpoint, add_signatures, parse_checkpoint_note, sign_checkpoint
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
from audit.key_service import KeyService
from audit.keys import SigningKey
from audit.merkle import EMPTY_ROOT, CompactRange, verify_consistency
from audit.notes import NoteSigner, NoteVerifier, open_note, parse_note

if TYPE_CHECKING:
    from audit.lease import Lease

STATE_FILE = "state.json"
LOCK_TIMEOUT_S = 10.0

Prover = Callable[[int], Sequence[bytes]]


class SignableLog(Protocol):
    """What `publish` needs of a ledger."""

    @property
    def origin(self) -> str: ...
    def edge(self) -> CompactRange: ...
    def root_at(self, size: int) -> bytes: ...
    def consistency_proof(self, size1: int, size2: int) -> list[bytes]: ...
    def store_checkpoint(self, note: bytes, *, lease: Lease | None = None) -> bytes: ...


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

    def __init__(self, home: Path, ring: KeyRing, origin: str) -> None:
        self.home, self.origin = home, origin
        self._ring = ring

    @classmethod
    def create(
        cls,
        home: Path | str,
        origin: str,
        passphrase: bytes | None = None,
        *,
        service: KeyService | None = None,
    ) -> Signer:
        """Make a key and an empty state for a new log; with `service` the key is the service's.

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
            # A creation that died before it made its key has signed nothing: this one goes on.
            if service is not None or _read_state(home) != state:
                raise SignerExistsError(
                    f"{home} holds a signer already; a log keeps its signer for life"
                ) from error
        except OSError as error:
            raise SignerMissingError(f"cannot make a signer in {home}: {error.strerror}") from error
        if service is None:
            SigningKey.generate().save(home / KEY_FILE, passphrase)
        return cls.open(home, passphrase, services=[] if service is None else [service])

    @classmethod
    def open(
        cls, home: Path | str, passphrase: bytes | None = None, *, services: Sequence[KeyService] = ()
    ) -> Signer:
        """Open a signer's home. `services` hold the keys that no file has, the log's first key first.

        Raises:
            SignerMissingError: there is none.
            SignerStateError: the state is missing or damaged; it is never replaced by an empty one.
            KeyFileError: a key cannot be read.
            KeyServiceError: a service does not answer.
        """
        home = Path(home)
        if not services and not (home / KEY_FILE).is_file():
            raise SignerMissingError(f"no signer in {home}: {KEY_FILE} is missing")
        origin = _read_origin(home)
        signer = cls(home, KeyRing(home, origin, passphrase, services), origin)
        signer.state()
        return signer

    @property
    def note_signer(self) -> NoteSigner:
        """The current key under the log's name."""
        return self._ring.current

    @property
    def key(self) -> SigningKey:
        """The current key."""
        return self._ring.current.key

    @property
    def verifier(self) -> NoteVerifier:
        return self.note_signer.verifier

    @property
    def verifiers(self) -> tuple[NoteVerifier, ...]:
        """Every key that the log has had, the current one last."""
        return self._ring.verifiers()

    @property
    def ring(self) -> Ring:
        """The names of the keys, as of the last signature."""
        return self._ring.ring

    @property
    def note_signers(self) -> tuple[NoteSigner, ...]:
        """Who signs now, the current key last."""
        retiring = self._ring.retiring
        return (self._ring.current,) if retiring is None else (retiring, self._ring.current)

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
                open_note(state.note, self.verifiers)
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

    def adopt(self, note: bytes, log: SignableLog) -> None:
        """Take over what the log has published: afterwards nothing is signed that does not extend it.

        `log` proves how the note's tree and the one signed last belong together; whichever is larger stays.

        Raises:
            NoKnownSignatureError, BadSignatureError: no key of this log signed the note.
            SignerRollbackError, SignerSplitError, SignerRewriteError: the two do not belong to one history,
            or the log cannot prove that they do.
        """
        with self._locked():
            open_note(note, self.verifiers)
            found, last = parse_checkpoint_note(note), self.state().checkpoint
            if found.origin != self.origin:
                raise SignerStateError(f"this signer signs for {self.origin!r}, not {found.origin!r}")
            size = log.edge().size
            if size < max(found.tree_size, last.tree_size):
                larger = found if found.tree_size > last.tree_size else last
                raise SignerRollbackError(
                    signed_size=larger.tree_size, signed_root=larger.root_hash, offered_size=size
                )
            prove = log.consistency_proof
            if found.tree_size > last.tree_size:
                _check_extends(last, found, lambda start: prove(start, found.tree_size))
                self._write(SignerState(found, note))
            else:
                _check_extends(found, last, lambda start: prove(start, last.tree_size))

    def check_extended_by(self, log: SignableLog) -> None:
        """Return if the log holds all that was signed last: it was not put back, and not changed.

        Raises:
            SignerRollbackError, SignerSplitError: it is an old copy, or says something else.
            SignerStateError: the state cannot be believed, or is another log's.
        """
        signed = self.state().checkpoint  # read before the log, which never shrinks
        if log.origin != self.origin:
            raise SignerStateError(f"this signer signs for {self.origin!r}, not {log.origin!r}")
        size = log.edge().size
        if size < signed.tree_size:
            raise SignerRollbackError(
                signed_size=signed.tree_size, signed_root=signed.root_hash, offered_size=size
            )
        found = log.root_at(signed.tree_size)
        if found != signed.root_hash:
            raise SignerSplitError(
                tree_size=signed.tree_size, signed_root=signed.root_hash, offered_root=found
            )

    def rotate(self, retire_at: int, *, service: KeyService | None = None) -> tuple[NoteSigner, NoteSigner]:
        """Let a new key sign beside the present one, alone on trees of more than `retire_at` entries.

        Returns:
            The key that retires and the one that takes over, for the entry that says so.

        Raises:
            SignerStateError: another rotation is not over, or the tree signed last is larger than that.
        """
        with self._locked():
            size = self.state().checkpoint.tree_size
            ring = self._ring.ring
            if ring.retiring and size <= ring.retire_at:
                raise SignerStateError(f"a rotation is under way until size {ring.retire_at}; wait for it")
            if retire_at < size:
                raise SignerStateError(f"retire_at is {retire_at}, but {size} entries are signed already")
            old = self._ring.current
            new = self._ring.new_key(service)
            self._ring.write(ring.rotated(new.vkey, retire_at))
            return old, new

    def replace_compromised(self, *, service: KeyService | None = None) -> tuple[NoteSigner, NoteSigner]:
        """Let a new key sign alone from now on; return the one it replaces, and the new one."""
        with self._locked():
            old = self._ring.current
            new = self._ring.new_key(service)
            self._ring.write(self._ring.ring.rotated(new.vkey, 0).without_retiring())
            return old, new

    def _sign(self, checkpoint: Checkpoint, prove: Prover) -> bytes:
        state = self.state()
        last = state.checkpoint
        signers = self._ring.signers(checkpoint.tree_size)
        _check_extends(last, checkpoint, prove)
        if checkpoint.tree_size == last.tree_size and state.note is not None:
            keys = {line.key_id for line in parse_note(state.note).signatures}
            if keys >= {signer.verifier.key_id for signer in signers}:
                return state.note
        note = sign_checkpoint(checkpoint, signers[0])
        note = add_signatures(note, [signer.line(checkpoint.body()) for signer in signers[1:]])
        self._write(SignerState(checkpoint, note))
        return note

    def _write(self, state: SignerState) -> None:
        try:
            write_durably(self.home / STATE_FILE, state.encode())
        except OSError as error:
            raise SignerStateError(f"cannot write {self.home / STATE_FILE}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with locked(self.home / "lock", LOCK_TIMEOUT_S):
                self._ring.refresh()
                yield
        except TimeoutError as error:
            raise SignerBusyError(f"another process is signing in {self.home}; try again") from error


def publish(log: SignableLog, signer: Signer, lease: Lease | None = None) -> bytes:
    """Sign the log's current tree, store the checkpoint in the log and return its note.

    The note bears earlier cosignatures too when this tree was published before. `audit.publisher` calls this
    as the one holder of the log's lease.

    Raises:
        SignerError: the log does not extend what was signed, or is another log.
    """
    if log.origin != signer.origin:
        raise SignerStateError(f"this signer signs for {signer.origin!r}, not {log.origin!r}")
    return log.store_checkpoint(signer.sign_edge(log), lease=lease)


def _check_extends(last: Checkpoint, offered: Checkpoint, prove: Prover) -> None:
    """Prove that the `offered` tree extends the `last` one, or is it."""
    if offered.tree_size < last.tree_size:
        raise SignerRollbackError(
            signed_size=last.tree_size, signed_root=last.root_hash, offered_size=offered.tree_size
        )
    if offered.tree_size == last.tree_size:
        if offered.root_hash != last.root_hash:
            raise SignerSplitError(
                tree_size=last.tree_size, signed_root=last.root_hash, offered_root=offered.root_hash
            )
    elif last.tree_size:
        try:
            verify_consistency(
                size1=last.tree_size,
                size2=offered.tree_size,
                root1=last.root_hash,
                root2=offered.root_hash,
                proof=prove(last.tree_size),
            )
        except ProofError as error:
            raise SignerRewriteError(
                signed_size=last.tree_size,
                signed_root=last.root_hash,
                offered_size=offered.tree_size,
                offered_root=offered.root_hash,
                reason=str(error),
            ) from error


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
