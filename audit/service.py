"""Use cases over the log: search it, prove an entry, export an evidence file.

Each asks an authoriser first and works the same for a route, a command and a notebook. `export_evidence`
collects the closure of one entry: everything an offline verifier needs to walk from it back to the
charter, and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from audit.canonical import canonical_bytes
from audit.checkpoints import parse_checkpoint_note
from audit.closure import BlobSource, Closure, EvidenceGapError, EvidenceLog, StoredLeaf
from audit.disclosure import CONTEXT, context_of_answer
from audit.entries import columns_of
from audit.errors import AuditError
from audit.evidence import (
    Evidence,
    EvidenceError,
    EvidenceTooLargeError,
    read_evidence,
    scope_of,
    write_evidence,
)
from audit.merkle import hash_leaf
from audit.notes import parse_note
from audit.principal import AccessDeniedError, Authorizer, Decision, Principal, require
from audit.reading import SearchRequest, about_entry, search_page, with_limit
from audit.tlog_proof import TlogProof

__all__ = [
    "AccessDeniedError",
    "Authorizer",
    "Decision",
    "EvidenceGapError",
    "NoCheckpointError",
    "NothingMatchesError",
    "Principal",
    "SearchRequest",
    "add_answer",
    "export_asked",
    "export_entry",
    "export_evidence",
    "export_matching",
    "prove_entry",
    "read_entry",
    "read_evidence",
    "search_entries",
    "subject_of",
]


MAX_MATCHING: Final = 999
CALLER_ROLES: Final = frozenset({"consumer", "tester"})  # who ask models, and run none


class NothingMatchesError(AuditError):
    """No entry matches, so there is nothing to prove."""

    code = "evidence.nothing_matches"

    def __init__(self) -> None:
        super().__init__("no entry matches; widen the terms")


class NoCheckpointError(AuditError):
    """No checkpoint covers the entry yet; publish one and try again."""

    code = "evidence.no_checkpoint"

    def __init__(self, leaf_index: int) -> None:
        super().__init__(f"no checkpoint covers leaf {leaf_index} yet; publish one and try again")
        self.leaf_index = leaf_index


def search_entries(
    ledger: EvidenceLog, principal: Principal, authorizer: Authorizer, request: SearchRequest
) -> Sequence[StoredLeaf]:
    """Return the matching entries that this caller may see, in index order; pages: `audit.reading`.

    Raises:
        AccessDeniedError: the caller may not read the log.
        SearchTermError: a term has no meaning.
    """
    return search_page(ledger, principal, authorizer, request).rows


def read_entry(ledger: EvidenceLog, principal: Principal, authorizer: Authorizer, leaf_index: int) -> bytes:
    """Return the exact bytes of one entry.

    Raises:
        AccessDeniedError: the caller may not read it.
        EntryNotFoundError: the log has no such leaf.
    """
    data = ledger.entry(leaf_index)
    require(authorizer, principal, about_entry(data, leaf_index, "entry.read"))
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
    """Return the evidence file of one entry; errors as `export_evidence`, and AccessDeniedError.

    Who may only ask the model (a consumer, a tester) gets no file of it where its charter restricts answers:
    otherwise one answer would buy the exact weights.
    """
    require(authorizer, principal, about_entry(ledger.entry(leaf_index), leaf_index, "evidence.export"))
    return export_evidence(ledger, blobs, leaf_index=leaf_index, is_for_caller=principal.role in CALLER_ROLES)


def export_matching(
    ledger: EvidenceLog,
    principal: Principal,
    authorizer: Authorizer,
    request: SearchRequest,
    *,
    limit: int = MAX_MATCHING,
) -> bytes:
    """Return one evidence file with every entry that matches, all proved to be in the log.

    Its subject is the last of them that tells no story of its own (a prediction, a version and a run do), or
    else the log's first entry. It says that these entries are in the log, under one checkpoint; what they
    claim of each other is for the file of one version, run or prediction (`export_entry`). Leaf indices show
    what lies between them.

    Raises:
        AccessDeniedError: the caller may not read or export one of them.
        NothingMatchesError, EvidenceTooLargeError: none match, or more than `limit`.
        NoCheckpointError: no checkpoint covers the last.
    """
    page = search_page(ledger, principal, authorizer, with_limit(request, limit + 1))
    if not page.rows:
        raise NothingMatchesError
    if len(page.rows) > limit or page.next is not None:
        raise EvidenceTooLargeError("file", f"more than {limit} entries match; narrow the time or the terms")
    covered = max((parse_checkpoint_note(note).tree_size for note in ledger.checkpoints()), default=0)
    entries = {row.leaf_index: row.body for row in page.rows if row.leaf_index < covered}
    if not entries:
        raise NoCheckpointError(page.rows[0].leaf_index)
    for index, data in entries.items():
        require(authorizer, principal, about_entry(data, index, "evidence.export"))
    note = best_checkpoint(ledger, max(entries))
    size = parse_checkpoint_note(note).tree_size
    alone = [index for index, data in entries.items() if scope_of(columns_of(data).type) == "entry"]
    subject = max(alone, default=0)
    for index, data in [(0, ledger.entry(0)), *_key_entries(ledger, size)]:
        entries.setdefault(index, data)
    return write_evidence(
        Evidence(
            scope="entry",
            leaf_index=subject,
            leaf_hash=hash_leaf(entries[subject]).hex(),
            checkpoint=note,
            entries=dict(sorted(entries.items())),
            proofs={index: tuple(ledger.inclusion_proof(index, size)) for index in sorted(entries)},
        )
    )


def export_asked(
    ledger: EvidenceLog, blobs: BlobSource, principal: Principal, authorizer: Authorizer, asked: SearchRequest
) -> bytes:
    """Return a version's or a run's whole story when that alone is asked for, else all that matches.

    Raises:
        AuditError: as `export_entry` and `export_matching`.
    """
    if asked != SearchRequest() and asked in (
        SearchRequest(version=asked.version),
        SearchRequest(run=asked.run),
    ):
        index = subject_of(ledger, version=asked.version, run=asked.run)
        return export_entry(ledger, blobs, principal, authorizer, index)
    return export_matching(ledger, principal, authorizer, asked)


def _key_entries(ledger: EvidenceLog, size: int) -> list[tuple[int, bytes]]:
    """The entries on the log's keys that a tree of this size holds; without them an ended key looks good."""
    rows = ledger.search(type=("key.rotated", "log.compromise"), limit=500)
    return [(row.leaf_index, row.body) for row in rows if row.leaf_index < size]


