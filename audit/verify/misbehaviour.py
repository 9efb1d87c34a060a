"""`affidavit verify FORK.json`: whether a file of misbehaviour convicts the policy's log.

VALID means that the accusation holds: the log's own key signed both sides of a contradiction.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from audit.errors import AuditError
from audit.misbehaviour import FORMAT, InconclusiveError, Misbehaviour, MisbehaviourError
from audit.receipts import find_signer
from audit.tlog_policy import NO_QUORUM, AcceptedCheckpoint, Policy
from audit.verify.report import NO_POLICY, Report, Step, Word

FILE: Final = "The file"
CONTRADICTION: Final = "The contradiction"
RECEIPT: Final = "The receipt"
NOTES: Final = ("The first checkpoint", "The second checkpoint")
SCOPE: Final = "misbehaviour"
_MARK: Final = f'"format":"{FORMAT}"'.encode()


def is_misbehaviour(data: bytes) -> bool:
    """Say whether the bytes are meant as a file of misbehaviour, good or bad."""
    return data[:1] == b"{" and _MARK in data


def verify_misbehaviour(data: bytes, *, policy_text: str | None, now: datetime | None = None) -> Report:
    """Judge a file of misbehaviour. Hostile bytes give a report, never an exception.

    Raises:
        MalformedPolicyError: the policy is not one; names the line.
    """
    policy = None if policy_text is None else Policy.parse(policy_text)
    now_s = int((now or datetime.now(UTC)).timestamp())
    steps: list[Step] = []

    def step(title: str, word: Word, detail: str, code: str = "ok") -> None:
        steps.append(Step(number=len(steps) + 1, title=title, word=word, detail=detail, code=code))

    try:
        found = Misbehaviour.parse(data)
    except MisbehaviourError as error:
        step(FILE, Word.FAIL, str(error), error.code)
        return Report(steps=tuple(steps), scope=SCOPE)
    step(FILE, Word.PROVED, f"{found.kind}: an accusation against log {found.origin}")
    accepted: list[AcceptedCheckpoint] = []
    for title, note in zip(NOTES, found.notes, strict=False):
        if policy is None:
            step(title, Word.NO_EVIDENCE, "no policy says whose key the log has", NO_POLICY)
            continue
        try:
            opened = policy.open(note, now=now_s)
        except AuditError as error:
            step(title, Word.FAIL, f"the policy's log did not sign it: {error}", error.code)
            continue
        accepted.append(opened)
        by = f"; cosigned by {', '.join(opened.witnesses)}" if opened.witnesses else ""
        step(title, Word.PROVED, f"{opened.opened.checkpoint.tree_size} entries, signed by the log{by}")
    if found.receipt is not None:
        _receipt(found, policy, step)
    try:
        sentence = found.contradiction()
        if found.kind == "receipt" and not found.leaf_hashes:
            word, sentence, code = _late(found, policy, accepted, sentence)
            step(CONTRADICTION, word, sentence, code)
        else:
            step(CONTRADICTION, Word.PROVED, sentence)
    except InconclusiveError as error:
        step(CONTRADICTION, Word.NO_EVIDENCE, str(error), error.code)
    except AuditError as error:
        step(CONTRADICTION, Word.FAIL, str(error), error.code)
    return Report(steps=tuple(steps), scope=SCOPE, subject=f"misbehaviour of log {found.origin}")


def _receipt(found: Misbehaviour, policy: Policy | None, step: object) -> None:
    assert callable(step) and found.receipt is not None  # noqa: S101, PT018 - by the caller
    if policy is None:
        step(RECEIPT, Word.NO_EVIDENCE, "no policy says whose key the log has", NO_POLICY)
        return
    try:
        find_signer(found.receipt, policy.keys_of(found.receipt.origin))
    except AuditError as error:
        step(RECEIPT, Word.FAIL, f"the policy's log did not sign it: {error}", error.code)
        return
    step(RECEIPT, Word.PROVED, f"the log promised leaf {found.leaf_index} by {found.receipt.merge_deadline}")


def _late(
    found: Misbehaviour, policy: Policy | None, accepted: list[AcceptedCheckpoint], sentence: str
) -> tuple[Word, str, str]:
    """A tree too small for a promised leaf counts if a quorum cosigned it after the deadline."""
    if policy is None or not accepted or found.receipt is None:
        return Word.NO_EVIDENCE, "no policy says whose witnesses' time counts", NO_POLICY
    deadline = datetime.strptime(found.receipt.merge_deadline, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    late = {c.verifier for c in accepted[0].opened.cosignatures if c.timestamp > deadline.timestamp()}
    names = [witness.name for witness in policy.witnesses if witness.verifier in late]
    if policy.quorum == NO_QUORUM or not policy.evaluate(names).satisfied:
        return (
            Word.NO_EVIDENCE,
            "too few of the policy's witnesses cosigned this tree after the deadline",
            "verify.unwitnessed",
        )
    return Word.ATTESTED, f"{sentence}, by the clocks of {', '.join(names)}", "ok"
