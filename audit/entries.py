"""The typed entries of the log: what may be a leaf, and how its bytes are read and signed.

An entry is an envelope (version, type, event id, nonce, time, actor) around one frozen body. Its leaf is
`encode_entry(entry)`, RFC 8785 JSON made once, at write time; readers call `decode_entry` on the stored bytes
and never write them again. A body that somebody signs carries the signature in a field of its own;
`signing_payload(body)` gives the domain and the bytes that were signed: the body without those fields.
A field that a later release added has a default and is left out where it has that value, so that one body
has one form and older leaves are read as they were written.

Bodies hold strings, integers, and tuples of strings or of smaller frozen parts: nothing else can be a leaf.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from audit._codec import ODD, reader_of, writer_of
from audit._domains import DOMAINS, SIGNATURE_FIELDS
from audit.access_bodies import (
    AccessDenied,
    AuditRead,
    EvidenceExported,
    KeyBound,
    KeyCreated,
    KeyRevoked,
    PolicyApplied,
    SubjectErased,
    SubjectExported,
)
from audit.bodies import (
    TYPE_OF,
    TYPES,
    ZERO_DIGEST,
    Body,
    CharterPublished,
    CharterSigned,
    GateResult,
    KeyRotated,
    LogCompromised,
    LogCreated,
    MechanismEvent,
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
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    VersionRegistered,
    VersionTransition,
)
from audit.canonical import canonical_bytes, parse_canonical
from audit.chance import TIME, entry_names
from audit.cost_bodies import SiteEpsilon
from audit.errors import AuditError
from audit.refusal_codes import REFUSAL_CODES, RUN_FAILURE_CODES
from audit.round_bodies import Metric

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
    "SubjectErased",
    "SubjectExported",
    "VersionRegistered",
    "VersionTransition",
    "body_bytes",
    "body_document",
    "columns_of",
    "decode_entry",
    "decode_signature",
    "encode_entry",
    "event_hash",
    "index_columns",
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


_HASHED: Final = ("population", "sequence", "previous_event", "run", "round", "charter", "event")
_NOT_HASHED: Final = frozenset(field.name for field in dataclasses.fields(SiteStatement)) - {*_HASHED}
_HASHED_KEPT: Final = 256
_hashed: dict[int, tuple[SiteStatement, str]] = {}  # by identity: an odometer asks for the same one again
_hints: dict[type[Any], dict[str, Any]] = {}
_defaults: dict[type[Any], dict[str, Any]] = {}
_columns_in: dict[type[Any], tuple[str, ...]] = {}
_BODY_COLUMNS: Final = ("model", "version", "run", "site", "round", "principal", "subject")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_ACTOR = re.compile(r"[a-z0-9][a-z0-9.:_-]{0,95}")
_DIGEST_FIELDS: Final = frozenset([
    "base_model", "charter", "context", "dataset", "digest", "gate_results", "enrolment",
    "initial_model", "invitation", "last_round", "output_model", "policy_set", "prediction",
    "previous_change", "previous_event", "previous_round", "previous_transition", "roster", "rows_root",
    "schema_digest", "sealed", "start", "total", "transcript", "transition", "update", "version",
    "weights",
])  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    event_id: str  # 32 hex; the same id twice is the same entry
    nonce: str  # 32 hex, random: a leaf cannot be guessed from its hash
    time: str  # RFC 3339, UTC, whole seconds
    actor: str
    body: Body

    def __post_init__(self) -> None:
        for name, pattern in (("event_id", _HEX32), ("nonce", _HEX32), ("time", TIME), ("actor", _ACTOR)):
            value = getattr(self, name)
            if not pattern.fullmatch(value):
                raise EntryError(name, f"{value!r} does not match {pattern.pattern}")

    @property
    def type(self) -> str:
        return TYPE_OF[type(self.body)]

    def _repr_html_(self) -> str:
        from html import escape  # the verifier does without

        parts = [("time", self.time), ("actor", self.actor), *_plain(self.body).items()]
        rows = [(name, v if isinstance(v, str) else canonical_bytes(v).decode()) for name, v in parts]
        line = "<tr><th>{}</th><td>{}</td></tr>".format
        cells = "".join(line(escape(n), escape(t[:120] + "…" * (len(t) > 120))) for n, t in rows)
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
    subject: str | None = None


def new_entry(body: Body, *, actor: str, time: str, event_id: str | None = None) -> Entry:
    """Return `body` in a fresh envelope with a random nonce (and a new event id, when none is given)."""
    fresh_id, nonce = entry_names(time)
    return Entry(
        event_id=event_id or fresh_id,
        nonce=nonce,
        time=time,
        actor=actor,
        body=body,
    )


def encode_entry(entry: Entry) -> bytes:
    """Return the leaf: canonical JSON of the envelope, at most 65 535 bytes.

    Raises:
        EntryError: a field breaks its rule, or the entry is too large.
    """
    try:
        data = _write(entry)
    except ODD:
        data = canonical_bytes(_document(entry))
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryError("entry", f"{len(data)} bytes; at most {MAX_ENTRY_BYTES} fit in a leaf")
    return data


def _write(entry: Entry) -> bytes:
    kind = type(entry.body)
    body = writer_of(kind, _DIGEST_FIELDS)(entry.body)
    # what the envelope's patterns allow needs no escape
    return (
        f'{{"actor":"{entry.actor}","body":{body},"event_id":"{entry.event_id}","nonce":"{entry.nonce}",'
        f'"time":"{entry.time}","type":"{TYPE_OF[kind]}","v":1}}'
    ).encode()


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "v": 1,
        "type": entry.type,
        "event_id": entry.event_id,
        "nonce": entry.nonce,
        "time": entry.time,
        "actor": entry.actor,
        "body": body_document(entry.body),
    }


def decode_entry(data: bytes) -> Entry:
    """Read a leaf's bytes strictly: canonical JSON, known type, each field present and of its kind.

    Raises:
        EntryError: anything else.
    """
    if len(data) > MAX_ENTRY_BYTES:
        raise EntryError("entry", f"{len(data)} bytes; at most {MAX_ENTRY_BYTES} fit in a leaf")
    try:
        entry = _read_entry(json.loads(data.decode()))
        if _write(entry) == data:  # one value has one canonical form, so nothing else needs a look
            return entry
    except (*ODD, EntryError):
        pass  # the long way says what is wrong, and where
    return _decode_slowly(data)


def _read_entry(document: dict[str, Any]) -> Entry:
    body = reader_of(TYPES[document["type"]])(document["body"])
    return Entry(
        event_id=document["event_id"],
        nonce=document["nonce"],
        time=document["time"],
        actor=document["actor"],
        body=body,
    )


def _decode_slowly(data: bytes) -> Entry:
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
    try:
        writer_of(type(body), _DIGEST_FIELDS)(body)  # what it writes is of its types
    except ODD:
        parse_body(type(body), document)
    return document


def body_bytes(body: Any) -> bytes:
    """Return the canonical bytes of `body_document(body)`."""
    try:
        return writer_of(type(body), _DIGEST_FIELDS)(body).encode()
    except ODD:
        return canonical_bytes(body_document(body))


def parse_body(kind: type[T], value: object, *, path: str = "body") -> T:
    """Build the frozen body `kind` from JSON values.

    Raises:
        EntryError: a field is missing, unknown, or of another kind; names the field's path.
    """
    try:
        body: T = reader_of(kind)(value)
        writer_of(kind, _DIGEST_FIELDS)(body)
    except (*ODD, EntryError):
        return _parse_slowly(kind, value, path)  # says what is wrong, and where
    return body


def _parse_slowly(kind: type[T], value: object, path: str) -> T:
    if not isinstance(value, dict):
        raise EntryError(path, "is not an object")
    types, later = _types(kind), _later(kind)
    unknown = sorted(set(value) - set(types))
    missing = sorted(set(types) - set(value) - set(later))
    if unknown or missing:
        raise EntryError(path, f"unknown fields {unknown}, missing fields {missing}")
    for name, default in later.items():
        if name in value and value[name] in (default, _plain(default)):
            raise EntryError(f"{path}.{name}", "is left out where it is empty")
    return kind(
        **{
            name: _read(hint, value[name], f"{path}.{name}", name)
            for name, hint in types.items()
            if name in value
        }
    )


def signing_payload(body: Any) -> tuple[str, bytes]:
    """Return the signature domain of a signed body and the canonical bytes that its signatures cover."""
    kind = type(body)
    if kind not in DOMAINS:
        raise EntryError(kind.__name__, "nobody signs this kind of body")
    try:
        return DOMAINS[kind], writer_of(kind, _DIGEST_FIELDS, SIGNATURE_FIELDS)(body).encode()
    except ODD:
        document = {key: value for key, value in _plain(body).items() if key not in SIGNATURE_FIELDS}
        return DOMAINS[kind], canonical_bytes(document)


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
    known = _hashed.get(id(statement))
    if known is None or known[0] is not statement:
        try:
            data = writer_of(SiteStatement, _DIGEST_FIELDS, _NOT_HASHED)(statement).encode()
        except ODD:
            data = canonical_bytes({name: _plain(getattr(statement, name)) for name in _HASHED})
        if len(_hashed) >= _HASHED_KEPT:
            _hashed.clear()
        _hashed[id(statement)] = known = (
            statement,
            hashlib.sha256(b"affidavit/event/v1\x00" + data).hexdigest(),
        )
    return known[1]


def run_digest(started: RunStarted) -> str:
    """Return the hash by which an acceptance names the one start that it accepts, author included."""
    _, payload = signing_payload(started)
    return hashlib.sha256(b"affidavit/run-start/v1\x00" + payload).hexdigest()


def columns_of(data: bytes) -> IndexColumns:
    """Derive the ledger's search columns from a leaf's bytes."""
    return index_columns(decode_entry(data))


def index_columns(entry: Entry) -> IndexColumns:
    """Return what `columns_of` derives from this entry's leaf."""
    body: Any = entry.body
    source = body.statement if isinstance(body, SiteUndelivered) else body
    columns: dict[str, Any] = {name: getattr(source, name) or None for name in _searched(type(source))}
    if "round" in columns:
        columns["round"] = source.round
    return IndexColumns(type=entry.type, actor=entry.actor, time=entry.time, **columns)


