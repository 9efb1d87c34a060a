"""The typed entries of the log: what may be a leaf, and how its bytes are read and signed.

An entry is an envelope (version, type, event id, nonce, time, actor) around one frozen body. Its leaf is
`encode_entry(entry)`, RFC 8785 JSON made once, at write time; readers call `decode_entry` on the stored bytes
and never write them again. A body that somebody signs carries the signature in a field of its own;
`signing_payload(body)` gives the domain and the bytes that were signed: the body without those fields.

Bodies hold strings, integers, and tuples of strings or of smaller frozen parts: nothing else can be a leaf.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from audit.bodies import (
    REFUSAL_CODES,
    RUN_FAILURE_CODES,
    TYPE_OF,
    TYPES,
    ZERO_DIGEST,
    AccessDenied,
    AuditRead,
    Body,
    CharterPublished,
    CharterSigned,
    EvidenceExported,
    GateResult,
    KeyBound,
    KeyCreated,
    KeyRevoked,
    KeyRotated,
    LogCompromised,
    LogCreated,
    MechanismEvent,
    Metric,
    PolicyApplied,
    Prediction,
    PredictionDenied,
    RoundAbandoned,
    RoundCompleted,
    RowCommitment,
    RunAccepted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteEnrolled,
    SiteEpsilon,
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    VersionRegistered,
    VersionTransition,
)
from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError
from audit.membership import SiteJoined, SiteKeysRotated, SiteLeft

__all__ = [
    "MAX_ENTRY_BYTES",
    "REFUSAL_CODES",
    "RUN_FAILURE_CODES",
    "TYPES",
    "TYPE_OF",
    "ZERO_DIGEST",
    "AccessDenied",
    "AuditRead",
    "Body",
    "CharterPublished",
    "CharterSigned",
    "Entry",
    "EntryError",
    "EvidenceExported",
    "GateResult",
    "IndexColumns",
    "KeyBound",
    "KeyCreated",
    "KeyRevoked",
    "KeyRotated",
    "LogCompromised",
    "LogCreated",
    "MechanismEvent",
    "Metric",
    "PolicyApplied",
    "Prediction",
    "PredictionDenied",
    "RoundAbandoned",
    "RoundCompleted",
    "RowCommitment",
    "RunAccepted",
    "RunCompleted",
    "RunFailed",
    "RunStarted",
    "SiteEnrolled",
    "SiteEpsilon",
    "SiteRefused",
    "SiteStatement",
    "SiteUndelivered",
    "VersionRegistered",
    "VersionTransition",
    "body_document",
    "columns_of",
    "decode_entry",
    "decode_signature",
    "encode_entry",
    "event_hash",
    "new_entry",
    "parse_body",
    "run_digest",
    "signing_payload",
]

T = TypeVar("T")

MAX_ENTRY_BYTES: Final = 65_535  # the C2SP entry bundle's limit


class EntryError(AuditError):
    """The bytes are not an entry of this release, or a field breaks its rule."""

    code = "audit.entry_malformed"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


_SIGNATURE_FIELDS: Final = ("signature", "statement_proof", "successor_proof", "witness_proof")
_DOMAINS: Final[dict[type[Any], str]] = {
    SiteEnrolled: "enrolment",
    CharterSigned: "charter",
    RunStarted: "run",
    RunAccepted: "acceptance",
    SiteRefused: "refusal",
    SiteStatement: "statement",
    VersionTransition: "transition",
    KeyRotated: "rotation",
    LogCompromised: "compromise",
    SiteJoined: "joining",
    SiteLeft: "leaving",
    SiteKeysRotated: "node-key",
}

_hints: dict[type[Any], dict[str, Any]] = {}
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")
_ACTOR = re.compile(r"[a-z0-9][a-z0-9.:_-]{0,95}")
_DIGEST_FIELDS: Final = frozenset(
    {
        "base_model",
        "charter",
        "dataset",
        "digest",
        "gate_results",
        "enrolment",
        "initial_model",
        "invitation",
        "last_round",
        "output_model",
        "policy_set",
        "previous_event",
        "previous_round",
        "previous_transition",
        "schema_digest",
        "start",
        "transition",
        "update",
        "version",
        "weights",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    event_id: str  # 32 hex; the same id twice is the same entry
    nonce: str  # 32 hex, random: a leaf cannot be guessed from its hash
    time: str  # RFC 3339, UTC, whole seconds
    actor: str
    body: Body

    def __post_init__(self) -> None:
        for name, pattern in (("event_id", _HEX32), ("nonce", _HEX32), ("time", _TIME), ("actor", _ACTOR)):
            value = getattr(self, name)
            if not pattern.fullmatch(value):
                raise EntryError(name, f"{value!r} does not match {pattern.pattern}")

    @property
    def type(self) -> str:
        return TYPE_OF[type(self.body)]

    def _repr_html_(self) -> str:
        from html import escape  # the verifier does without

        head = [("time", self.time), ("actor", self.actor)]
        rows = head + [(name, _shown(value)) for name, value in _plain(self.body).items()]
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
        return f"<table><caption>Entry {escape(self.type)}</caption>{cells}</table>"


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexColumns:
    """What the ledger lets people search by; all of it is derived from the leaf's bytes."""

    type: str
    actor: str
    time: str
    model: str | None = None
    version: str | None = None
    run: str | None = None
    site: str | None = None
    round: int | None = None
    principal: str | None = None


def new_entry(body: Body, *, actor: str, time: str, event_id: str | None = None) -> Entry:
    """Return `body` in a fresh envelope with a random nonce (and a random event id, when none is given)."""
    return Entry(
        event_id=event_id or secrets.token_hex(16),
        nonce=secrets.token_hex(16),
        time=time,
        actor=actor,
        body=body,
    )


