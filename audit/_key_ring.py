"""Which keys a signer's home signs with: one, or two while one takes over from the other.

`key.pem` is a log's first key. From the first rotation on `ring.json` names the keys by their vkeys and is
the only thing that changes: it is replaced whole, so a crash leaves the old ring or the new one. The key of
vkey `<name>+<id>+...` is in `key-<id>.pem`, unless a key service has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from audit._files import write_durably
from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError, SignerMissingError, SignerStateError
from audit.key_service import KeyService, ServiceKey
from audit.keys import SigningKey
from audit.notes import NoteSigner, NoteVerifier

KEY_FILE: Final = "key.pem"
RING_FILE: Final = "ring.json"


@dataclass(frozen=True, slots=True)
class Ring:
    """The public side. `retiring` signs too, on trees of at most `retire_at` entries; empty: nobody does."""

    current: str  # vkey
    retiring: str = ""
    retire_at: int = 0
    past: tuple[str, ...] = ()  # every earlier key, the retiring one too

    def rotated(self, vkey: str, retire_at: int) -> Ring:
        """Return the ring after `vkey` took over."""
        return Ring(vkey, self.current, retire_at, (*self.past, self.current))

    def without_retiring(self) -> Ring:
        return replace(self, retiring="")

    def encode(self) -> bytes:
        return canonical_bytes(
            {
                "current": self.current,
                "retiring": self.retiring,
                "retire_at": self.retire_at,
                "past": list(self.past),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Ring:
        """Read a ring; raises `SignerStateError`."""
        try:
            document = parse_canonical(data)
            match document:
                case {
                    "current": str(current),
                    "retiring": str(retiring),
                    "retire_at": int(retire_at),
                    "past": list(past),
                    **others,
                } if not others and retire_at >= 0:
                    ring = cls(current, retiring, retire_at, tuple(str(vkey) for vkey in past))
                    for vkey in (current, *ring.past):
                        NoteVerifier.parse(vkey)
                    if not retiring or retiring in ring.past:
                        return ring
        except AuditError as error:
            raise SignerStateError(f"{RING_FILE} is damaged: {error}") from error
        raise SignerStateError(f"{RING_FILE} is not a ring of keys")


class KeyRing:
    """The private side of one home's ring, read again whenever another process has changed it."""

    def __init__(
        self, home: Path, origin: str, passphrase: bytes | None, services: Sequence[KeyService]
    ) -> None:
        self._home, self._origin, self._passphrase = home, origin, passphrase
        self._served = {key.public_bytes: key for key in map(ServiceKey, services)}
        self._encoded: bytes | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read the ring anew if its file changed.

        Raises:
            SignerMissingError, KeyFileError: a key is not there or cannot be read.
            SignerStateError: the ring is damaged.
        """
        path = self._home / RING_FILE
        encoded = path.read_bytes() if path.is_file() else b""
        if encoded == self._encoded:
            return
        ring = Ring.parse(encoded) if encoded else Ring(NoteSigner(self._origin, self._first_key()).vkey)
        self.current = self._signer(ring.current)
        self.retiring = self._signer(ring.retiring) if ring.retiring else None
        self.ring, self._encoded = ring, encoded

    def signers(self, tree_size: int) -> tuple[NoteSigner, ...]:
        """Return who signs a tree of this size, the current key last."""
        if self.retiring is not None and tree_size <= self.ring.retire_at:
            return (self.retiring, self.current)
        return (self.current,)

    def verifiers(self) -> tuple[NoteVerifier, ...]:
        """Return every key that this home ever signed with."""
        return tuple(NoteVerifier.parse(vkey) for vkey in (*self.ring.past, self.ring.current))

    def new_key(self, service: KeyService | None) -> NoteSigner:
        """Make a key, or take a service's; the ring does not know it yet."""
        if service is not None:
            key: SigningKey = ServiceKey(service)
            self._served[key.public_bytes] = ServiceKey(service)
            return NoteSigner(self._origin, key)
        signer = NoteSigner(self._origin, SigningKey.generate())
        signer.key.save(self._path(signer.verifier), self._passphrase)
        return signer

    def write(self, ring: Ring) -> None:
        """Make `ring` the one in force, durably."""
        write_durably(self._home / RING_FILE, ring.encode())
        self.refresh()

    def _signer(self, vkey: str) -> NoteSigner:
        verifier = NoteVerifier.parse(vkey)
        key: SigningKey | None = self._served.get(verifier.key.public_bytes)
        if key is None:
            path = self._path(verifier)
            key = SigningKey.load(path if path.is_file() else self._home / KEY_FILE, self._passphrase)
        signer = NoteSigner(self._origin, key)
        if signer.vkey != vkey:
            raise SignerStateError(f"the ring names {vkey}, for which there is no key in {self._home}")
        return signer

    def _first_key(self) -> SigningKey:
        if self._served:
            return next(iter(self._served.values()))
        if not (self._home / KEY_FILE).is_file():
            raise SignerMissingError(f"no signer in {self._home}: {KEY_FILE} is missing")
        return SigningKey.load(self._home / KEY_FILE, self._passphrase)

    def _path(self, verifier: NoteVerifier) -> Path:
        return self._home / f"key-{verifier.key_id.hex()}.pem"
