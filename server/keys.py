"""API keys: who holds one, in which role, until when.

A key reads `affidavit_<prefix>_<secret>`. The prefix finds its row; the secret (32 random bytes) is kept
only as an argon2id hash. The holder's principal is a random pseudonym: the log never carries a name. A
verified key is remembered for a moment by its SHA-256, so that argon2 is not paid on each call; revocation
and expiry are read from the row each time and so take effect at once.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import Engine, MetaData, create_engine
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, Session, SQLModel, select

from audit.principal import ROLES, Principal
from server.errors import KeyNotFoundError, KeyRequestError, TooBusyError, UnauthenticatedError

FILE: Final = "keys.db"
_KEY = re.compile(r"affidavit_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")
_NOTE = re.compile(r"[ -~]{0,80}")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_CACHE_SIZE: Final = 1_024
_VERIFYING_AT_ONCE: Final = 4
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)  # OWASP's second choice
_REFUSED: Final = "the API key is absent, unknown, revoked or expired"

Clock = Callable[[], datetime]


class _Base(SQLModel):
    metadata = MetaData()


class ApiKey(_Base, table=True):
    """One key at rest."""

    __tablename__ = "api_key"

    prefix: str = Field(primary_key=True)
    secret_hash: str
    role: str
    principal: str = Field(unique=True)
    note: str  # the operator's own reminder; stays in this table
    created: str  # RFC 3339
    expires: str  # RFC 3339, or "" for never
    revoked: str  # RFC 3339, or "" while it stands


class KeySite(_Base, table=True):
    """The site that a node's key speaks for; a table of its own, so that older stores gain it."""

    __tablename__ = "api_key_site"

    prefix: str = Field(primary_key=True)
    site: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyView:
    """What anybody may see of a key."""

    key_id: str
    role: str
    principal: str
    note: str
    created: str
    expires: str
    revoked: str
    site: str = ""


class KeyStore:
    """The keys of one coordinator's home."""

    def __init__(
        self, home: Path, clock: Clock, *, cache_s: float = 60.0, hasher: PasswordHasher = _HASHER
    ) -> None:
        path = home / FILE
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._engine: Engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 10})
        ApiKey.metadata.create_all(self._engine)
        self._clock, self._cache_s = clock, cache_s
        self._hasher = hasher
        self._verified: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()
        self._verifying = threading.BoundedSemaphore(_VERIFYING_AT_ONCE)

    def create(
        self, *, role: str, expires: datetime | None = None, note: str = "", site: str = ""
    ) -> tuple[str, KeyView]:
        """Make a key and return its text, which nobody can show again, and its view.

        Raises:
            KeyRequestError: the role is unknown, the note is not plain text, or the expiry has passed.
        """
        if role not in ROLES:
            raise KeyRequestError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
        if site and (role != "node" or not _SITE.fullmatch(site)):
            raise KeyRequestError(
                f"site {site[:70]!r}: only a node's key has one, in lower-case letters, digits, -"
            )
        if not _NOTE.fullmatch(note):
            raise KeyRequestError("note: at most 80 printable ASCII characters")
        now = self._clock()
        if expires is not None and (expires.tzinfo is None or expires <= now):
            raise KeyRequestError("expires: give a time in the future, with its zone")
        prefix = base64.b32encode(secrets.token_bytes(10)).decode().lower()
        secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        row = ApiKey(
            prefix=prefix,
            secret_hash=self._hasher.hash(secret),
            role=role,
            principal="p-" + secrets.token_hex(16),
            note=note,
            created=_text(now),
            expires=_text(expires) if expires else "",
            revoked="",
        )
        view = _view(row, site)
        with Session(self._engine) as session:
            session.add(row)
            if site:
                session.add(KeySite(prefix=prefix, site=site))
            try:
                session.commit()
            except IntegrityError as error:  # an 80-bit prefix met twice
                raise TooBusyError("could not store the key; try again") from error
        return f"affidavit_{prefix}_{secret}", view

    def list(self) -> tuple[KeyView, ...]:
        with Session(self._engine) as session:
            sites = {row.prefix: row.site for row in session.exec(select(KeySite))}
            rows = session.exec(select(ApiKey).order_by("created", "prefix"))
            return tuple(_view(row, sites.get(row.prefix, "")) for row in rows)

    def get(self, key_id: str) -> KeyView:
        row = self._row(key_id)
        if row is None:
            raise KeyNotFoundError(f"no key {key_id!r}; `affidavit keys list` shows the ids")
        return _view(row, self._site(key_id))

    def revoke(self, key_id: str) -> KeyView:
        """Revoke at once, and for good; revoking twice changes nothing.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        with Session(self._engine) as session:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise KeyNotFoundError(f"no key {key_id!r}; `affidavit keys list` shows the ids")
            if not row.revoked:
                row.revoked = _text(self._clock())
                session.add(row)
                session.commit()
                session.refresh(row)
            return _view(row, self._site(key_id))

    def authenticate(self, text: str) -> Principal:
        """Return the principal that holds the key. Costs about 30 ms when the key is not remembered.

        Raises:
            UnauthenticatedError: for every reason alike.
            TooBusyError: too many unremembered keys are being checked at once.
        """
        match = _KEY.fullmatch(text)
        row = self._row(match.group(1)) if match else None
        if match is None or row is None or row.revoked:
            raise UnauthenticatedError(_REFUSED)
        if row.expires and row.expires <= _text(self._clock()):
            raise UnauthenticatedError(_REFUSED)
        digest = hashlib.sha256(text.encode()).digest()
        if not self._is_remembered(digest):
            self._verify(row.secret_hash, match.group(2))
            self._remember(digest)
        return Principal(id=row.principal, role=row.role, site=self._site(row.prefix))

    def close(self) -> None:
        self._engine.dispose()

    def _row(self, prefix: str) -> ApiKey | None:
        with Session(self._engine) as session:
            return session.get(ApiKey, prefix)

    def _site(self, prefix: str) -> str:
        with Session(self._engine) as session:
            found = session.get(KeySite, prefix)
        return "" if found is None else found.site

    def _verify(self, secret_hash: str, secret: str) -> None:
        if not self._verifying.acquire(timeout=2):
            raise TooBusyError("too many keys are being checked; try again")
        try:
            self._hasher.verify(secret_hash, secret)
        except (VerificationError, InvalidHashError, binascii.Error) as error:
            raise UnauthenticatedError(_REFUSED) from error
        finally:
            self._verifying.release()

    def _is_remembered(self, digest: bytes) -> bool:
        with self._lock:
            until = self._verified.get(digest)
            if until is None:
                return False
            if until < time.monotonic():
                del self._verified[digest]
                return False
            return True

    def _remember(self, digest: bytes) -> None:
        with self._lock:
            self._verified[digest] = time.monotonic() + self._cache_s
            self._verified.move_to_end(digest)
            while len(self._verified) > _CACHE_SIZE:
                self._verified.popitem(last=False)


def _view(row: ApiKey, site: str) -> KeyView:
    return KeyView(
        key_id=row.prefix,
        role=row.role,
        principal=row.principal,
        note=row.note,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
        site=site,
    )


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
