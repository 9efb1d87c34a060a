"""The bodies of the entries: one frozen dataclass a type, of strings, integers, tuples and smaller parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

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
from audit.cost_bodies import SiteEpsilon, unpack_costs
from audit.membership import MEMBERSHIP_TYPES, MembershipBody
from audit.packing import unpack_digests, unpack_text
from audit.round_bodies import ROUND_TYPES, Metric, RoundBody
from audit.runtime_bodies import PredictionShadowed, VersionExported
from audit.secure_bodies import RoundOpened
from audit.serving_bodies import SERVING_TYPES, ServingBody
from audit.site_bodies import BundleDecided, RequestRefused, SiteDecided, SiteLogOpened

ZERO_DIGEST: Final = "0" * 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCreated:
    origin: str
    log_key: str  # vkey, type 0x01


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRotated:
    """A second key takes over; both sign this body, and every checkpoint until the first one retires."""

    log_key: str  # vkey that retires
    new_key: str  # vkey of the same name
    retire_at: int  # tree size; on larger trees the first key's signature counts for nothing
    signature: str  # by the key that retires
    successor_proof: str  # by the new key


@dataclass(frozen=True, slots=True, kw_only=True)
class LogCompromised:
    """Somebody else may have the key: what it signed on larger trees than `valid_size` never counted."""

    log_key: str  # vkey
    valid_size: int
    successor: str  # vkey that signs from now on
    reason: str
    signature: str  # by the successor


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEnrolled:
    """A site's identity key delegates three keys; each that signs proves itself over the same payload."""

    site: str
    origin: str  # the one log that the site follows, from its own policy
    population: str  # random pseudonym of the people behind the data
    identity_key: str
    statement_key: str
    witness_key: str  # vkey, type 0x04
    agreement_key: str  # X25519 public key, base64
    signature: str
    statement_proof: str
    witness_proof: str
    operator: str = ""  # who runs the site's machines, where they run other sites too; as it says itself


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterPublished:
    digest: str
    canonical: str  # the canonical bytes of the charter, as text
    author: str  # public key of whoever drew it up
    packed: str = ""  # the canonical bytes of a charter that is too long for an entry: `audit.packing`

    def __post_init__(self) -> None:
        unpack_text(self.canonical, self.packed)

    @property
    def text(self) -> str:
        """The canonical bytes of the charter, as text."""
        return unpack_text(self.canonical, self.packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterSigned:
    digest: str
    author: str  # public key of whoever is said to have drawn it up
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
    start: str  # run_digest of the run.started that is accepted, and of no other
    origin: str  # the log that the run is for, from the site's own policy
    charter: str
    site: str
    population: str
    next_sequence: int
    previous_event: str
    planned_events: int
    lifetime_epsilon_cap: str
    signature: str
    whole_site_epsilon_cap: str = ""  # over the site's whole life, for all its rows; "": the site sets none
    lifetime_delta: str = ""  # at which that cap holds
    site_log_size: int = 0  # the site's own log before this acceptance; from here on it cannot be another
    site_log_root: str = ""  # "": the site anchors none


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
    unit: str  # "row" | "subject" | "site": whose contribution sensitivity_grid bounds
    # where sites share the noise: each draws `share_grid`, and any `sharers` of them make sigma_grid together
    share_grid: int = 0
    sharers: int = 0
    site_sensitivity_grid: int = 0  # what a whole site moves the sum by; 0: not bounded


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
    previous_round: str  # leaf hash of the previous round's entry, completed or abandoned; zeros for round 1
    event: MechanismEvent
    sequence: int  # 1, 2, 3 … over the life of the population
    previous_event: str  # hash of event sequence-1; zeros for the first
    update: str  # digest of the update file as sent
    signature: str
    roster: str = ""  # whose masks the update carries (`audit.secure_round`); "" where it carries none


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUndelivered:
    """A release that was debited and never reached its round; it stays debited."""

    statement: SiteStatement


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundCompleted:
    run: str
    round: int
    base_model: str
    statements: tuple[str, ...]  # leaf hashes, in the order of the sites' names
    missing: tuple[str, ...]  # sites that gave none
    output_model: str
    metrics: tuple[Metric, ...]
    packed: str = ""  # the leaf hashes of more statements than an entry can name in hex: `audit.packing`

    def __post_init__(self) -> None:
        unpack_digests(self.statements, self.packed)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Leaf hashes of the statements, in the order of the sites' names."""
        return unpack_digests(self.statements, self.packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAbandoned:
    """A round that gave no model. What was released for it stays debited; the next round has a new number."""

    run: str
    round: int
    reason: str
    missing: tuple[str, ...]
    base_model: str = ""  # what the round was built on, and what the next one is built on
    previous_round: str = ""  # leaf hash of the entry of the round before; zeros for round 1


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
class VersionRegistered:
    version: str  # digest of the weights file
    model: str
    charter: str
    run: str
    author: str
    averaged_from: int  # first round of the average
    averaged_to: int
    gates: tuple[GateResult, ...]
    epsilons: tuple[SiteEpsilon, ...]  # in the order of the sites' names; read `costs`
    packed: str = ""  # the costs of more sites than an entry can name as they stand: `audit.packing`

    def __post_init__(self) -> None:
        unpack_costs(self.epsilons, self.packed)

    @property
    def costs(self) -> tuple[SiteEpsilon, ...]:
        """What the run cost each site, in the order of their names."""
        return unpack_costs(self.epsilons, self.packed)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionTransition:
    """candidate -> approved -> (shadow, canary) -> live -> retired, each by a person's own key."""

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
    share: int = 0  # to_state canary: percent of the requests that it answers


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
    # about a named person: `purpose` and `request_id` are empty here and, with the rows, in the vault
    subject: str = ""  # random pseudonym of the person
    context: str = ""  # root of the context's fields (`audit.disclosure`); so are then the rows' digests
    sealed: str = ""  # SHA-256 of the ciphertext in the vault
    # many rows: `rows` is empty, and each row is a leaf of a tree of its own (`audit.row_tree`)
    row_count: int = 0
    rows_root: str = ""
    # as the decision was asked with; of a named person, `legal_basis` is in the vault beside the purpose
    legal_basis: str = ""
    region: str = ""  # of whoever asked


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionDenied:
    request_id: str
    model: str
    purpose: str
    principal: str
    role: str
    reason: str  # "policy" or "quota"
    policies: tuple[str, ...]
    policy_set: str
    version: str = ""  # that would have answered
    legal_basis: str = ""
    region: str = ""


Body = (
    LogCreated
    | KeyRotated
    | LogCompromised
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
    | KeyBound
    | AuditRead
    | SiteLogOpened
    | SiteDecided
    | RequestRefused
    | BundleDecided
    | RoundOpened
    | RoundBody
    | SubjectExported
    | SubjectErased
    | VersionExported
    | PredictionShadowed
    | MembershipBody
    | ServingBody
)

TYPES: Final[dict[str, type[Any]]] = {
    "log.created": LogCreated,
    "key.rotated": KeyRotated,
    "log.compromise": LogCompromised,
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
    "key.bound": KeyBound,
    "audit.read": AuditRead,
    "site.log_opened": SiteLogOpened,
    "site.decided": SiteDecided,
    "request.refused": RequestRefused,
    "bundle.decided": BundleDecided,
    "round.opened": RoundOpened,
    "subject.exported": SubjectExported,
    "subject.erased": SubjectErased,
    **ROUND_TYPES,
    "version.exported": VersionExported,
    "prediction.shadowed": PredictionShadowed,
    **MEMBERSHIP_TYPES,
    **SERVING_TYPES,
}
TYPE_OF: Final[dict[type[Any], str]] = {body: name for name, body in TYPES.items()}
