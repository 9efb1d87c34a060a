"""Every error the core of `audit` raises on purpose: one base, stable codes, evidence as fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class AuditError(Exception):
    """Base of every error `audit` raises on purpose."""

    code = "audit.error"


# canonical bytes


class CanonicalError(AuditError):
    """The value has no RFC 8785 form in our narrowed schema."""

    code = "audit.canonical"


class MalformedJsonError(AuditError):
    """The bytes are not the strict JSON that entries, receipts and statements use."""

    code = "audit.malformed_json"


class NotCanonicalError(MalformedJsonError):
    """The bytes are strict JSON, but not in canonical form."""

    code = "audit.not_canonical"


# Merkle proofs


class ProofError(AuditError):
    """Base of the ways in which a Merkle proof fails."""

    code = "audit.proof"


class InclusionError(ProofError):
    code = "audit.inclusion"


class ConsistencyError(ProofError):
    code = "audit.consistency"


class RootMismatchError(ProofError):
    code = "audit.root_mismatch"

    def __init__(self, *, expected: bytes, computed: bytes) -> None:
        super().__init__(f"root is {computed.hex()}, checkpoint says {expected.hex()}")
        self.expected, self.computed = expected, computed


class TreeRangeError(AuditError):
    """A leaf index or tree size lies outside the tree that was asked."""

    code = "audit.tree_range"


# keys and signatures


class KeyFormatError(AuditError):
    """A public key, vkey or key file is not in the exact form expected."""

    code = "audit.malformed_key"


class KeyFileError(AuditError):
    """A key file cannot be written, read or decrypted."""

    code = "audit.key_file"

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class KeyServiceError(AuditError):
    """The external key service did not do what was asked."""

    code = "audit.key_service"


class BadSignatureError(AuditError):
    code = "audit.bad_signature"

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message)
        self.key = key


class UnknownDomainError(AuditError):
    """The signing domain is not in the closed list of `audit.keys.DOMAINS`."""

    code = "audit.unknown_domain"

    def __init__(self, domain: str) -> None:
        super().__init__(f"signing domain {domain!r} is not in the closed list; see audit.keys.DOMAINS")
        self.domain = domain


# notes, checkpoints, proofs and policies


class MalformedNoteError(AuditError):
    code = "audit.malformed_note"


class NoKnownSignatureError(AuditError):
    """The note is well formed, but nobody we were told to believe has signed it."""

    code = "audit.no_known_signature"

    def __init__(self, message: str, *, signers: tuple[str, ...]) -> None:
        super().__init__(message)
        self.signers = signers


class MalformedCheckpointError(AuditError):
    code = "audit.malformed_checkpoint"


class OriginMismatchError(AuditError):
    code = "audit.origin_mismatch"

    def __init__(self, *, expected: str, found: str) -> None:
        super().__init__(f"checkpoint is of log {found!r}, expected {expected!r}")
        self.expected, self.found = expected, found


class MalformedProofError(AuditError):
    code = "audit.malformed_proof"


class LogKeyError(AuditError):
    """A key of the log does not count here; `code` says why, `leaf_index` names the entry."""

    def __init__(self, code: str, detail: str, leaf_index: int) -> None:
        super().__init__(detail)
        self.code, self.leaf_index = code, leaf_index


class MalformedPolicyError(AuditError):
    code = "audit.malformed_policy"

    def __init__(self, message: str, *, line: int) -> None:
        super().__init__(f"policy line {line}: {message}")
        self.line = line


class PolicyFileError(AuditError):
    """A home's own policy file cannot be read, or does not believe the home's log."""

    code = "audit.policy_file"


# ledger


class LedgerExistsError(AuditError):
    code = "audit.ledger_exists"

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} exists already; open it, or create the new log elsewhere")
        self.path = path


class LedgerMissingError(AuditError):
    code = "audit.ledger_missing"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"no log at {path}: {reason}; a log is created explicitly, never by opening it")
        self.path, self.reason = path, reason


class LedgerCorruptError(AuditError):
    """What the database holds contradicts itself; `audit.fsck` names the first bad thing."""

    code = "audit.ledger_corrupt"


class LedgerBusyError(AuditError):
    """The queue is full or the database taken: nothing was accepted, try again later."""

    code = "audit.ledger_busy"

    def __init__(self, *, retry_after_s: float, pending: int) -> None:
        cause = f"{pending} entries wait to be sequenced" if pending else "another process is writing"
        super().__init__(f"the log is busy: {cause}; retry in {retry_after_s} s")
        self.retry_after_s, self.pending = retry_after_s, pending


class StaleViewError(AuditError):
    """What the entry rests on has changed since it was read; nothing was written. Read again and retry."""

    code = "audit.stale_view"

    def __init__(self, *, after: int, newest: int) -> None:
        super().__init__(f"leaf {newest} came after the view of leaf {after} that the entry rests on")
        self.after, self.newest = after, newest


class LedgerClosedError(AuditError):
    code = "audit.ledger_closed"


class LedgerUnreachableError(AuditError):
    """The database server is gone: what was on its way may or may not be durable; retry with the same id."""

    code = "audit.ledger_unreachable"

    def __init__(self, reason: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(
            f"the log's database cannot be reached: {reason}; an entry on its way may or may not be durable, "
            f"so retry with the same event id in {retry_after_s} s"
        )
        self.reason, self.retry_after_s = reason, retry_after_s


class LedgerUnsafeError(AuditError):
    """The database server is set up so that an acknowledged entry could be lost."""

    code = "audit.ledger_unsafe"


class LedgerSchemaError(LedgerMissingError):
    """There is a log, of another release."""

    code = "audit.ledger_schema"

    def __init__(self, location: str, *, found: int, expected: int) -> None:
        fix = "run `affidavit db upgrade`" if found < expected else "use the newer release"
        super().__init__(location, f"schema {found} is not this release's {expected}, {fix}")
        self.found, self.expected = found, expected


class LeaseLostError(AuditError):
    """Another process holds the lease now; what this one was about to do is its task no longer."""

    code = "audit.lease_lost"

    def __init__(self, *, name: str, owner: str, token: int) -> None:
        super().__init__(f"lease {name!r} is held by {owner or 'nobody'!r} with token {token}")
        self.name, self.owner, self.token = name, owner, token


class LocationError(AuditError):
    """The place of a log is neither a path nor a URL of a database that is supported."""

    code = "audit.location"


class LedgerWriteError(AuditError):
    """The database refused the batch; none of it was acknowledged."""

    code = "audit.ledger_write"


class EntrySizeError(AuditError):
    code = "audit.entry_size"

    def __init__(self, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"entry is {size_bytes} bytes; it must hold 1 to {limit_bytes}")
        self.size_bytes, self.limit_bytes = size_bytes, limit_bytes


class EventIdError(AuditError):
    code = "audit.event_id"


class EntryColumnsError(AuditError):
    """A search column holds what no database could store or index."""

    code = "audit.entry_columns"

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")
        self.column, self.problem = column, problem


class EventIdConflictError(AuditError):
    code = "audit.event_id_conflict"

    def __init__(self, *, event_id: str, leaf_index: int) -> None:
        super().__init__(f"event_id {event_id!r} names other bytes at leaf {leaf_index}; use a fresh one")
        self.event_id, self.leaf_index = event_id, leaf_index


class EntryNotFoundError(AuditError):
    code = "audit.entry_not_found"

    def __init__(self, *, leaf_index: int, tree_size: int) -> None:
        super().__init__(f"leaf {leaf_index} is not in the log of {tree_size} entries")
        self.leaf_index, self.tree_size = leaf_index, tree_size


# signer


class SignerError(AuditError):
    """Base of the signer's refusals."""

    code = "audit.signer"


