"""The bodies that say who got keys, what was permitted or denied, and who read or was forgotten."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCreated:
    key_id: str
    role: str
    principal: str
    expires: str  # time, or "" for never
    region: str = ""  # where its holder asks from; "" where nobody said
    models: tuple[str, ...] = ()  # the only models it may ask; empty: any


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevoked:
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyApplied:
    policy_set: str
    schema_digest: str
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessDenied:
    """Somebody with a valid key asked for something else than a prediction that their role does not hold."""

    request_id: str
    action: str
    principal: str
    role: str
    policies: tuple[str, ...]
    policy_set: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceExported:
    leaf_index: int
    scope: str
    principal: str
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBound:
    """A node's key speaks for this site: it may read what the log says of that site."""

    key_id: str
    site: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRead:
    """Somebody read the log. The terms are in the vault: they may name a person."""

    principal: str
    role: str
    action: str  # "search" | "count" | "export" | "entry" | "bundle" | "opened" | "updates"
    query: str  # root of the terms' fields (`audit.disclosure`); unsealed: hex HMAC-SHA256 of the terms
    count: int  # entries that were shown
    subject: str = ""  # the reader's pseudonym in the vault
    sealed: str = ""  # SHA-256 of the ciphertext in the vault


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectExported:
    """Everything about one person was handed out."""

    subject: str
    entries: int
    principal: str
    role: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectErased:
    """The person's key, records and pseudonym were deleted from the vault before this was written."""

    subject: str  # the pseudonym, which now leads to nobody
    records: int
    principal: str
    role: str
    request_id: str
