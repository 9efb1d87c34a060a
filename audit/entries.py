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

from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError

T = TypeVar("T")

ZERO_DIGEST: Final = "0" * 64
MAX_ENTRY_BYTES: Final = 65_535  # the C2SP entry bundle's limit

REFUSAL_CODES: Final = frozenset(
    {
        "already_released",
        "bad_request",
        "base_model_mismatch",
        "budget_exhausted",
        "charter_not_approved",
        "contract_not_met",
        "internal_error",
        "ledger_behind_log",
        "participants_not_allowed",
        "purpose_not_allowed",
        "round_out_of_order",
        "run_not_accepted",
        "site_closed",
        "unwitnessed_history",
    }
)
"""All that a site ever says about why it did not answer; file, row and reason stay on its own console."""

RUN_FAILURE_CODES: Final = frozenset({"coordinator_error", "not_enough_sites", "site_refused", "stopped"})


class EntryError(AuditError):
    """The bytes are not an entry of this release, or a field breaks its rule."""

    code = "audit.entry_malformed"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCreated:
    origin: str
    log_key: str  # vkey, type 0x01


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEnrolled:
    """A site's identity key delegates three keys; each that signs proves itself over the same payload."""

    site: str
    population: str  # random pseudonym of the people behind the data
    identity_key: str
    statement_key: str
    witness_key: str  # vkey, type 0x04
    agreement_key: str  # X25519 public key, base64
    signature: str
    statement_proof: str
    witness_proof: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterPublished:
    digest: str
    canonical: str  # the canonical bytes of the charter, as text
    author: str  # public key of whoever drew it up


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterSigned:
    digest: str
    site: str
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted:
    run: str
    charter: str
    model: str
    author: str  # public key; signs this body
    sites: tuple[str, ...]
    rounds: int
    initial_model: str
    code: str  # digest of the aggregation code
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAccepted:
    run: str
    charter: str
    site: str
    population: str
    next_sequence: int
    previous_event: str
    planned_events: int
    lifetime_epsilon_cap: str
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRefused:
    run: str
    charter: str
    site: str
    round: int  # 0: the run as a whole
    reason: str
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismEvent:
    """One noised release in whole numbers: noise multiplier = sigma_grid / sensitivity_grid."""

    mechanism: str  # "discrete_gaussian"
    sampling: str  # "full" | "poisson"
    sample_rate: str
    steps: int
    sigma_grid: int
    sensitivity_grid: int
    dimension: int
    grid_bits: int
    relation: str  # "add_remove" | "zero_out" | "replace_one"
    unit: str  # "row" | "subject"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatement:
    """What a site signs for one release."""

    run: str
    round: int
    charter: str
    site: str
    population: str
    base_model: str
    participants: tuple[str, ...]
    agent_code: str
    previous_round: str  # leaf hash of the previous round's entry; zeros for round 1
    event: MechanismEvent
    sequence: int  # 1, 2, 3 … over the life of the population
    previous_event: str  # hash of event sequence-1; zeros for the first
    update: str  # digest of the update file as sent
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUndelivered:
    """A release that was debited and never reached its round; it stays debited."""

    statement: SiteStatement


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    value: str
    source: str  # "public_set"
    dataset: str  # digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCompleted:
    run: str
    round: int
    base_model: str
    statements: tuple[str, ...]  # leaf hashes, in the order of the sites' names
    missing: tuple[str, ...]  # sites that gave none
    output_model: str
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAbandoned:
    run: str
    round: int
    reason: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCompleted:
    run: str
    charter: str
    rounds: int
    last_round: str  # leaf hash of the last round's entry
    weights: str  # digest of the averaged weights


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed:
    run: str
    charter: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    metric: str
    source: str
    dataset: str
    floor: str
    baseline: str
    value: str
    passed: int  # 1 or 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEpsilon:
    """What a run cost one site's population, and what that population has spent in all."""

    site: str
    population: str
    events: int
    run_epsilon: str
    run_epsilon_rdp: str
    lifetime_epsilon: str
    delta: str
    accountant: str
    relation: str
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRegistered:
    version: str  # digest of the weights file
    model: str
    charter: str
    run: str
    author: str
    averaged_from: int  # first round of the average
    averaged_to: int
    gates: tuple[GateResult, ...]
    epsilons: tuple[SiteEpsilon, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTransition:
    """candidate -> approved -> live -> retired, each by a person's own key."""

    version: str
    model: str
    charter: str
    from_state: str
    to_state: str
    gate_results: str  # leaf hash of version.registered
    previous_transition: str  # leaf hash of the model's previous transition; zeros for the first
    officer: str  # public key
    reason: str
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyCreated:
    key_id: str
    role: str
    principal: str
    expires: str  # time, or "" for never


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRevoked:
    key_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyApplied:
    policy_set: str
    schema_digest: str
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCommitment:
    input: str
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A decision to allow and the answer it allowed, in one entry."""

    request_id: str
    model: str
    version: str
    charter: str
    transition: str  # leaf hash of the transition that made the version live
    purpose: str
    principal: str
    role: str
    site: str  # whose intercept was used; "" for none
    policies: tuple[str, ...]
    policy_set: str
    rows: tuple[RowCommitment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionDenied:
    request_id: str
    model: str
    purpose: str
    principal: str
    role: str
    reason: str
    policies: tuple[str, ...]
    policy_set: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessDenied:
    """Somebody with a valid key asked for something, other than a prediction, that their role does not hold."""

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


Body = (
    LogCreated
    | SiteEnrolled
    | CharterPublished
    | CharterSigned
    | RunStarted
    | RunAccepted
    | SiteRefused
    | SiteStatement
    | SiteUndelivered
    | RoundCompleted
    | RoundAbandoned
    | RunCompleted
    | RunFailed
    | VersionRegistered
    | VersionTransition
    | KeyCreated
    | KeyRevoked
    | PolicyApplied
    | Prediction
    | PredictionDenied
    | AccessDenied
    | EvidenceExported
)

TYPES: Final[dict[str, type[Any]]] = {
    "log.created": LogCreated,
    "site.enrolled": SiteEnrolled,
    "site.refused": SiteRefused,
    "site.statement": SiteStatement,
    "site.undelivered": SiteUndelivered,
    "charter.published": CharterPublished,
    "charter.signed": CharterSigned,
    "run.started": RunStarted,
    "run.accepted": RunAccepted,
    "run.completed": RunCompleted,
    "run.failed": RunFailed,
    "round.completed": RoundCompleted,
    "round.abandoned": RoundAbandoned,
    "version.registered": VersionRegistered,
    "version.transition": VersionTransition,
    "key.created": KeyCreated,
    "key.revoked": KeyRevoked,
    "policy.applied": PolicyApplied,
    "prediction": Prediction,
    "prediction.denied": PredictionDenied,
    "access.denied": AccessDenied,
    "evidence.exported": EvidenceExported,
}
TYPE_OF: Final[dict[type[Any], str]] = {body: name for name, body in TYPES.items()}

_SIGNATURE_FIELDS: Final = ("signature", "statement_proof", "witness_proof")
_DOMAINS: Final[dict[type[Any], str]] = {
    SiteEnrolled: "enrolment",
    CharterSigned: "charter",
    RunStarted: "run",
    RunAccepted: "acceptance",
    SiteRefused: "refusal",
    SiteStatement: "statement",
    VersionTransition: "transition",
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
        "initial_model",
        "last_round",
        "output_model",
        "policy_set",
        "previous_event",
        "previous_round",
        "previous_transition",
        "schema_digest",
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