class SignerMissingError(SignerError):
    code = "audit.signer_missing"


class SignerElsewhereError(SignerError):
    """A copied home names the original's signer; signed with it, the original could sign no more."""

    code = "audit.signer_elsewhere"

    def __init__(self, *, config: Path, named: Path, other: Path, beside: Path | None) -> None:
        own = f"`signer_home: ../{beside.name}` for the one at {beside}" if beside is not None else "its own"
        super().__init__(
            f"{config}: names the signer {named}, which is that of {other}. A copied home must not sign for "
            f"the original: name the right signer there ({own}), or in AFFIDAVIT_SIGNER_HOME"
        )
        self.config, self.named, self.other, self.beside = config, named, other, beside


class SignerExistsError(SignerError):
    code = "audit.signer_exists"


class SignerBusyError(SignerError):
    """Another process holds the signer's home: exactly one may sign."""

    code = "audit.signer_busy"


class WitnessesUnreachableError(SignerError):
    """Witnesses that must be asked before anything is signed do not answer."""

    code = "audit.witnesses_unreachable"

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(
            f"witnesses {', '.join(names)} do not answer, and without them a tree may be witnessed that this "
            "signer does not know: nothing is signed until they do. Start them, or correct policy.txt in the "
            "coordinator's home"
        )
        self.names = names


