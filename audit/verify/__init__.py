"""The offline verifier: from one evidence file and one policy to a verdict, by recomputing.

`verify_evidence(data, policy_text=...)` walks the steps in order. Each is a function of what earlier ones
established (`audit.verify.chain`); it returns an outcome, or raises `FailError` or `GapError`. The
verdict follows from the words alone (`audit.verify.report`). Nothing is believed because the file says
so: keys and quorum come from the policy. The standard library and `cryptography` suffice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

from audit.errors import AuditError
from audit.evidence import EvidenceError, read_evidence
from audit.tlog_policy import Policy
from audit.verify import (
    aggregation,
    answer,
    approval,
    budget,
    disclosed,
    history,
    members,
    review,
    rules,
    training,
)
from audit.verify.chain import Chain, FailError, GapError, Outcome
from audit.verify.report import EXIT_CODES, EpsilonLine, Report, Step, Verdict, Word

__all__ = ["EXIT_CODES", "EpsilonLine", "Report", "Step", "Verdict", "Word", "verify_evidence"]

Check = Callable[[Chain], Outcome]

_LOG: tuple[tuple[str, Check], ...] = (
    (history.FILE, history.check_file),
    (history.CHECKPOINT, history.check_checkpoint),
    (history.INCLUSION, history.check_inclusion),
    (history.LINKS, history.check_links),
)
_RUN: tuple[tuple[str, Check], ...] = (
    (members.CHARTER, members.check_charter),
    (members.SITES, members.check_sites),
    (training.RUN, training.check_run),
    (training.ROUNDS, training.check_rounds),
    (training.NOISE, training.check_noise),
    (aggregation.REPLAY, aggregation.check_aggregation),
    (aggregation.WEIGHTS, aggregation.check_weights),
    (approval.METRICS, approval.check_metrics),
    (budget.ODOMETERS, budget.check_odometers),
    (budget.EPSILON, budget.check_epsilon),
)
_PREDICTION: tuple[tuple[str, Check], ...] = (
    (answer.DECISION, answer.check_decision),
    (rules.RULES, rules.check_rules),
    (answer.ANSWER, answer.check_answer),
    (review.REVIEW, review.check_review),
)


def verify_evidence(
    data: bytes,
    *,
    policy_text: str | None,
    receipt: bytes | None = None,
    replay: bool | None = None,
    now: datetime | None = None,
    max_age_s: int | None = None,
) -> Report:
    """Verify an evidence file. Hostile bytes give a report, never an exception.

    Args:
        data: the file. policy_text: the policy, obtained elsewhere; without it no verdict is better than
        SELF-CONSISTENT ONLY. receipt: a receipt to check beside (or instead of) the one in the file.
        replay: whether to replay the aggregation; None replays what is cheap. now: the reader's clock,
        aware; the machine's when None. max_age_s: how old a quorum's cosignatures may be.

    Raises:
        MalformedPolicyError: the policy is not one; names the line.
    """
    policy = None if policy_text is None else Policy.parse(policy_text)
    try:
        evidence = read_evidence(data)
    except EvidenceError as error:
        step = Step(number=1, title=history.FILE, word=Word.FAIL, detail=str(error), code=error.code)
        return Report(steps=(step,))
    chain = Chain(
        evidence=evidence,
        policy=policy,
        now_s=int((now or datetime.now(UTC)).timestamp()),
        max_age_s=max_age_s,
        replay=replay,
        receipt=receipt if receipt is not None else evidence.receipt,
    )
    checks = _checks(chain)
    steps = tuple(_take(chain, number, title, check) for number, (title, check) in enumerate(checks, start=1))
    origin = chain.checkpoint_facts.get("origin", "an unknown log")
    return Report(
        steps=steps,
        scope=evidence.scope,
        subject=f"{evidence.scope}, leaf {evidence.leaf_index} of {origin}",
        checkpoint={**chain.checkpoint_facts, "file_sha256": hashlib.sha256(data).hexdigest()},
        epsilons=chain.epsilons,
    )


def _checks(chain: Chain) -> tuple[tuple[str, Check], ...]:
    scope = chain.evidence.scope
    checks = _LOG
    if chain.max_age_s is not None:
        checks = (*checks[:2], (history.AGE, history.check_age), *checks[2:])
    if scope != "entry":
        checks += _RUN
    if scope in ("version", "prediction"):
        checks += ((approval.GATES, approval.check_gates), (approval.APPROVALS, approval.check_approvals))
    if scope == "prediction":
        checks += _PREDICTION
    if chain.evidence.disclosed is not None:
        checks += ((disclosed.DISCLOSED, disclosed.check_disclosed),)
    if chain.receipt is not None:
        checks += ((answer.RECEIPT, answer.check_receipt),)
    return checks


def _take(chain: Chain, number: int, title: str, check: Check) -> Step:
    word, code, entry = Word.FAIL, "", None
    try:
        outcome = check(chain)
        word, detail, code, entry = outcome.word, outcome.detail, outcome.code, outcome.entry
    except GapError as error:
        word, detail, code, entry = Word.NO_EVIDENCE, error.detail, error.code, error.entry
    except FailError as error:
        detail, code, entry = error.detail, error.code, error.entry
    except AuditError as error:
        detail, code = str(error), error.code
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        detail, code = f"the bytes cannot be judged: {type(error).__name__}: {error}", "verify.unreadable"
    return Step(number=number, title=title, word=word, detail=detail, code=code, entry=entry)
