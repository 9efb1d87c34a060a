"""Use cases of the rules: read them, and change them by an officer's own signature."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from audit.entries import ZERO_DIGEST, signing_payload
from audit.keys import SigningKey
from audit.principal import Authorizer, Principal, Question, require
from audit.serving_bodies import PolicyChanged
from server.access import CedarAuthorizer, PolicyText, locked_out, with_shipped_schema
from server.errors import PolicyLockOutError, PolicyRefusedError
from server.journal import Journal
from server.rules import Change, RulesInForce


def rules_document(
    rules: RulesInForce, principal: Principal, authorizer: Authorizer, fallback: PolicyText
) -> dict[str, Any]:
    """Return the rules in force and who put them there; `fallback` decides while nobody did.

    Raises:
        AccessDeniedError: the caller may not read them.
    """
    require(authorizer, principal, Question(action="policy.read", resource="service"))
    rules.refresh()
    change = rules.change
    text = fallback if change is None else with_shipped_schema(change.body.text)
    return {
        "policy_set": hashlib.sha256(text.policies.encode()).hexdigest(),
        "schema_digest": hashlib.sha256(text.schema.encode()).hexdigest(),
        "policies": sorted(CedarAuthorizer(text).names),
        "text": text.policies,
        "change": None if change is None else _shown(change),
        "previous_change": ZERO_DIGEST if change is None else change.leaf_hash,
    }


def draft_change(text: str, previous_change: str, officer: str, reason: str) -> PolicyChanged:
    """Return the body of a change, unsigned.

    Raises:
        PolicyLoadError: the text does not hold together.
    """
    found = CedarAuthorizer(with_shipped_schema(text))
    return PolicyChanged(
        policy_set=found.policy_set,
        schema_digest=found.schema_digest,
        text=text,
        previous_change=previous_change,
        officer=officer,
        reason=reason,
        signature="",
    )


def signed_change(text: str, previous_change: str, officer: SigningKey, reason: str) -> PolicyChanged:
    """Return a change signed with an officer's own key; errors as `draft_change`."""
    import base64

    body = draft_change(text, previous_change, officer.text, reason)
    signature = officer.sign(*signing_payload(body))
    return replace(body, signature=base64.b64encode(signature).decode())


def apply_change(
    rules: RulesInForce,
    journal: Journal,
    principal: Principal,
    authorizer: Authorizer,
    body: PolicyChanged,
    *,
    lock_out: bool = False,
) -> Change:
    """Put a signed change into the log; every worker follows within seconds.

    Raises:
        AccessDeniedError: the caller is no officer.
        PolicyRefusedError: it does not count, and nothing was written; or another change came first.
        PolicyLockOutError: no officer could read or change the rules then, and `lock_out` does not allow it.
        LedgerUnavailableError: it is not, or not known to be, in the log.
    """
    require(authorizer, principal, Question(action="policy.change", resource="service"))
    rules.refresh()
    fault = rules.fault(body)
    if fault:
        raise PolicyRefusedError(f"the rules stay as they are: {fault}")
    if not lock_out:
        check_lock_out(CedarAuthorizer(with_shipped_schema(body.text)))
    sequenced = journal.append_now(body)
    rules.refresh()
    change = rules.change
    if change is None or change.leaf_hash != sequenced.leaf_hash.hex():
        raise PolicyRefusedError("another change came first; look at the rules in force, then sign again")
    return change


def check_lock_out(authorizer: CedarAuthorizer) -> None:
    """Refuse rules that lock officers out.

    Raises:
        PolicyLockOutError: an officer could not read or change the rules any more.
    """
    refused = locked_out(authorizer)
    if refused:
        raise PolicyLockOutError(
            f"under these rules an officer may not do {' and '.join(refused)}, so that they could be changed "
            "at the coordinator's home alone; apply them with --lock-out if that is meant"
        )


def _shown(change: Change) -> dict[str, Any]:
    return {
        "leaf_index": change.leaf_index,
        "leaf_hash": change.leaf_hash,
        "time": change.time,
        "officer": change.body.officer,
        "reason": change.body.reason,
    }
