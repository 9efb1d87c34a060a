"""Use cases of alarms: which are open, and an officer's word that one is over."""

from __future__ import annotations

import re
from typing import Final

from audit.principal import Authorizer, Principal, Question, require
from audit.serving_bodies import AlarmClosed, AlarmRaised
from federation.coordinator import stable_event_id
from server.errors import AlarmNotFoundError
from server.journal import Journal
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
