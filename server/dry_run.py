"""What other rules would have said to the last decisions in the log.

Every question is asked again as it stood when it was decided: the models' states and the open alarms up to
its entry, its age then, the region and the legal basis that the entry holds, the purpose from the vault where
the entry seals it. Both sets of rules are asked, the ones in force and the new ones. Where those in force do
not say what was logged, the question could not be rebuilt exactly (a key's terms were changed since, or other
rules decided then): such rows are counted apart, so that nobody takes a difference in the question for one in
the rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from audit.disclosure import CONTEXT
from audit.entries import AccessDenied, Entry, Prediction, PredictionDenied, decode_entry
from audit.errors import AuditError
from audit.ledger import Ledger, StoredEntry
from audit.principal import Authorizer, Decision, Principal, Question
from audit.vault import Vault
from server.access import CedarAuthorizer
from server.facts import age_days, model_attributes
from server.keys import KeyStore, KeyView
from server.rules import RulesInForce

MAX_LAST: Final = 100_000
_PAGE: Final = 500
_DECISIONS: Final = ("prediction", "prediction.denied", "access.denied")
_OF_RESOURCES: Final = ("entry.read", "evidence.export", "reviews.read", "log.read_own", "predict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A decision that the new rules would make otherwise."""

    leaf_index: int
    time: str
    principal: str
    role: str
    action: str
    model: str
    before: str
    after: str
    is_reversed: bool  # allowed and refused change places; else only the policies' names differ


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What a dry run found."""

    asked: int
    same: int
    inexact: int  # the rules in force do not say what was logged
    skipped: int  # what was asked is nowhere any more: erased, or about one entry of the log
    changed: tuple[Changed, ...]

    @property
    def reversed(self) -> int:
        """How many would be decided the other way round."""
        return sum(found.is_reversed for found in self.changed)


def dry_run(
    ledger: Ledger,
    keys: KeyStore,
    vault: Vault | None,
    new: CedarAuthorizer,
    in_force: Authorizer,
    *,
    last: int,
) -> DryRun:
    """Ask the last `last` decisions again.

    Args:
        ledger: the log. keys: whose terms the principals' keys have now. vault: what entries seal; None
        leaves sealed requests out. new: the rules to try. in_force: those that decide.
    """
    told = AsItStood(ledger)
    views = {view.principal: view for view in keys.list()}
    asked = same = inexact = skipped = 0
    changed = []
    for stored in _last(ledger, min(last, MAX_LAST)):
        entry = decode_entry(stored.body)
        told.read_to(stored.leaf_index)
        found = _rebuilt(entry, told, views, vault)
        if found is None:
            skipped += 1
            continue
        asked += 1
        principal, question = found
        logged = _logged(entry)
        if not _agrees(in_force.decide(principal, question), logged):
            inexact += 1
            continue
        after = new.decide(principal, question)
        if _agrees(after, logged):
            same += 1
            continue
        changed.append(_changed(stored, entry, principal, question, logged, after))
    return DryRun(asked=asked, same=same, inexact=inexact, skipped=skipped, changed=tuple(changed))


class AsItStood:
    """The models and alarms of a log as far as a leaf."""

    def __init__(self, ledger: Ledger) -> None:
        self.rules = RulesInForce(ledger)
        self._events = self.rules.events()
        self._next = next(self._events, None)

    def read_to(self, leaf_index: int) -> None:
        """Take every entry before `leaf_index`."""
        while self._next is not None and self._next.leaf_index < leaf_index:
            self.rules.take(self._next)
            self._next = next(self._events, None)


def _last(ledger: Ledger, count: int) -> Iterator[StoredEntry]:
    """The last decisions, oldest first; no more than a page of them is held at a time."""
    after: int | None = None
    places: list[int] = []
    while len(places) < count:
        page = ledger.search(
            type=_DECISIONS, after=after, limit=min(_PAGE, count - len(places)), newest_first=True
        )
        places += [row.leaf_index for row in page]
        if len(page) < _PAGE:
            break
        after = page[-1].leaf_index
    cursor = min(places, default=0) - 1
    while rows := ledger.search(type=_DECISIONS, after=cursor, limit=_PAGE):
        for row in rows:
            if row.leaf_index > places[0]:
                return
            yield row
        cursor = rows[-1].leaf_index


def _rebuilt(
    entry: Entry, told: AsItStood, views: dict[str, KeyView], vault: Vault | None
) -> tuple[Principal, Question] | None:
    match entry.body:
        case Prediction() as body:
            said = _said(body, entry.event_id, vault)
            return None if said is None else _prediction(entry, body, said, told, views, over_quota=False)
        case PredictionDenied() as body:
            context = {"purpose": body.purpose, "legal_basis": body.legal_basis}
            consent = body.legal_basis == "consent" and "consent-not-named" not in body.policies
            over = "quota-exhausted" in body.policies
            return _prediction(entry, body, {**context, "consent": consent}, told, views, over_quota=over)
        case AccessDenied() as body if body.action not in _OF_RESOURCES:
            question = Question(action=body.action, resource="service")
            return _principal(body.principal, body.role, views, region=None), question
        case _:
            return None


def _said(body: Prediction, event_id: str, vault: Vault | None) -> dict[str, Any] | None:
    """What the request said of itself: from the entry, or from the vault; None where it is nowhere."""
    if not body.sealed:
        return {"purpose": body.purpose, "legal_basis": body.legal_basis, "consent": False}
    if vault is None:
        return None
    try:
        values = vault.parts(event_id, type="prediction")[CONTEXT].values
    except AuditError:
        return None
    return {
        "purpose": str(values.get("purpose", "")),
        "legal_basis": str(values.get("legal_basis", "")),
        "consent": "consent" in values,
    }


def _prediction(
    entry: Entry,
    body: Prediction | PredictionDenied,
    said: dict[str, Any],
    told: AsItStood,
    views: dict[str, KeyView],
    *,
    over_quota: bool,
) -> tuple[Principal, Question] | None:
    served = told.rules.models.known(body.model, body.version)
    if served is None:
        return None
    attributes = {
        **model_attributes(served),
        "age_days": age_days(served.registered_at, datetime.fromisoformat(entry.time)),
        "drift_alarms": told.rules.drift_alarms(body.model),
    }
    question = Question(
        action="predict",
        resource=body.model,
        attributes=attributes,
        context={**said, "over_quota": over_quota},
    )
    return _principal(body.principal, body.role, views, region=body.region), question


def _principal(id: str, role: str, views: dict[str, KeyView], *, region: str | None) -> Principal:
    """As the key's terms are now; its region as the entry has it."""
    view = views.get(id)
    known = Principal(id=id, role=role, method="key" if view is not None else "token")
    if view is not None:
        method = "certificate" if view.certificate else "key"
        known = replace(known, site=view.site, region=view.region, models=view.models, method=method)
    return known if region is None else replace(known, region=region)


def _logged(entry: Entry) -> tuple[bool, tuple[str, ...]]:
    body: Any = entry.body
    return isinstance(body, Prediction), tuple(sorted(body.policies))


def _agrees(decision: Decision, logged: tuple[bool, tuple[str, ...]]) -> bool:
    return (decision.allowed, tuple(sorted(decision.policies))) == logged


def _changed(
    stored: StoredEntry,
    entry: Entry,
    principal: Principal,
    question: Question,
    logged: tuple[bool, tuple[str, ...]],
    after: Decision,
) -> Changed:
    return Changed(
        leaf_index=stored.leaf_index,
        time=entry.time,
        principal=principal.id,
        role=principal.role,
        action=question.action,
        model=str(question.attributes.get("name", "")),
        before=_shown(*logged),
        after=_shown(after.allowed, after.policies),
        is_reversed=after.allowed != logged[0],
    )


def _shown(allowed: bool, policies: Sequence[str]) -> str:
    return f"{'allow' if allowed else 'deny'} by {', '.join(policies)}"
