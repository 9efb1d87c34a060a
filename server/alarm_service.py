"""Use cases of alarms: which are open, one that a job of yours raises, an officer's word that one is over."""

from __future__ import annotations

import re
import secrets
from typing import Final

from audit.decimals import parse_decimal
from audit.errors import AuditError
from audit.principal import Authorizer, Principal, Question, require
from audit.serving_bodies import ALARM_KINDS, AlarmClosed, AlarmRaised
from federation.coordinator import stable_event_id
from server.errors import AlarmNotFoundError, MalformedRequestError
from server.journal import Journal
from server.live import LiveModels
from server.rules import RulesInForce

_ALARM: Final = re.compile(r"[0-9a-f]{32}")


def open_alarms(rules: RulesInForce, principal: Principal, authorizer: Authorizer) -> tuple[AlarmRaised, ...]:
    """Return the alarms that nobody closed.

    Raises:
        AccessDeniedError: the caller may not read them.
    """
    require(authorizer, principal, Question(action="alarms.read", resource="service"))
    rules.refresh()
    return rules.open_alarms()


def raise_alarm(
    live: LiveModels,
    journal: Journal,
    principal: Principal,
    authorizer: Authorizer,
    *,
    kind: str,
    model: str,
    measure: str,
    value: str,
    threshold: str,
    window_s: int,
) -> tuple[str, int]:
    """Raise an alarm about a model; return its id and leaf index.

    Raises:
        AccessDeniedError: the caller may not.
        ModelNotFoundError: there is no such model.
        MalformedRequestError: a number is no decimal text, or the kind is none.
    """
    require(authorizer, principal, Question(action="alarms.raise", resource="service"))
    live.versions(model)
    if kind not in ALARM_KINDS:
        raise MalformedRequestError(f"kind: {kind[:40]!r}; one of {', '.join(sorted(ALARM_KINDS))}")
    for name, text in (("value", value), ("threshold", threshold)):
        try:
            parse_decimal(text)
        except AuditError as error:
            raise MalformedRequestError(f"{name}: {error}") from error
    alarm = secrets.token_hex(16)
    body = AlarmRaised(
        alarm=alarm, kind=kind, model=model, measure=measure, value=value, threshold=threshold,
        window_s=window_s,
    )  # fmt: skip
    return alarm, journal.append_now(body).leaf_index


def close_alarm(
    rules: RulesInForce,
    journal: Journal,
    principal: Principal,
    authorizer: Authorizer,
    alarm: str,
    reason: str,
) -> int:
    """Close an alarm and return the leaf index that says so.

    Raises:
        AccessDeniedError: the caller is no officer.
        AlarmNotFoundError: no open alarm has that id.
    """
    require(authorizer, principal, Question(action="alarms.close", resource="service"))
    rules.refresh()
    found = rules.alarm(alarm) if _ALARM.fullmatch(alarm) else None
    if found is None:
        raise AlarmNotFoundError(f"no open alarm {alarm[:40]!r}; GET /v1/alarms lists them")
    body = AlarmClosed(
        alarm=alarm, kind=found.kind, model=found.model, principal=principal.id, role=principal.role,
        reason=reason,
    )  # fmt: skip
    sequenced = journal.append_now(body, event_id=stable_event_id("alarm.closed", alarm))
    rules.refresh()
    return sequenced.leaf_index
