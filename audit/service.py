"""Use cases over the log: search it, prove an entry, export an evidence file.

Each asks an authoriser first and works the same for a route, a command and a notebook. `export_evidence`
collects the closure of one entry: everything an offline verifier needs to walk from it back to the
charter, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from audit.canonical import canonical_bytes
from audit.charter_view import read_charter
from audit.checkpoints import parse_checkpoint_note
from audit.entries import (
    CharterPublished,
    CharterSigned,
    IndexColumns,
    Prediction,
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunStarted,
    SiteEnrolled,
    SiteStatement,
    SiteUndelivered,
    VersionRegistered,
    VersionTransition,
    columns_of,
    decode_entry,
)
from audit.errors import AuditError
from audit.evidence import Evidence, read_evidence, scope_of, write_evidence
from audit.merkle import hash_leaf
from audit.notes import parse_note
from audit.principal import AccessDeniedError, Authorizer, Decision, Principal, Question, require
from audit.tlog_proof import TlogProof

__all__ = [
    "AccessDeniedError",
    "Authorizer",
    "Decision",
    "EvidenceGapError",
    "NoCheckpointError",
    "Principal",
    "SearchRequest",
    "add_answer",
    "export_entry",
    "export_evidence",
    "prove_entry",
    "read_entry",
    "search_entries",
]

B = TypeVar("B")
BlobSource = Callable[[str], bytes | None]
_PAGE: Final = 500


class NoCheckpointError(AuditError):
    """No checkpoint covers the entry yet; publish one and try again."""

    code = "evidence.no_checkpoint"

    def __init__(self, leaf_index: int) -> None:
        super().__init__(f"no checkpoint covers leaf {leaf_index} yet; publish one and try again")
        self.leaf_index = leaf_index


class EvidenceGapError(AuditError):
    """The log or its files lack something that the entry refers to."""

    code = "evidence.gap"


class StoredLeaf(Protocol):
    """An entry as a ledger gives it."""

    @property
    def leaf_index(self) -> int: ...
    @property
    def leaf_hash(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...
    @property
    def columns(self) -> IndexColumns: ...


class EvidenceLog(Protocol):
    """What export and proof need of a ledger."""

    @property
    def tree_size(self) -> int: ...
    def entry(self, leaf_index: int) -> bytes: ...
    def inclusion_proof(self, leaf_index: int, tree_size: int) -> list[bytes]: ...
    def checkpoints(self) -> list[bytes]: ...
    def search(
        self,
        *,
        type: str | Sequence[str] | None = None,
        actor: str | None = None,
        model: str | None = None,
        version: str | None = None,
        run: str | None = None,
        site: str | None = None,
        since: str | None = None,
        until: str | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Sequence[StoredLeaf]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to look for; None matches everything. `after` is the last leaf index of the page before."""

    type: str | None = None
    actor: str | None = None
    model: str | None = None
    version: str | None = None
    run: str | None = None
    site: str | None = None
    since: str | None = None
    until: str | None = None
    after: int | None = None
    limit: int = 100


def search_entries(
    ledger: EvidenceLog, principal: Principal, authorizer: Authorizer, request: SearchRequest
) -> Sequence[StoredLeaf]:
    """Return the entries that match, in index order.

    Raises:
        AccessDeniedError: the caller may not read the log.
    """
    require(authorizer, principal, Question(action="log.read", resource="log"))
    return ledger.search(**{name: getattr(request, name) for name in request.__dataclass_fields__})


def read_entry(ledger: EvidenceLog, principal: Principal, authorizer: Authorizer, leaf_index: int) -> bytes:
    """Return the exact bytes of one entry.

    Raises:
        AccessDeniedError: the caller may not read it.
        EntryNotFoundError: the log has no such leaf.
    """
    data = ledger.entry(leaf_index)
    require(authorizer, principal, _about(data, leaf_index, "entry.read"))
    return data


def prove_entry(
    ledger: EvidenceLog, principal: Principal, authorizer: Authorizer, leaf_index: int
) -> TlogProof:
    """Return an inclusion proof of one entry with the best checkpoint that covers it.

    Raises:
        AccessDeniedError: the caller may not read the entry.
        NoCheckpointError: no checkpoint covers it yet.
        EntryNotFoundError: the log has no such leaf.
    """
    read_entry(ledger, principal, authorizer, leaf_index)
    note = best_checkpoint(ledger, leaf_index)
    size = parse_checkpoint_note(note).tree_size
    return TlogProof(
        leaf_index=leaf_index,
        hashes=tuple(ledger.inclusion_proof(leaf_index, size)),
        checkpoint_note=note,
    )