def _searched(kind: type[Any]) -> tuple[str, ...]:
    """The fields of `kind` that are columns too, and hold what the column does."""
    names = _columns_in.get(kind)
    if names is None:
        kinds = {name: int if name == "round" else str for name in _BODY_COLUMNS}
        names = tuple(name for name, held in kinds.items() if _types(kind).get(name) is held)
        _columns_in[kind] = names
    return names


def _types(kind: type[Any]) -> dict[str, Any]:
    hints = _hints.get(kind)
    if hints is None:
        hints = _hints[kind] = get_type_hints(kind)
    return hints


def _later(kind: type[Any]) -> dict[str, Any]:
    """Return the fields that a later release added, with the value for which they are left out."""
    found = _defaults.get(kind)
    if found is None:
        fields = dataclasses.fields(kind)
        found = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        _defaults[kind] = found
    return found


def _plain(value: Any) -> Any:
    if type(value) is str or type(value) is int:
        return value
    if dataclasses.is_dataclass(value):
        later = _later(type(value))
        return {
            name: _plain(item)
            for name in _types(type(value))
            if (item := getattr(value, name)) != later.get(name, dataclasses.MISSING)
        }
    if isinstance(value, tuple):
        if value and type(value[0]) is str:  # names of hundreds of sites
            return list(value)
        return [_plain(item) for item in value]
    return value


def _read(hint: Any, value: object, path: str, name: str) -> Any:
    if hint is str:
        if not isinstance(value, str):
            raise EntryError(path, "is not a string")
        if name in _DIGEST_FIELDS and not _HEX64.fullmatch(value):
            raise EntryError(path, f"{value!r} is not a lower-case hex SHA-256")
        if name == "subject" and not _HEX32.fullmatch(value):
            raise EntryError(path, "is not a pseudonym of 32 hex digits; a leaf never names a person")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise EntryError(path, "is not an integer")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise EntryError(path, "is not an array")
        item = get_args(hint)[0]
        if item is str and all(type(part) is str for part in value):
            return tuple(value)
        return tuple(_read(item, part, f"{path}[{i}]", "") for i, part in enumerate(value))
    return parse_body(hint, value, path=path)
