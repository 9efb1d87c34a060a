"""Keys: a person's identity (officer, scientist), and a site's four keys.

A site's identity key delegates to separate keys for statements, for cosigning checkpoints and for key
agreement. The enrolment is signed by the identity key and by both delegated signing keys, over the same
bytes: whoever believes a site's witness key learns from that key itself which identity it belongs to.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from audit._files import write_durably
from audit.changed_body import with_fields
from audit.entries import (
    CharterSigned,
    RunAccepted,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import SigningKey, VerifyKey, parse_public_key
from audit.notes import KeyType, NoteSigner
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.site_bodies import BundleDecided, RequestRefused, SiteDecided, SiteLogOpened
from clients.errors import IdentityError

T = TypeVar(
    "T",
    CharterSigned,
    RunAccepted,
    SiteRefused,
    SiteStatement,
    SiteLogOpened,
    SiteDecided,
    RequestRefused,
    BundleDecided,
    MaskKeys,
    SurvivorsAgreed,
    SharesOpened,
)

IDENTITY_KEY: Final = "identity.pem"
STATEMENT_KEY: Final = "statement.pem"
WITNESS_KEY: Final = "witness.pem"
AGREEMENT_KEY: Final = "agreement.pem"
PAST_STATEMENT_KEYS: Final = "past-statement-keys.txt"
_NEXT: Final = ".next"


@dataclass(frozen=True, slots=True)
class Identity:
    """A person's own key: `<home>/identity/key.pem`."""

    home: Path
    key: SigningKey

    @classmethod
    def create(cls, home: Path, passphrase: bytes | None = None) -> Identity:
        """Make a new identity; an existing one is never overwritten.

        Raises:
            IdentityError: the home has an identity already, or cannot be written.
        """
        folder = home / "identity"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        identity = cls(home, SigningKey.generate())
        try:
            identity.key.save(folder / "key.pem", passphrase)
        except AuditError as error:
            raise IdentityError(folder, str(error), "choose another home for a second identity") from error
        return identity

    @classmethod
    def open(cls, home: Path, passphrase: bytes | None = None) -> Identity:
        """Read the identity that `create` made.

        Raises:
            IdentityError: there is none, or the passphrase is wrong.
        """
        path = home / "identity" / "key.pem"
        try:
            return cls(home, SigningKey.load(path, passphrase))
        except AuditError as error:
            raise IdentityError(path, str(error), "make one with `affidavit identity new`") from error

    @property
    def public(self) -> str:
        """What others write into a charter: `ed25519:<base64>`."""
        return self.key.text


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """A site's private keys, all in `<home>/keys`, each file for its owner alone."""

    identity: SigningKey
    statement: SigningKey
    witness: SigningKey
    agreement: X25519PrivateKey
    past_statements: tuple[VerifyKey, ...] = ()  # which this site signed statements with before

    @classmethod
    def generate(cls) -> SiteKeys:
        """Return four new keys that are kept nowhere."""
        return cls(
            SigningKey.generate(), SigningKey.generate(), SigningKey.generate(), X25519PrivateKey.generate()
        )

    @classmethod
    def create(cls, folder: Path) -> SiteKeys:
        """Make the four keys of a new site.

        Raises:
            IdentityError: the folder holds keys already, or cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys = cls.generate()
        try:
            keys.identity.save(folder / IDENTITY_KEY, None)
            keys.statement.save(folder / STATEMENT_KEY, None)
            keys.witness.save(folder / WITNESS_KEY, None)
            _save_agreement(folder / AGREEMENT_KEY, keys.agreement)
        except (AuditError, OSError) as error:
            raise IdentityError(
                folder, str(error), "a site's keys are made once, in an empty folder"
            ) from error
        return keys

    @classmethod
    def open(cls, folder: Path) -> SiteKeys:
        """Read the four keys.

        Raises:
            IdentityError: one is missing, open to other users, or no key of its kind.
        """
        try:
            agreement = serialization.load_pem_private_key((folder / AGREEMENT_KEY).read_bytes(), None)
            if not isinstance(agreement, X25519PrivateKey):
                raise ValueError(f"{AGREEMENT_KEY} is not an X25519 key")
            return cls(
                SigningKey.load(folder / IDENTITY_KEY),
                SigningKey.load(folder / STATEMENT_KEY),
                SigningKey.load(folder / WITNESS_KEY),
                agreement,
                tuple(VerifyKey(parse_public_key(line)) for line in _past(folder)),
            )
        except (AuditError, OSError, ValueError) as error:
            raise IdentityError(
                folder, str(error), "restore the folder from the site's own backup"
            ) from error

    @staticmethod
    def rotate(folder: Path) -> SiteKeys:
        """Exchange the keys for statements and for key agreement; return the keys as they are then.

        The old statement key's public half is kept, to know one's own past by. After a crash the next call
        goes on where this one stopped. The identity key stays, since charters name it, and so does the
        witness key, since other people's policies do.

        Raises:
            IdentityError: the folder cannot be read or written.
        """
        statement, agreement = folder / f"{STATEMENT_KEY}{_NEXT}", folder / f"{AGREEMENT_KEY}{_NEXT}"
        before = SiteKeys.open(folder)
        try:
            if not agreement.exists():
                if not statement.exists():
                    SigningKey.generate().save(statement, None)
                _save_agreement(agreement, X25519PrivateKey.generate())
            if statement.exists():
                known = _past(folder)
                if before.statement.text not in known:
                    text = "".join(f"{line}\n" for line in (*known, before.statement.text))
                    write_durably(folder / PAST_STATEMENT_KEYS, text.encode())
                os.replace(statement, folder / STATEMENT_KEY)
            os.replace(agreement, folder / AGREEMENT_KEY)
        except (AuditError, OSError) as error:
            raise IdentityError(folder, str(error), "see that it can be written, and try again") from error
        return SiteKeys.open(folder)

    def witness_signer(self, site: str) -> NoteSigner:
        """The cosigner that bears the site's name."""
        return NoteSigner(site, self.witness, KeyType.COSIGNATURE)

    def enrolment(self, site: str, population: str, origin: str, operator: str = "") -> SiteEnrolled:
        """Return the enrolment in log `origin`, signed by the identity and by both delegated signing keys.

        `operator` is whoever runs the machines of this site and of others; such sites are one voice.
        """
        agreement = self.agreement.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        unsigned = SiteEnrolled(
            site=site,
            operator=operator,
            origin=origin,
            population=population,
            identity_key=self.identity.text,
            statement_key=self.statement.text,
            witness_key=self.witness_signer(site).vkey,
            agreement_key=base64.b64encode(agreement).decode(),
            signature="",
            statement_proof="",
            witness_proof="",
        )
        domain, payload = signing_payload(unsigned)
        return dataclasses.replace(
            unsigned,
            signature=signature_text(self.identity, domain, payload),
            statement_proof=signature_text(self.statement, domain, payload),
            witness_proof=signature_text(self.witness, domain, payload),
        )

    def signed(self, body: T) -> T:
        """Return `body` signed: by the identity key what binds the site itself, else by the statement key."""
        domain, payload = signing_payload(body)
        key = self.identity if domain in ("charter", "site-log") else self.statement
        return with_fields(body, signature=signature_text(key, domain, payload))


def signature_text(key: SigningKey, domain: str, payload: bytes) -> str:
    """Return the base64 signature that a body's `signature` field holds."""
    return base64.b64encode(key.sign(domain, payload)).decode()


def _past(folder: Path) -> list[str]:
    try:
        return (folder / PAST_STATEMENT_KEYS).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []


def _save_agreement(path: Path, key: X25519PrivateKey) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
