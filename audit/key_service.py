"""A log's key that lives elsewhere: a cloud KMS, a PKCS#11 token, another process.

A `KeyService` gives an Ed25519 public key and pure Ed25519 signatures (RFC 8032) of exactly the bytes it is
given. `ServiceKey` makes it usable wherever a `SigningKey` is; each signature that comes back is verified, so
a service that fails or lies makes an error here, never a bad checkpoint. `FileKeyService` is the same over a
key file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from audit.errors import AuditError, KeyFileError, KeyServiceError
from audit.keys import SigningKey, VerifyKey, signed_bytes


class KeyService(Protocol):
    """What a key service must be able to do. Either method may raise anything when it cannot."""

    def public_key(self) -> bytes:
        """Return the 32 bytes of the Ed25519 public key."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte Ed25519 signature of exactly these bytes, at most 1 MiB."""
        ...


class FileKeyService:
    """A key file behind the interface of a service."""

    def __init__(self, path: Path | str, passphrase: bytes | None = None) -> None:
        self._key = SigningKey.load(path, passphrase)

    def public_key(self) -> bytes:
        return self._key.public_bytes

    def sign(self, message: bytes) -> bytes:
        return self._key.unsafe_sign_raw(message)


class ServiceKey(SigningKey):
    """A signing key whose private half is a service's."""

    def __init__(self, service: KeyService) -> None:
        """Ask the service for its public key.

        Raises:
            KeyServiceError: it does not answer.
            KeyFormatError: what it answers is no Ed25519 key.
        """
        self._service = service
        try:
            public = service.public_key()
        except Exception as error:  # any client library may stand behind the Protocol
            raise KeyServiceError(f"the key service gave no public key: {error}") from error
        self.verify_key = VerifyKey(public)

    def sign(self, domain: str, payload: bytes) -> bytes:
        return self.unsafe_sign_raw(signed_bytes(domain, payload))

    def unsafe_sign_raw(self, message: bytes) -> bytes:
        """Return the service's signature, verified.

        Raises:
            KeyServiceError: it did not sign, or not with this key.
        """
        try:
            signature = self._service.sign(message)
        except Exception as error:  # any client library may stand behind the Protocol
            raise KeyServiceError(f"the key service did not sign: {error}") from error
        try:
            self.verify_key.verify_raw(message, signature)
        except (AuditError, TypeError) as error:
            raise KeyServiceError("the key service's signature is not by its public key") from error
        return signature

    def save(self, path: Path | str, passphrase: bytes | None) -> None:
        raise KeyFileError("a key service's key is in no file", path=str(path))
