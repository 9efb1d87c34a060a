"""What the steps share: the file's entries by index, hash or kind, and what earlier steps established."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from audit.answers import AnswerTerms
from audit.charter_view import CharterView
from audit.checkpoints import Checkpoint
from audit.entries import (
    CharterPublished,
    Entry,
    Prediction,
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunStarted,
    SiteEnrolled,
    SiteStatement,
    VersionRegistered,
    VersionTransition,
    decode_signature,
    signing_payload,
)
from audit.errors import AuditError
from audit.evidence import Evidence
from audit.keys import VerifyKey, parse_public_key
from audit.log_keys import LogKeys
from audit.notes import NoteVerifier
from audit.round_bodies import RunEvaluated, RunReferenced
from audit.tlog_policy import Policy
from audit.verify.report import EpsilonLine, Word

B = TypeVar("B")


class FailError(AuditError):
    """A step is contradicted."""

    def __init__(self, code: str, detail: str, entry: int | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.entry = code, detail, entry


class GapError(AuditError):
    """A step has no evidence in the file."""

    def __init__(self, code: str, detail: str, entry: int | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.entry = code, detail, entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step found when it neither failed nor lacks evidence (or lacks it without stopping the rest)."""

    word: Word
    detail: str
    code: str = "ok"
    entry: int | None = None


@dataclass(frozen=True, slots=True)
class Located:
    """A decoded entry and where it stands."""

    index: int
    leaf_hash: str
    entry: Entry

    @property
    def body(self) -> Any:
        return self.entry.body


@dataclass(frozen=True, slots=True)
class Leaf(Generic[B]):
    """A located entry whose body has a known type."""

    index: int
    leaf_hash: str
    body: B


@dataclass(frozen=True, slots=True)
class Round:
    """One round: its entry, and its statements in the order of the sites' names."""

    leaf: Leaf[RoundCompleted]
    statements: tuple[Leaf[SiteStatement], ...]


@dataclass(frozen=True, slots=True)
class Lost:
    """A round that was abandoned: its entry, and what sites released for it that never arrived."""

    leaf: Leaf[RoundAbandoned]
    releases: tuple[Leaf[SiteStatement], ...]