def encode_entry(entry: Entry) -> bytes:
    """Return the leaf: canonical JSON of the envelope, at most 65 535 bytes.

    Raises:
        EntryError: a field breaks its rule, or the entry is too large.
    """
    document: dict[str, Any] = {
        "v": 1,
        "type": entry.type,
        "event_id": entry.event_id,
        "nonce": entry.nonce,
        "time": entry.time,
        "actor": entry.actor,
        "body": body_document(entry.body),
    }
    data = canonical_bytes(document)
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryError("entry", f"{len(data)} bytes; at most {MAX_ENTRY_BYTES} fit in a leaf")
    return data


def decode_entry(data: bytes) -> Entry:
    """Read a leaf's bytes strictly: canonical JSON, known type, each field present and of its kind.

    Raises:
        EntryError: anything else.
    """
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryError("entry", f"{len(data)} bytes; at most {MAX_ENTRY_BYTES} fit in a leaf")
    try:
        document = parse_canonical(data)
    except AuditError as error:
        raise EntryError("entry", str(error)) from error
    envelope = {"v", "type", "event_id", "nonce", "time", "actor", "body"}
    if not isinstance(document, dict) or set(document) != envelope:
        raise EntryError("entry", f"an envelope has exactly the fields {sorted(envelope)}")
    if document["v"] != 1 or isinstance(document["v"], bool):
        raise EntryError("v", f"schema version {document['v']!r} is not known to this release")
    kind = document["type"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise EntryError("type", f"{kind!r} is no entry type of this release")
    for name in ("event_id", "nonce", "time", "actor"):
        if not isinstance(document[name], str):
            raise EntryError(name, "is not a string")
    return Entry(
        event_id=document["event_id"],
        nonce=document["nonce"],
        time=document["time"],
        actor=document["actor"],
        body=parse_body(TYPES[kind], document["body"]),
    )


def body_document(body: Any) -> dict[str, Any]:
    """Return the body as plain JSON values, checked against its own types."""
    document: dict[str, Any] = _plain(body)
    parse_body(type(body), document)
    return document


def parse_body(kind: type[T], value: object, *, path: str = "body") -> T:
    """Build the frozen body `kind` from JSON values.

    Raises:
        EntryError: a field is missing, unknown, or of another kind; names the field's path.
    """
    if not isinstance(value, dict):
        raise EntryError(path, "is not an object")
    types = _types(kind)
    unknown, missing = sorted(set(value) - set(types)), sorted(set(types) - set(value))
    if unknown or missing:
        raise EntryError(path, f"unknown fields {unknown}, missing fields {missing}")
    return kind(**{name: _read(hint, value[name], f"{path}.{name}", name) for name, hint in types.items()})


def signing_payload(body: Any) -> tuple[str, bytes]:
    """Return the signature domain of a signed body and the canonical bytes that its signatures cover."""
    kind = type(body)
    if kind not in _DOMAINS:
        raise EntryError(kind.__name__, "nobody signs this kind of body")
    document = {key: value for key, value in _plain(body).items() if key not in _SIGNATURE_FIELDS}
    return _DOMAINS[kind], canonical_bytes(document)


def decode_signature(text: str, *, field: str = "signature") -> bytes:
    """Return the 64 bytes of a base64 Ed25519 signature, strictly."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise EntryError(field, "is not base64") from error
    if len(raw) != 64 or base64.b64encode(raw).decode() != text:
        raise EntryError(field, "is not the base64 of 64 bytes")
    return raw


def event_hash(statement: SiteStatement) -> str:
    """Return the hash that the population's next event must name as `previous_event`."""
    document = {
        "population": statement.population,
        "sequence": statement.sequence,
        "previous_event": statement.previous_event,
        "run": statement.run,
        "round": statement.round,
        "charter": statement.charter,
        "event": _plain(statement.event),
    }
    return hashlib.sha256(b"affidavit/event/v1\x00" + canonical_bytes(document)).hexdigest()


def run_digest(started: RunStarted) -> str:
    """Return the hash by which an acceptance names the one start that it accepts, author included."""
    _, payload = signing_payload(started)
    return hashlib.sha256(b"affidavit/run-start/v1\x00" + payload).hexdigest()


def columns_of(data: bytes) -> IndexColumns:
    """Derive the ledger's search columns from a leaf's bytes; the only way they are ever made."""
    entry = decode_entry(data)
    body: Any = entry.body
    source = body.statement if isinstance(body, SiteUndelivered) else body

    def text(name: str) -> str | None:
        value = getattr(source, name, None)
        return value if isinstance(value, str) and value else None

    number = getattr(source, "round", None)
    return IndexColumns(
        type=entry.type,
        actor=entry.actor,
        time=entry.time,
        model=text("model"),
        version=text("version"),
        run=text("run"),
        site=text("site"),
        round=number if isinstance(number, int) else None,
        principal=text("principal"),
    )


def _types(kind: type[Any]) -> dict[str, Any]:
    hints = _hints.get(kind)
    if hints is None:
        hints = _hints[kind] = get_type_hints(kind)
    return hints


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else canonical_bytes(value).decode()
    return text if len(text) <= 120 else f"{text[:120]}…"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _read(hint: Any, value: object, path: str, name: str) -> Any:
    if hint is str:
        if not isinstance(value, str):
            raise EntryError(path, "is not a string")
        if name in _DIGEST_FIELDS and not _HEX64.fullmatch(value):
            raise EntryError(path, f"{value!r} is not a lower-case hex SHA-256")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise EntryError(path, "is not an integer")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise EntryError(path, "is not an array")
        item = get_args(hint)[0]
        return tuple(_read(item, part, f"{path}[{i}]", "") for i, part in enumerate(value))
    return parse_body(hint, value, path=path)
