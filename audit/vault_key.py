"""The vault's master key: 32 random bytes in a file of the home, never in the database.

It wraps the key of each person and keys the hash by which a person is found, so that the vault's database,
its WAL and its backups are worth nothing without this file. With a passphrase the file holds the key under
scrypt and AES-256-GCM.
"""

from __future__ import annotations

import hmac
import os
import secrets
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from audit._files import write_durably
from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError

KEY_SIZE: Final = 32
FORMAT: Final = "affidavit-vault-key/1"
_NONCE: Final = 12
_SCRYPT_N: Final = 1 << 15
_CHECK: Final = b"affidavit/vault-check/v1"


class VaultKeyError(AuditError):
    """The master key is missing, unreadable, or of another vault."""

    code = "vault.key"


class SealBrokenError(AuditError):
    """A ciphertext is not what was sealed under this key for this place; nothing of it is shown."""

    code = "vault.seal_broken"


class MasterKey:
    """What the file holds, and the two keys derived from it."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_SIZE:
            raise VaultKeyError(f"a vault's key has {KEY_SIZE} bytes, not {len(secret)}")
        self._secret = secret
        self._wrap, self._lookup = _derived(secret, b"wrap"), _derived(secret, b"lookup")

    @classmethod
    def new(cls) -> MasterKey:
        return cls(secrets.token_bytes(KEY_SIZE))

    def lookup(self, kind: str, name: str) -> str:
        """Return the hex hash by which somebody's row is found; without this key nobody can make it."""
        return hmac.digest(self._lookup, kind.encode() + b"\x00" + name.encode(), "sha256").hex()

    def wrap(self, key: bytes, place: bytes) -> bytes:
        return seal(self._wrap, key, place)

    def unwrap(self, wrapped: bytes, place: bytes) -> bytes:
        """Return the key that was wrapped for `place`; raises SealBrokenError."""
        return unseal(self._wrap, wrapped, place)

    def check_value(self, origin: str) -> bytes:
        """Return what a vault keeps to know its own key by."""
        return self.wrap(_CHECK, origin.encode())

    def fits(self, value: bytes, origin: str) -> bool:
        try:
            return self.unwrap(value, origin.encode()) == _CHECK
        except SealBrokenError:
            return False

    def save(self, path: Path, passphrase: bytes | None, *, replace: bool = False) -> None:
        """Write the key file, mode 0600.

        Raises:
            VaultKeyError: there is one already, or it cannot be written.
        """
        document: dict[str, Any] = {"format": FORMAT, "kdf": "none", "key": self._secret.hex(), "salt": ""}
        if passphrase is not None:
            salt = secrets.token_bytes(16)
            sealed = seal(_stretched(passphrase, salt), self._secret, FORMAT.encode())
            document = {"format": FORMAT, "kdf": "scrypt", "key": sealed.hex(), "salt": salt.hex()}
        try:
            write_durably(path, canonical_bytes(document) + b"\n", replace=replace)
        except FileExistsError as error:
            raise VaultKeyError(f"{path}: is there already; a vault's key is never replaced") from error
        except OSError as error:
            raise VaultKeyError(f"{path}: cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path, passphrase: bytes | None) -> MasterKey:
        """Read the key file.

        Raises:
            VaultKeyError: missing, open to others, damaged, or under another passphrase.
        """
        try:
            data, mode = path.read_bytes(), os.stat(path).st_mode
        except OSError as error:
            raise VaultKeyError(f"{path}: cannot be read: {error.strerror}; restore it") from error
        if mode & 0o077:
            raise VaultKeyError(f"{path}: others may read it; chmod 600")
        try:
            document: Any = parse_canonical(data.removesuffix(b"\n"))
            kind, kdf = document["format"], document["kdf"]
            key, salt = bytes.fromhex(document["key"]), bytes.fromhex(document["salt"])
        except (AuditError, ValueError, KeyError, TypeError) as error:
            raise VaultKeyError(f"{path}: is no vault key of this release") from error
        if kind != FORMAT or kdf not in ("none", "scrypt"):
            raise VaultKeyError(f"{path}: is no vault key of this release")
        if kdf == "none":
            return cls(key)
        if passphrase is None:
            raise VaultKeyError(f"{path}: is encrypted; give AFFIDAVIT_VAULT_PASSPHRASE")
        return cls(_opened(key, salt, passphrase, path))


def seal(key: bytes, plaintext: bytes, place: bytes) -> bytes:
    """Return nonce and AES-256-GCM ciphertext, bound to `place`."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, place)


def unseal(key: bytes, sealed: bytes, place: bytes) -> bytes:
    """Return what was sealed for `place`.

    Raises:
        SealBrokenError: another key or place, or one bit of it was changed.
    """
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], place)
    except (InvalidTag, ValueError) as error:
        raise SealBrokenError("a ciphertext was changed, moved, or is under another key") from error


def _derived(secret: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), KEY_SIZE, salt=None, info=b"affidavit/vault/v1/" + purpose).derive(secret)


def _opened(sealed: bytes, salt: bytes, passphrase: bytes, path: Path) -> bytes:
    try:
        return unseal(_stretched(passphrase, salt), sealed, FORMAT.encode())
    except SealBrokenError as error:
        raise VaultKeyError(f"{path}: the passphrase is not the one it was made with") from error


def _stretched(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=KEY_SIZE, n=_SCRYPT_N, r=8, p=1).derive(passphrase)
