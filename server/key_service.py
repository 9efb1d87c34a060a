"""The use cases of API keys: each is an entry before its result is handed over."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from audit.entries import KeyBound, KeyCreated, KeyRevoked
from audit.serving_bodies import KeyReplaced
from server.errors import KeyRequestError
from server.journal import Journal
from server.keys import KeyStore, KeyView


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeKey:
    text: str
    view: KeyView
    entry: int


def create_key(
    keys: KeyStore,
    journal: Journal,
    *,
    role: str,
    expires: str | None = None,
    note: str = "",
    site: str = "",
    region: str = "",
    models: tuple[str, ...] = (),
    certificate: str = "",
) -> MadeKey:
    """Make a key; when the log cannot record it, it is revoked and nobody gets it.

    Raises:
        KeyRequestError: the role, expiry or note is not allowed.
        LedgerUnavailableError: the log could not record it.
    """
    text, view = keys.create(
        role=role, expires=parse_expiry(expires), note=note, site=site, region=region, models=models,
        certificate=certificate,
    )  # fmt: skip
    body = _created(view)
    try:
        sequenced = journal.append_now(body)
        if site:
            journal.append_now(KeyBound(key_id=view.key_id, site=site))
    except Exception:
        keys.revoke(view.key_id)
        raise
    return MadeKey(text=text, view=view, entry=sequenced.leaf_index)


def rotate_key(keys: KeyStore, journal: Journal, key_id: str, *, overlap_s: int = 86_400) -> MadeKey:
    """Make a successor for the same principal; the old key ends after `overlap_s`.

    When the log cannot record it the successor is revoked and nobody gets it; the old key ends all the same.

    Raises:
        KeyNotFoundError, KeyRequestError: there is no such key, or it stands no more.
        LedgerUnavailableError: the log could not record it.
    """
    text, view, old = keys.replace(key_id, overlap=timedelta(seconds=overlap_s))
    try:
        sequenced = journal.append_now(_created(view))
        if view.site:
            journal.append_now(KeyBound(key_id=view.key_id, site=view.site))
        journal.append_now(KeyReplaced(key_id=key_id, successor=view.key_id, expires=old.expires))
    except Exception:
        keys.revoke(view.key_id)
        raise
    return MadeKey(text=text, view=view, entry=sequenced.leaf_index)


def _created(view: KeyView) -> KeyCreated:
    return KeyCreated(
        key_id=view.key_id, role=view.role, principal=view.principal, expires=view.expires,
        region=view.region, models=view.models,
    )  # fmt: skip


def revoke_key(keys: KeyStore, journal: Journal, key_id: str) -> KeyView:
    """Revoke a key, first in the store, then in the log: a full disk never keeps a key alive.

    Raises:
        KeyNotFoundError: there is no such key.
        LedgerUnavailableError: it is revoked, but the log could not record it; do it again.
    """
    view = keys.revoke(key_id)
    journal.append_now(KeyRevoked(key_id=view.key_id))
    return view


def parse_expiry(text: str | None) -> datetime | None:
    """Read `2026-12-31` or `2026-12-31T08:00:00Z`.

    Raises:
        KeyRequestError: anything else.
    """
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise KeyRequestError(f"expires: {text!r} is no time; write 2026-12-31T08:00:00Z") from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