def subject_of(ledger: EvidenceLog, *, version: str | None = None, run: str | None = None) -> int:
    """Return the entry whose evidence file tells a version's or a run's whole story.

    Raises:
        NothingMatchesError: the log knows no such version, or the run has not ended.
    """
    wanted: tuple[str, ...] = ("version.transition", "version.registered") if version else ("run.completed",)
    for kind in wanted:
        after, last = None, None
        while rows := ledger.search(type=kind, version=version, run=run, after=after, limit=500):
            after = last = rows[-1].leaf_index
        if last is not None:
            return last
    raise NothingMatchesError


def export_evidence(
    ledger: EvidenceLog,
    blobs: BlobSource,
    *,
    leaf_index: int,
    receipt: Mapping[str, Any] | bytes | None = None,
    opened: Sequence[Mapping[str, str]] | None = None,
    checkpoint: bytes | None = None,
    policy: str | None = None,
    is_for_caller: bool = False,
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
        is_for_caller: whether to leave out the model's files where its charter restricts answers.

    Raises:
        EntryNotFoundError: the log has no such leaf.
        NoCheckpointError: no checkpoint covers it yet.
        EvidenceGapError: the log lacks an entry that the subject refers to.
        EvidenceTooLargeError: over the caps of a file.
    """
    subject = ledger.entry(leaf_index)
    note = best_checkpoint(ledger, leaf_index, checkpoint)
    size = parse_checkpoint_note(note).tree_size
    closure = Closure(ledger, blobs, size, is_for_caller=is_for_caller)
    closure.collect(leaf_index, subject)
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
    context: tuple[int, str, str] | None = None,
) -> bytes:
    """Return the evidence file with the caller's receipt and opened rows added.

    Args:
        context: of an answer about a named person: its leaf, and the salt in hex and the canonical text of
            its context, of which purpose and legal basis are opened and the rest stays closed.

    Raises:
        EvidenceError: `data` is no evidence file, or has no such leaf.
        DisclosureError: the context is none.
    """
    evidence = _with_answer(read_evidence(data), receipt, opened)
    if context is not None:
        index, salt, text = context
        if index not in evidence.entries:
            raise EvidenceError("disclosed.json", f"the answer is leaf {index}, which is not in the file")
        disclosed = dict(evidence.disclosed or {})
        disclosed[index] = {**disclosed.get(index, {}), CONTEXT: context_of_answer(salt, text)}
        evidence = replace(evidence, disclosed=disclosed)
    return write_evidence(evidence)


def _witnesses(note: bytes) -> int:
    """Return how many others than the log signed; a log that changes its key signs twice."""
    origin = parse_checkpoint_note(note).origin
    return sum(line.name != origin for line in parse_note(note).signatures)


def best_checkpoint(ledger: EvidenceLog, leaf_index: int, further: bytes | None = None) -> bytes:
    """Return the checkpoint that covers a leaf with most cosignatures; among equals the newest.

    Raises:
        NoCheckpointError: none covers it.
    """
    notes = [*ledger.checkpoints(), *([further] if further is not None else [])]
    covering = [
        (_witnesses(note), parse_checkpoint_note(note).tree_size, note)
        for note in notes
        if leaf_index < parse_checkpoint_note(note).tree_size <= ledger.tree_size
    ]
    if not covering:
        raise NoCheckpointError(leaf_index)
    return max(covering, key=lambda found: found[:2])[2]


def _with_answer(
    evidence: Evidence, receipt: Mapping[str, Any] | bytes | None, opened: Sequence[Mapping[str, str]] | None
) -> Evidence:
    encoded = receipt if receipt is None or isinstance(receipt, bytes) else canonical_bytes(receipt)
    return replace(
        evidence,
        receipt=encoded if encoded is not None else evidence.receipt,
        opened=tuple(opened) if opened is not None else evidence.opened,
    )
