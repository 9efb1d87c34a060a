"""Use cases over the log: search it, prove an entry, export an evidence file.

Each asks an authoriser first and works the same for a route, a command and a notebook. `export_evidence`
collects the closure of one entry: everything an offline verifier needs to walk from it back to the
charter, and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit.canonical import canonical_bytes
from audit.checkpoints import parse_checkpoint_note
from audit.closure import BlobSource, Closure, EvidenceGapError, EvidenceLog, StoredLeaf
from audit.entries import columns_of
from audit.errors import AuditError
from audit.evidence import Evidence, read_evidence, write_evidence
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


class NoCheckpointError(AuditError):
    """No checkpoint covers the entry yet; publish one and try again."""

    code = "evidence.no_checkpoint"

    def __init__(self, leaf_index: int) -> None:
        super().__init__(f"no checkpoint covers leaf {leaf_index} yet; publish one and try again")
        self.leaf_index = leaf_index


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
    note = best_checkpoint(ledger, leaf_index, checkpoint)
    size = parse_checkpoint_note(note).tree_size
    closure = Closure(ledger, blobs, size)
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
) -> bytes:
    """Return the evidence file with the caller's receipt and opened rows added.

    Raises:
        EvidenceError: `data` is no evidence file.
    """
    return write_evidence(_with_answer(read_evidence(data), receipt, opened))


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