def export_entry(
    ledger: EvidenceLog, blobs: BlobSource, principal: Principal, authorizer: Authorizer, leaf_index: int
) -> bytes:
    """Return the evidence file of one entry; errors as `export_evidence`, and AccessDeniedError."""
    require(authorizer, principal, _about(ledger.entry(leaf_index), leaf_index, "evidence.export"))
    return export_evidence(ledger, blobs, leaf_index=leaf_index)


def export_evidence(
    ledger: EvidenceLog,
    blobs: BlobSource,
    *,
    leaf_index: int,
    receipt: Mapping[str, Any] | bytes | None = None,
    opened: Sequence[Mapping[str, str]] | None = None,
    checkpoint: bytes | None = None,
    policy: str | None = None,
) -> bytes:
    """Return the evidence file of one entry: its closure, proofs to one checkpoint, artefacts by digest.

    A prediction, a version's entry, or an entry of a completed run takes all that led to it; any other
    entry stands alone. Of the stored checkpoints that cover it, and `checkpoint` if given, the one with
    most signatures is used.

    Args:
        ledger: the log.
        blobs: gives the bytes of a digest, or None.
        leaf_index: the subject.
        receipt: the caller's receipt, as JSON fields or bytes.
        opened: the caller's opened rows.
        checkpoint: a further checkpoint note to choose from.
        policy: a policy text to carry for display.

    Raises:
        EntryNotFoundError: the log has no such leaf.
        NoCheckpointError: no checkpoint covers it yet.
        EvidenceGapError: the log lacks an entry that the subject refers to.
        EvidenceTooLargeError: over the caps of a file.
    """
    subject = ledger.entry(leaf_index)
    closure = _Closure(ledger, blobs)
    closure.collect(leaf_index, subject)
    note = best_checkpoint(ledger, leaf_index, checkpoint)
    size = parse_checkpoint_note(note).tree_size
    evidence = Evidence(
        scope=closure.scope,
        leaf_index=leaf_index,
        leaf_hash=hash_leaf(subject).hex(),
        checkpoint=note,
        entries=dict(sorted(closure.entries.items())),
        proofs={index: tuple(ledger.inclusion_proof(index, size)) for index in sorted(closure.entries)},
        artefacts=closure.artefacts,
        policy=policy,
    )
    return write_evidence(_with_answer(evidence, receipt, opened))


def add_answer(
    data: bytes,
    *,
    receipt: Mapping[str, Any] | bytes | None = None,
    opened: Sequence[Mapping[str, str]] | None = None,
) -> bytes:
    """Return the evidence file with the caller's receipt and opened rows added.

    Raises:
        EvidenceError: `data` is no evidence file.
    """
    return write_evidence(_with_answer(read_evidence(data), receipt, opened))


def best_checkpoint(ledger: EvidenceLog, leaf_index: int, further: bytes | None = None) -> bytes:
    """Return the checkpoint that covers a leaf with most signatures; among equals the newest.

    Raises:
        NoCheckpointError: none covers it.
    """
    notes = [*ledger.checkpoints(), *([further] if further is not None else [])]
    covering = [
        (len(parse_note(note).signatures), parse_checkpoint_note(note).tree_size, note)
        for note in notes
        if leaf_index < parse_checkpoint_note(note).tree_size <= ledger.tree_size
    ]
    if not covering:
        raise NoCheckpointError(leaf_index)
    return max(covering, key=lambda found: found[:2])[2]


def _about(data: bytes, leaf_index: int, action: str) -> Question:
    """Return the question about one entry; whom it names may matter to the answer."""
    named = columns_of(data).principal or ""
    return Question(action=action, resource=str(leaf_index), attributes={"principal": named})


def _with_answer(
    evidence: Evidence, receipt: Mapping[str, Any] | bytes | None, opened: Sequence[Mapping[str, str]] | None
) -> Evidence:
    encoded = receipt if receipt is None or isinstance(receipt, bytes) else canonical_bytes(receipt)
    return Evidence(
        scope=evidence.scope,
        leaf_index=evidence.leaf_index,
        leaf_hash=evidence.leaf_hash,
        checkpoint=evidence.checkpoint,
        entries=evidence.entries,
        proofs=evidence.proofs,
        artefacts=evidence.artefacts,
        receipt=encoded if encoded is not None else evidence.receipt,
        opened=tuple(opened) if opened is not None else evidence.opened,
        policy=evidence.policy,
    )


