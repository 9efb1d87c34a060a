"""Ed25519 identities: key files, text forms and domain-separated signatures.

What is signed is `b"affidavit/" + domain + b"/v1\\x00" + payload`, with `domain` from the closed list
`DOMAINS`, so that a signature given for one purpose never serves another. Signed notes have their own
framing; the NUL above cannot occur in a note, so one log key may sign both.
"""

from __future__ import annotations

import base64
import hashlib
import os
import stat
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from audit._files import write_durably
from audit.errors import BadSignatureError, KeyFileError, KeyFormatError, UnknownDomainError

PUBLIC_KEY_SIZE = 32
SIGNATURE_SIZE = 64
DOMAINS = frozenset(
    {
        "enrolment",
        "charter",
        "run",
        "acceptance",
        "refusal",
        "statement",
        "transition",
        "receipt",
        "rotation",
        "compromise",
        "site-log",
        "decision",
        "request",
        "bundle",
        "joining",
        "leaving",
        "node-key",
        "review",
        "access-policy",
        "mask-keys",
        "survivors",
        "mask-shares",
    }
)

_PREFIX = "ed25519:"
_FIELD = 2**255 - 19
_ORDER_8_Y = int.from_bytes(
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"
)
_SMALL_ORDER_Y = frozenset({0, 1, _FIELD - 1, _ORDER_8_Y, _FIELD - _ORDER_8_Y})


def signed_bytes(domain: str, payload: bytes) -> bytes:
    """Return the bytes under a signature.

    Raises:
        UnknownDomainError: `domain` is not in `DOMAINS`.
    """
    if domain not in DOMAINS:
        raise UnknownDomainError(domain)
    return b"affidavit/" + domain.encode() + b"/v1\x00" + payload


def format_public_key(public: bytes) -> str:
    """Return `ed25519:<base64 of the 32 bytes>`."""
    return VerifyKey(public).text


def parse_public_key(text: str) -> bytes:
    """Return the 32 bytes of `ed25519:<base64>`, exactly as `format_public_key` writes it.

    Raises:
        KeyFormatError: any other form, or a point no honest key has.
    """
    if not text.startswith(_PREFIX):
        raise KeyFormatError(f"public key {text[:60]!r} does not begin with {_PREFIX!r}")
    try:
        public = base64.b64decode(text[len(_PREFIX) :], validate=True)
    except ValueError as error:
        raise KeyFormatError(f"public key {text[:60]!r} is not base64") from error
    if format_public_key(public) != text:
        raise KeyFormatError(f"public key {text[:60]!r} is not canonical base64")
    return public


def fingerprint(public: bytes) -> str:
    """Return the first 16 hex digits of SHA-256(public): for people to compare, not for machines to trust."""
    return hashlib.sha256(public).hexdigest()[:16]


class VerifyKey:
    """A public key that checks signatures.

    Raises:
        KeyFormatError: not 32 bytes, not a canonical encoding, or a point of small order, under which one
            signature fits many messages.
    """

    def __init__(self, public: bytes) -> None:
        if len(public) != PUBLIC_KEY_SIZE:
            raise KeyFormatError(f"an Ed25519 public key has 32 bytes, not {len(public)}")
        y = int.from_bytes(public, "little") & (2**255 - 1)
        if y >= _FIELD or y in _SMALL_ORDER_Y:
            raise KeyFormatError(f"public key {public.hex()} is not a usable Ed25519 point")
        self.public_bytes = bytes(public)

    @cached_property
    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.public_bytes)

    @property
    def text(self) -> str:
        return _PREFIX + base64.b64encode(self.public_bytes).decode()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.public_bytes)

    def verify(self, domain: str, payload: bytes, signature: bytes) -> None:
        """Prove that the key's holder signed `payload` for `domain`.

        Raises:
            BadSignatureError: anything but a valid signature.
            UnknownDomainError: `domain` is not in `DOMAINS`.
        """
        self.verify_raw(signed_bytes(domain, payload), signature)

    def verify_raw(self, message: bytes, signature: bytes) -> None:
        """Prove a plain Ed25519 signature; for formats with a framing of their own (signed notes)."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature as error:
            raise BadSignatureError(f"signature by {self.text} does not verify", key=self.text) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and other.public_bytes == self.public_bytes

    def __hash__(self) -> int:
        return hash(self.public_bytes)

    def __repr__(self) -> str:
        return f"VerifyKey({self.text})"


class SigningKey:
    """A private key. `repr` and errors never show it."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.verify_key = VerifyKey(private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @property
    def public_bytes(self) -> bytes:
        return self.verify_key.public_bytes

    @property
    def text(self) -> str:
        """The public key's text form."""
        return self.verify_key.text

    def sign(self, domain: str, payload: bytes) -> bytes:
        """Return the 64-byte signature of `payload` for `domain`.

        Raises:
            UnknownDomainError: `domain` is not in `DOMAINS`.
        """
        return self._private.sign(signed_bytes(domain, payload))

    def unsafe_sign_raw(self, message: bytes) -> bytes:
        """Sign without a domain: only for formats with a framing of their own (signed notes)."""
        return self._private.sign(message)

    def save(self, path: Path | str, passphrase: bytes | None) -> None:
        """Write PKCS#8 PEM, mode 0600, whole or not at all; an existing key is never overwritten.

        Raises:
            KeyFileError: the file exists, or the folder cannot be written.
        """
        from cryptography.hazmat.primitives import serialization  # slow to load; a verifier reads no key file

        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase is not None:
            if not passphrase:
                raise KeyFileError(
                    "the passphrase is empty; give one, or None for no encryption", path=str(path)
                )
            encryption = serialization.BestAvailableEncryption(passphrase)
        pem = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
        try:
            write_durably(Path(path), pem, mode=0o600, replace=False)
        except FileExistsError as error:
            raise KeyFileError(
                f"{path} exists already; a key is never overwritten", path=str(path)
            ) from error
        except OSError as error:
            raise KeyFileError(f"cannot write key {path}: {error.strerror}", path=str(path)) from error

    @classmethod
    def load(cls, path: Path | str, passphrase: bytes | None = None) -> SigningKey:
        """Read a key that `save` wrote.

        Raises:
            KeyFileError: no such file, readable by others, wrong passphrase, or not an Ed25519 key.
        """
        from cryptography.hazmat.primitives import serialization

        try:
            with open(path, "rb") as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                    raise KeyFileError(f"key {path} is open to other users; chmod 600 it", path=str(path))
                pem = file.read(1 << 16)
        except OSError as error:
            raise KeyFileError(f"cannot read key {path}: {error.strerror}", path=str(path)) from error
        try:
            private = serialization.load_pem_private_key(pem, passphrase)
        except TypeError as error:
            state = "needs a passphrase" if passphrase is None else "is not encrypted; give no passphrase"
            raise KeyFileError(f"key {path} {state}", path=str(path)) from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise KeyFileError(
                f"key {path} is not a key, or the passphrase is wrong", path=str(path)
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise KeyFileError(f"key {path} is not an Ed25519 key", path=str(path))
        return cls(private)

    def __repr__(self) -> str:
        return f"SigningKey(public={self.text})"