class SignerStateError(SignerError):
    """The signer's own state file is unreadable: nothing may be signed before a person looks."""

    code = "audit.signer_state"


class SignerRollbackError(SignerError):
    """The tree is smaller than the one signed last: a truncation or an old backup."""

    code = "audit.signer_rollback"

    def __init__(self, *, signed_size: int, signed_root: bytes, offered_size: int) -> None:
        super().__init__(
            f"asked to sign size {offered_size}, but size {signed_size} was signed already; "
            "restore the newer log or declare the loss under a new origin"
        )
        self.signed_size, self.signed_root, self.offered_size = signed_size, signed_root, offered_size


class SignerSplitError(SignerError):
    """Another tree of the size signed last: two histories."""

    code = "audit.signer_split"

    def __init__(self, *, tree_size: int, signed_root: bytes, offered_root: bytes) -> None:
        super().__init__(
            f"size {tree_size} is signed with root {signed_root.hex()}, not {offered_root.hex()}"
        )
        self.tree_size, self.signed_root, self.offered_root = tree_size, signed_root, offered_root


class SignerRewriteError(SignerError):
    """The larger tree does not contain the one signed last."""

    code = "audit.signer_rewrite"

    def __init__(
        self, *, signed_size: int, signed_root: bytes, offered_size: int, offered_root: bytes, reason: str
    ) -> None:
        super().__init__(
            f"the tree of size {offered_size} is not shown to extend the one of size {signed_size}: {reason}"
        )
        self.signed_size, self.signed_root = signed_size, signed_root
        self.offered_size, self.offered_root, self.reason = offered_size, offered_root, reason


# witness: each carries the HTTP status of the C2SP tlog-witness protocol


class WitnessError(AuditError):
    code = "audit.witness"
    status = 500


class WitnessUnknownOriginError(WitnessError):
    code = "audit.witness_unknown_origin"
    status = 404


class WitnessSignatureError(WitnessError):
    code = "audit.witness_signature"
    status = 403


class WitnessRequestError(WitnessError):
    code = "audit.witness_request"
    status = 400


class WitnessConflictError(WitnessError):
    """The caller's old size is not ours; `recorded_size` is the answer's body."""

    code = "audit.witness_conflict"
    status = 409

    def __init__(self, *, recorded_size: int, old_size: int) -> None:
        super().__init__(f"this witness has seen size {recorded_size}, the request starts from {old_size}")
        self.recorded_size, self.old_size = recorded_size, old_size


class WitnessProofError(WitnessError):
    """The checkpoint contradicts the one seen last: keep both notes, they are proof of misbehaviour."""

    code = "audit.witness_proof"
    status = 422

    def __init__(self, message: str, *, seen_note: bytes | None, offered_note: bytes) -> None:
        super().__init__(message)
        self.seen_note, self.offered_note = seen_note, offered_note


class WitnessStateError(WitnessError):
    code = "audit.witness_state"
    status = 500


class WitnessClockError(WitnessError):
    """The witness's clock is behind its own last cosignature."""

    code = "audit.witness_clock"
    status = 500


# receipts and commitments


class MalformedReceiptError(AuditError):
    code = "audit.malformed_receipt"


class ReceiptMismatchError(AuditError):
    """A receipt and a log disagree; with both signatures this is transferable proof."""

    code = "audit.receipt_mismatch"


class CommitmentError(AuditError):
    code = "audit.commitment"