class _Closure:
    """Collects what one entry rests on."""

    def __init__(self, ledger: EvidenceLog, blobs: BlobSource) -> None:
        self._ledger, self._blobs = ledger, blobs
        self.scope = "entry"
        self.entries: dict[int, bytes] = {}
        self.artefacts: dict[str, bytes] = {}

    def collect(self, leaf_index: int, data: bytes) -> None:
        self._take(leaf_index, data)
        self._take(0, self._ledger.entry(0))
        entry = decode_entry(data)
        body, self.scope = entry.body, scope_of(entry.type)
        if isinstance(body, Prediction):
            transition = self._by_hash(body.transition, VersionTransition, type="version.transition")
            self._version(transition, leaf_index)
        elif isinstance(body, VersionTransition):
            self._version(body, leaf_index)
        elif isinstance(body, VersionRegistered):
            self._run(body.run, leaf_index)
            self._artefact(body.version)
        elif isinstance(body, RunCompleted):
            self._run(body.run, leaf_index)

    def _version(self, transition: VersionTransition, until: int) -> None:
        for index, data, _ in self._search(
            VersionTransition, type="version.transition", model=transition.model
        ):
            if index < until:
                self._take(index, data)
        registered = self._by_hash(transition.gate_results, VersionRegistered, type="version.registered")
        self._run(registered.run, self._index_of(transition.gate_results))
        self._artefact(transition.version)

    def _run(self, run: str, until: int) -> None:
        """Take a run, and every release of its sites' populations before leaf `until`."""
        populations: set[tuple[str, str]] = set()
        charter = ""
        for index, data, body in self._search(object, run=run):
            if isinstance(
                body, (RunStarted, RunAccepted, RunCompleted, RoundCompleted, SiteStatement, SiteUndelivered)
            ):
                self._take(index, data)
            if isinstance(body, RunStarted):
                charter = body.charter
            if isinstance(body, RunAccepted):
                populations.add((body.site, body.population))
            if isinstance(body, SiteStatement):
                self._artefact(body.update)
            if isinstance(body, RunCompleted):
                self._artefact(body.weights)
        for site, population in sorted(populations):
            for index, data, found in self._search(object, site=site):
                statement = found.statement if isinstance(found, SiteUndelivered) else found
                if (
                    isinstance(statement, SiteStatement)
                    and statement.population == population
                    and index < until
                ):
                    self._take(index, data)
                if isinstance(found, SiteEnrolled):
                    self._take(index, data)
        self._charter(charter)

    def _charter(self, digest: str) -> None:
        for index, data, body in self._search(CharterPublished, type="charter.published"):
            if body.digest == digest:
                self._take(index, data)
                charter = read_charter(body.canonical.encode())
                if charter.public_set:
                    self._artefact(charter.public_set)
                for site in charter.site_names:
                    for place, enrolment, _ in self._search(SiteEnrolled, type="site.enrolled", site=site):
                        self._take(place, enrolment)
        for index, data, signed in self._search(CharterSigned, type="charter.signed"):
            if signed.digest == digest:
                self._take(index, data)

    def _search(self, kind: type[B], **columns: Any) -> Iterator[tuple[int, bytes, B]]:
        after: int | None = None
        while True:
            page = self._ledger.search(**columns, after=after, limit=_PAGE)
            for stored in page:
                body: Any = decode_entry(stored.body).body
                if isinstance(body, kind):
                    yield stored.leaf_index, stored.body, body
            if len(page) < _PAGE:
                return
            after = page[-1].leaf_index

    def _by_hash(self, leaf_hash: str, kind: type[B], **columns: Any) -> B:
        for index, data, body in self._search(kind, **columns):
            if hash_leaf(data).hex() == leaf_hash:
                self._take(index, data)
                return body
        raise EvidenceGapError(f"the log has no {columns.get('type')} entry of leaf hash {leaf_hash[:16]}…")

    def _index_of(self, leaf_hash: str) -> int:
        return next(index for index, data in self.entries.items() if hash_leaf(data).hex() == leaf_hash)

    def _take(self, index: int, data: bytes) -> None:
        self.entries[index] = data

    def _artefact(self, digest: str) -> None:
        data = self._blobs(digest)
        if data is not None:
            self.artefacts[digest] = data