@dataclass(slots=True)
class Chain:
    """The state of one verification. A step reads what earlier steps set, through `need`."""

    evidence: Evidence
    policy: Policy | None
    now_s: int
    max_age_s: int | None
    replay: bool | None
    receipt: bytes | None

    checkpoint: Checkpoint | None = None
    checkpoint_facts: dict[str, Any] = field(default_factory=dict)
    log: NoteVerifier | None = None
    log_keys: tuple[NoteVerifier, ...] = ()  # those that the policy believes and that signed the checkpoint
    believed_keys: tuple[NoteVerifier, ...] = ()  # all that the policy believes of this log
    is_witnessed: bool = False  # the checkpoint's quorum is satisfied by witnesses
    keys: LogKeys | None = None
    located: dict[int, Located] = field(default_factory=dict)
    by_hash: dict[str, Located] = field(default_factory=dict)

    prediction: Leaf[Prediction] | None = None
    transition: Leaf[VersionTransition] | None = None
    registered: Leaf[VersionRegistered] | None = None
    started: Leaf[RunStarted] | None = None
    completed: Leaf[RunCompleted] | None = None
    charter_digest: str = ""
    published: Leaf[CharterPublished] | None = None
    charter: CharterView | None = None
    enrolments: dict[str, tuple[Leaf[SiteEnrolled], ...]] = field(default_factory=dict)
    accepted: dict[str, Leaf[RunAccepted]] = field(default_factory=dict)
    rounds: tuple[Round, ...] = ()  # that gave a model
    lost: tuple[Lost, ...] = ()  # rounds that gave none
    outputs: tuple[list[float], ...] = ()  # replayed weights after each round
    weights: list[float] | None = None  # the version's
    evaluated: Leaf[RunEvaluated] | None = None  # once its counts are added up again
    sketch: tuple[int, ...] | None = None  # of the training rows, once it is added up again
    sketched: Leaf[RunReferenced] | None = None
    histories: dict[str, tuple[SiteStatement, ...]] = field(default_factory=dict)  # by site, in sequence
    epsilons: tuple[EpsilonLine, ...] = ()

    def leaves(self, kind: type[B]) -> Iterator[Leaf[B]]:
        """Yield the file's entries of one kind, in index order."""
        for located in self.located.values():
            if isinstance(located.body, kind):
                yield Leaf(located.index, located.leaf_hash, located.body)

    def linked(self, leaf_hash: str, kind: type[B], what: str, *, entry: int) -> Leaf[B]:
        """Follow a leaf hash that entry `entry` names.

        Raises:
            GapError: the file lacks that entry.
            FailError: it is of another kind, or does not come before.
        """
        located = self.by_hash.get(leaf_hash)
        if located is None:
            raise GapError(
                "verify.entry_missing", f"{what} (leaf hash {leaf_hash[:16]}…) is not in the file", entry
            )
        if not isinstance(located.body, kind):
            raise FailError("verify.wrong_kind", f"{what} is a {located.entry.type} entry", entry)
        if located.index >= entry:
            raise FailError("verify.order", f"{what} is leaf {located.index}, after what names it", entry)
        return Leaf(located.index, located.leaf_hash, located.body)

    def enrolment_at(self, site: str, index: int) -> Leaf[SiteEnrolled]:
        """Return the enrolment in force for a site at a leaf index.

        Raises:
            GapError: the file has none before it.
        """
        before = [leaf for leaf in self.enrolments.get(site, ()) if leaf.index < index]
        if not before:
            raise GapError("site.not_enrolled", f"no enrolment of site {site} before leaf {index}", index)
        return before[-1]


def need(value: B | None, title: str) -> B:
    """Return what an earlier step established.

    Raises:
        GapError: that step did not get so far.
    """
    if value is None:
        raise GapError("verify.not_reached", f'not checked, because "{title}" was not established')
    return value


def verify_body(
    body: Any, key: str, *, code: str, who: str, entry: int, signature: str = "signature"
) -> None:
    """Prove that a key ("ed25519:…") signed a body.

    Raises:
        FailError: it did not, or the key or signature is malformed.
    """
    try:
        domain, payload = signing_payload(body)
        raw = decode_signature(getattr(body, signature), field=signature)
        VerifyKey(parse_public_key(key)).verify(domain, payload, raw)
    except AuditError as error:
        raise FailError(code, f"{signature} by {who} does not verify: {error}", entry) from error


def expect(found: object, wanted: object, *, code: str, field: str, entry: int) -> None:
    """Compare one field of an entry.

    Raises:
        FailError: naming entry, field, what it is and what it must be.
    """
    if found != wanted:
        raise FailError(code, f"{field} is {_short(found)}, must be {_short(wanted)}", entry)


def kept_back(answers: AnswerTerms) -> str:
    """Return why a file of the model may be missing, and who has it: the end of a gap's detail, or ""."""
    if not answers.is_restricted:
        return ""
    return (
        ": the charter restricts answers, so that the file a consumer gets holds nothing of the model; an "
        "officer, a scientist or whoever holds the log's home can export the whole file"
    )


def only(leaves: list[Leaf[B]], what: str, *, missing: str) -> Leaf[B]:
    """Return the one entry there must be.

    Raises:
        GapError: none is in the file.
        FailError: there are several.
    """
    if not leaves:
        raise GapError("verify.entry_missing", missing)
    if len(leaves) > 1:
        places = ", ".join(str(leaf.index) for leaf in leaves[:5])
        raise FailError(
            "verify.ambiguous", f"several entries claim to be {what}: leaves {places}", leaves[1].index
        )
    return leaves[0]


def _short(value: object) -> str:
    text = str(value) if isinstance(value, (str, int)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
