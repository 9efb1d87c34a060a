"""API keys and other proofs of identity: who holds one, in which role, until when.

A key reads `affidavit_<prefix>_<secret>`. The prefix finds its row; the secret (32 random bytes) is kept only
as an argon2id hash. The holder's principal is a random pseudonym: the log never carries a name. A row may be
bound to a client certificate instead, by its SHA-256, and then has no secret; and a token's subject gets its
pseudonym here too (`server.oidc`).

A verified key is remembered by its SHA-256, so that argon2 is not paid on each call, and its row for at most
`recheck_s`: so long does a revocation by another process take. Revocation by this process, by the log (which
`server.rules` follows) and expiry take effect at once. The rows are in `keys.db` of the coordinator's home,
or beside a log in PostgreSQL, where every machine sees them.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, select

from audit._store import translated
from audit.principal import ROLES, Principal
from server.errors import KeyNotFoundError, KeyRequestError, TooBusyError, UnauthenticatedError
from server.key_tables import ApiKey, KeySite, KeyTerms, TokenSubject, open_key_engine

MAX_RECHECK_S: Final = 5.0
_KEY = re.compile(r"affidavit_([a-z2-7]{16})_([A-Za-z0-9_-]{43})")
_NOTE = re.compile(r"[ -~]{0,80}")
_SITE = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_CACHE_SIZE: Final = 4_096
_VERIFYING_AT_ONCE: Final = 4
_NO_SECRET: Final = "certificate"  # noqa: S105 - in place of a hash; no secret verifies against it
_HASHER: Final = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)  # OWASP's second choice
_REFUSED: Final = "the API key is absent, unknown, revoked or expired"

Clock = Callable[[], datetime]


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
    region: str = ""
    models: tuple[str, ...] = ()
    certificate: str = ""


@dataclass(slots=True)
class _Known:
    """A key whose secret was verified, and its row as it was read."""

    principal: Principal
    prefix: str
    expires: str
    row_until: float  # monotonic seconds
    secret_until: float


class KeyStore:
    """The keys of one coordinator."""

    def __init__(
        self,
        home: Path,
        clock: Clock,
        *,
        cache_s: float = 60.0,
        recheck_s: float = 2.0,
        patience_s: float = 2.0,
        hasher: PasswordHasher = _HASHER,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= recheck_s <= MAX_RECHECK_S:
            raise ValueError(f"a revocation takes effect within {MAX_RECHECK_S} s, not {recheck_s}")
        self._engine = open_key_engine(home)
        self._clock, self._cache_s, self._recheck_s = clock, cache_s, recheck_s
        self._hasher, self._patience_s, self._monotonic = hasher, patience_s, monotonic
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._subjects: dict[str, str] = {}
        self._forgotten = 0  # grows whenever a key is forgotten, so that a look-up under way does not keep it
        self._lock = threading.Lock()
        self._turns: dict[bytes, tuple[threading.Lock, int]] = {}  # key -> who looks it up, and how many wait
        self._verifying = threading.BoundedSemaphore(_VERIFYING_AT_ONCE)

    def create(
        self,
        *,
        role: str,
        expires: datetime | None = None,
        note: str = "",
        site: str = "",
        region: str = "",
        models: tuple[str, ...] = (),
        certificate: str = "",
    ) -> tuple[str, KeyView]:
        """Make a key and return its text, which nobody can show again, and its view.

        With `certificate` (hex SHA-256 of its DER form) whoever holds it is known by that, and the text is
        "".

        Raises:
            KeyRequestError: the role is unknown, a word is not plain, the expiry has passed, or the
            certificate
                is another key's already.
        """
        if role not in ROLES:
            raise KeyRequestError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
        if site and (role != "node" or not _SITE.fullmatch(site)):
            raise KeyRequestError(
                f"site {site[:70]!r}: only a node's key has one, in lower-case letters, digits, -"
            )
        if region and not _SITE.fullmatch(region):
            raise KeyRequestError(f"region {region[:70]!r}: lower-case letters, digits, -")
        if len(models) > 64 or not all(map(_MODEL.fullmatch, models)):
            raise KeyRequestError("models: at most 64 names of models")
        if certificate and not _FINGERPRINT.fullmatch(certificate):
            raise KeyRequestError("certificate: the hex SHA-256 of its DER form")
        if not _NOTE.fullmatch(note):
            raise KeyRequestError("note: at most 80 printable ASCII characters")
        now = self._clock()
        if expires is not None and (expires.tzinfo is None or expires <= now):
            raise KeyRequestError("expires: give a time in the future, with its zone")
        if certificate and self._of_certificate(certificate) is not None:
            raise KeyRequestError("certificate: a key that stands is bound to it; revoke that one first")
        text, row = self._new(role, expires, note, has_secret=not certificate)
        terms = KeyTerms(
            prefix=row.prefix, principal="", region=region, models=",".join(sorted(set(models))),
            certificate=certificate,
        )  # fmt: skip
        return text, self._store(row, site, terms)

    def replace(self, key_id: str, *, overlap: timedelta) -> tuple[str, KeyView, KeyView]:
        """Make a successor for the same principal, and let the old key end after `overlap`.

        Returns:
            The successor's text, its view, and the old key's.

        Raises:
            KeyNotFoundError: there is no such key.
            KeyRequestError: it is revoked, over, or bound to a certificate.
        """
        view = self.get(key_id)
        now = _text(self._clock())
        if view.revoked or (view.expires and view.expires <= now) or view.certificate:
            raise KeyRequestError(f"key {key_id}: is revoked, over or a certificate's; make a new one")
        ends = _text(self._clock() + overlap)
        text, row = self._new(view.role, None, view.note, has_secret=True)
        row.expires = view.expires
        terms = KeyTerms(
            prefix=row.prefix, principal=view.principal, region=view.region, models=",".join(view.models),
            certificate="",
        )  # fmt: skip
        made = self._store(row, view.site, terms)
        with self._session() as session:
            old = session.get(ApiKey, key_id)
            if old is not None and (not old.expires or old.expires > ends):
                old.expires = ends
                session.add(old)
                session.commit()
        self._forget(key_id)
        return text, made, self.get(key_id)

    def list(self) -> tuple[KeyView, ...]:
        with self._session() as session:
            sites = {row.prefix: row.site for row in session.exec(select(KeySite))}
            terms = {row.prefix: row for row in session.exec(select(KeyTerms))}
            rows = session.exec(select(ApiKey).order_by("created", "prefix"))
            return tuple(_view(row, sites.get(row.prefix, ""), terms.get(row.prefix)) for row in rows)

    def get(self, key_id: str) -> KeyView:
        view = self._row(key_id)
        if view is None:
            raise KeyNotFoundError(f"no key {key_id!r}; `affidavit keys list` shows the ids")
        return view[1]

    def revoke(self, key_id: str) -> KeyView:
        """Revoke at once, and for good; revoking twice changes nothing.

        Raises:
            KeyNotFoundError: there is no such key.
        """
        with self._session() as session:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise KeyNotFoundError(f"no key {key_id!r}; `affidavit keys list` shows the ids")
            if not row.revoked:
                row.revoked = _text(self._clock())
                session.add(row)
                session.commit()
        self._forget(key_id)
        return self.get(key_id)

    def revoked_in_log(self, key_id: str) -> None:
        """The log says that this key is revoked: so it is, whatever a restored store says."""
        self._forget(key_id)
        try:
            self.revoke(key_id)
        except KeyNotFoundError:
            return

    def recall(self, text: str) -> Principal | None:
        """Return a remembered key's principal, touching no database; None when it must be looked up."""
        known = self._known.get(hashlib.sha256(text.encode()).digest())
        if known is None or known.row_until <= self._monotonic():
            return None
        if known.expires and known.expires <= _text(self._clock()):
            return None
        return known.principal

    def authenticate(self, text: str) -> Principal:
        """Return the principal that holds the key. Costs about 30 ms when the key is not remembered.

        Raises:
            UnauthenticatedError: for every reason alike.
            TooBusyError: too many unremembered keys are being checked at once.
        """
        recalled = self.recall(text)
        if recalled is not None:
            return recalled
        digest = hashlib.sha256(text.encode()).digest()
        with self._turn(digest):  # a crowd with one key costs one look-up
            return self.recall(text) or self._look_up(text, digest)

    def _look_up(self, text: str, digest: bytes) -> Principal:
        match, forgotten = _KEY.fullmatch(text), self._forgotten
        found = self._row(match.group(1)) if match else None
        if match is None or found is None or not self._stands(found[1]):
            raise UnauthenticatedError(_REFUSED)
        secret_hash, view = found
        now = self._monotonic()
        known = self._known.get(digest)
        secret_until = known.secret_until if known is not None else 0.0
        if secret_until <= now:
            self._verify(secret_hash, match.group(2))
            secret_until = now + self._cache_s
        principal = _principal(view, "key")
        self._remember(
            digest,
            _Known(
                principal, view.key_id, view.expires, min(now + self._recheck_s, secret_until), secret_until
            ),
            forgotten,
        )
        return principal

    def authenticate_certificate(self, fingerprint: str) -> Principal:
        """Return the principal to whom a client certificate is bound; the caller proved that it is held.

        Raises:
            UnauthenticatedError: no key that stands is bound to it.
        """
        view = self._of_certificate(fingerprint)
        if view is None:
            raise UnauthenticatedError("the client certificate is unknown, revoked or expired")
        return _principal(view, "certificate")

    def pseudonym(self, issuer: str, subject: str) -> str:
        """Return the random pseudonym of a token's subject, made at their first visit."""
        digest = hashlib.sha256(f"{issuer}\0{subject}".encode()).hexdigest()
        known = self._subjects.get(digest)
        if known is not None:
            return known
        with self._session() as session:
            row = session.get(TokenSubject, digest)
            if row is None:
                row = TokenSubject(
                    digest=digest, principal="p-" + secrets.token_hex(16), created=_text(self._clock())
                )
                session.add(row)
                try:
                    session.commit()
                except IntegrityError:  # another worker met them first
                    session.rollback()
                    row = session.get(TokenSubject, digest)
            if row is None:
                raise TooBusyError("could not store the pseudonym; try again")
            found = row.principal
        if len(self._subjects) >= _CACHE_SIZE:
            self._subjects.clear()
        self._subjects[digest] = found
        return found

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Session]:
        """A session whose database's faults leave as the ledger's errors: nobody is let in by a guess."""
        with translated(), Session(self._engine) as session:
            yield session

    def _new(self, role: str, expires: datetime | None, note: str, *, has_secret: bool) -> tuple[str, ApiKey]:
        prefix = base64.b32encode(secrets.token_bytes(10)).decode().lower()
        secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        row = ApiKey(
            prefix=prefix,
            secret_hash=self._hasher.hash(secret) if has_secret else _NO_SECRET,
            role=role,
            principal="p-" + secrets.token_hex(16),
            note=note,
            created=_text(self._clock()),
            expires=_text(expires) if expires else "",
            revoked="",
        )
        return f"affidavit_{prefix}_{secret}" if has_secret else "", row

    def _store(self, row: ApiKey, site: str, terms: KeyTerms) -> KeyView:
        view = _view(row, site, terms)
        with self._session() as session:
            session.add(row)
            if site:
                session.add(KeySite(prefix=row.prefix, site=site))
            if terms.principal or terms.region or terms.models or terms.certificate:
                session.add(terms)
            try:
                session.commit()
            except IntegrityError as error:  # an 80-bit prefix met twice
                raise TooBusyError("could not store the key; try again") from error
        return view

    def _row(self, prefix: str) -> tuple[str, KeyView] | None:
        with self._session() as session:
            found = session.exec(_JOINED.where(ApiKey.prefix == prefix)).first()
            if found is None:
                return None
            row, site, terms = _split(found)
            return row.secret_hash, _view(row, "" if site is None else site.site, terms)

    def _of_certificate(self, fingerprint: str) -> KeyView | None:
        with self._session() as session:
            rows = session.exec(_JOINED.where(KeyTerms.certificate == fingerprint)).all()
            views = [
                _view(row, "" if site is None else site.site, terms) for row, site, terms in map(_split, rows)
            ]
        return next((view for view in views if self._stands(view)), None)

    def _stands(self, view: KeyView) -> bool:
        return not view.revoked and not (view.expires and view.expires <= _text(self._clock()))

    @contextlib.contextmanager
    def _turn(self, digest: bytes) -> Iterator[None]:
        """One caller at a time for each key; TooBusyError: it takes too long."""
        with self._lock:
            turn, waiting = self._turns.get(digest, (threading.Lock(), 0))
            self._turns[digest] = turn, waiting + 1
        try:
            if not turn.acquire(timeout=self._patience_s):
                raise TooBusyError("too many ask with this key while it is checked; try again")
            try:
                yield
            finally:
                turn.release()
        finally:
            with self._lock:
                turn, waiting = self._turns.pop(digest)
                if waiting > 1:
                    self._turns[digest] = turn, waiting - 1

    def _verify(self, secret_hash: str, secret: str) -> None:
        if not self._verifying.acquire(timeout=self._patience_s):
            raise TooBusyError("too many keys are being checked; try again")
        try:
            self._hasher.verify(secret_hash, secret)
        except (VerificationError, InvalidHashError, binascii.Error) as error:
            raise UnauthenticatedError(_REFUSED) from error
        finally:
            self._verifying.release()

    def _forget(self, prefix: str) -> None:
        with self._lock:
            self._forgotten += 1
            for digest in [digest for digest, known in self._known.items() if known.prefix == prefix]:
                del self._known[digest]

    def _remember(self, digest: bytes, known: _Known, forgotten: int) -> None:
        with self._lock:
            if forgotten != self._forgotten:
                return
            self._known[digest] = known
            self._known.move_to_end(digest)
            while len(self._known) > _CACHE_SIZE:
                self._known.popitem(last=False)


_JOINED: Final = (
    select(ApiKey, KeySite, KeyTerms)
    .join(KeySite, KeySite.prefix == ApiKey.prefix, isouter=True)  # type: ignore[arg-type]
    .join(KeyTerms, KeyTerms.prefix == ApiKey.prefix, isouter=True)  # type: ignore[arg-type]
)


def _split(found: Any) -> tuple[ApiKey, KeySite | None, KeyTerms | None]:
    """An outer join's row: what it did not find is None, which the types of a select do not say."""
    row, site, terms = found
    return row, site, terms


def _principal(view: KeyView, method: str) -> Principal:
    return Principal(
        id=view.principal,
        role=view.role,
        site=view.site,
        region=view.region,
        models=view.models,
        method=method,
    )


def _view(row: ApiKey, site: str, terms: KeyTerms | None) -> KeyView:
    return KeyView(
        key_id=row.prefix,
        role=row.role,
        principal=(terms.principal if terms else "") or row.principal,
        note=row.note,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
        site=site,
        region=terms.region if terms else "",
        models=tuple(terms.models.split(",")) if terms and terms.models else (),
        certificate=terms.certificate if terms else "",
    )


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
