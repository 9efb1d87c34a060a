"""An invitation: one line that lets one site ask to join, once, for a time.

    affidavit-invitation.<base64url of canonical JSON>.<first 8 hex of its SHA-256>

It holds the coordinator's address, the SHA-256 of the CA to pin, the log's key, the site's name, a time and
a random secret. Whoever reads it can ask in the site's place: send it like a password. The coordinator keeps
the secret's hash alone.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError
from audit.notes import KeyType, NoteVerifier
from federation.network.errors import InvitationError

PREFIX: Final = "affidavit-invitation"
MAX_CHARS: Final = 2000
TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
SITE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")

_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[1-9][0-9]{0,4}")
_HEX64: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"address", "ca", "expires", "label", "log", "secret", "site"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    address: str  # host:port of the gateway
    ca: str  # SHA-256 of the CA certificate's DER
    expires: str  # time
    label: str
    log: str  # vkey
    secret: str  # 64 hex, 256 random bits
    site: str

    def __post_init__(self) -> None:
        checks = (
            _ADDRESS.fullmatch(self.address),
            _HEX64.fullmatch(self.ca),
            _HEX64.fullmatch(self.secret),
            SITE_NAME.fullmatch(self.site),
            0 < len(self.label) <= 200,
        )
        if not all(checks):
            raise InvitationError("the invitation says something that cannot be; ask for a new one")
        parse_time(self.expires)
        try:
            log = NoteVerifier.parse(self.log)
        except AuditError as error:
            raise InvitationError(f"the invitation names no log key: {error}") from error
        if log.kind is not KeyType.ED25519:
            raise InvitationError("the invitation names a key that is no log's")

    @property
    def digest(self) -> str:
        """The hash under which the log knows this invitation."""
        return secret_digest(self.secret)

    @property
    def origin(self) -> str:
        return NoteVerifier.parse(self.log).name

    def format(self) -> str:
        """Return the line."""
        document: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        data = canonical_bytes(document)
        body = base64.urlsafe_b64encode(data).decode().rstrip("=")
        return f"{PREFIX}.{body}.{hashlib.sha256(data).hexdigest()[:8]}"

    @classmethod
    def parse(cls, line: str) -> Invitation:
        """Read the line.

        Raises:
            InvitationError: it is not one, or a part is missing.
        """
        parts = line.strip().split(".")
        if len(line) > MAX_CHARS or len(parts) != 3 or parts[0] != PREFIX:
            raise InvitationError(f"an invitation is one line that begins with {PREFIX}.")
        try:
            data = base64.b64decode(parts[1] + "=" * (-len(parts[1]) % 4), altchars=b"-_", validate=True)
        except ValueError as error:
            raise InvitationError("the invitation is damaged; copy the whole line again") from error
        if hashlib.sha256(data).hexdigest()[:8] != parts[2]:
            raise InvitationError("the invitation was cut short or altered; copy the whole line again")
        try:
            document = parse_canonical(data)
        except AuditError as error:
            raise InvitationError(f"the invitation cannot be read: {error}") from error
        if (
            not isinstance(document, dict)
            or set(document) != _FIELDS
            or not all(isinstance(value, str) for value in document.values())
        ):
            raise InvitationError("the invitation is of another release; ask for a new one")
        return cls(**{name: str(value) for name, value in document.items()})


def new_secret() -> str:
    return secrets.token_hex(32)


def secret_digest(secret: str) -> str:
    """Return what the coordinator keeps of a secret."""
    return hashlib.sha256(b"affidavit/invitation/v1\x00" + secret.encode()).hexdigest()


def site_slug(label: str) -> str:
    """Return the site's name in the log for what people call it: "St Mary" is st-mary.

    Raises:
        InvitationError: nothing of it can be kept.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:63].strip("-")
    if not SITE_NAME.fullmatch(slug):
        raise InvitationError(f"{label!r} makes no site name; use letters and digits, or give --name")
    return slug


def format_time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime(TIME_FORMAT)


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time in UTC, whole seconds.

    Raises:
        InvitationError: it is not one.
    """
    try:
        moment = datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError as error:
        raise InvitationError(f"{text[:40]!r} is no time such as 2026-12-31T08:00:00Z") from error
    if format_time(moment) != text:
        raise InvitationError(f"{text[:40]!r} is not in its one form")
    return moment
