"""What the policies may know of a prediction beyond the model's own words: its charter's terms, its age, the
alarms about it, and what the request says of itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Final

from audit.principal import AttributeValue, Principal
from federation.registry import LIVE
from server.access import FrozenAttributes, SharedAttributes, frozen
from server.hooks import Facts
from server.journal import Clock
from server.rules import RulesInForce

if TYPE_CHECKING:
    from server.answers import Asked
    from server.live import ServedVersion

SECONDS_OF_DAY = 86_400
_KEPT: Final = 256


@dataclass(slots=True, kw_only=True)
class DecisionFacts:
    """A provider of facts (`server.hooks`)."""

    is_shared: ClassVar[bool] = True

    rules: RulesInForce
    clock: Clock
    follow_s: float  # how old what it knows of alarms may be
    _next: float = 0.0

    def facts(self, principal: Principal, asked: Asked, served: ServedVersion) -> Facts:
        """Return the charter's terms and the request's own words."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self.follow_s
            self.rules.refresh()
        resource: dict[str, AttributeValue] = {
            "age_days": age_days(served.registered_at, self.clock()),
            "drift_alarms": self.rules.drift_alarms(served.model),
        }
        context: dict[str, AttributeValue] = {
            "legal_basis": asked.legal_basis or "",
            "consent": bool(asked.consent),
            "over_quota": False,  # `server.service` counts, where there are quotas
        }
        return Facts(resource=resource, context=context)


class ModelAttributes:
    """What the policies may know of a version, made once for all questions in which it is the same."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[ServedVersion, FrozenAttributes, SharedAttributes]] = {}

    def of(self, served: ServedVersion, more: Mapping[str, AttributeValue]) -> SharedAttributes:
        """Return the attributes of `served`, and `more`, which the facts add."""
        added, known = frozen(more), self._known.get(served.version)
        if known is not None and known[0] is served and known[1] == added:
            return known[2]
        if len(self._known) > _KEPT:
            self._known.clear()
        made = SharedAttributes({**model_attributes(served), **more})
        self._known[served.version] = served, added, made
        return made


def model_attributes(served: ServedVersion) -> dict[str, AttributeValue]:
    """Return what charter and registration say of a version, by the schema's names."""
    charter = served.charter
    return {
        "name": served.model,
        "purposes": served.purposes,
        "state": LIVE if served.is_answering else served.state,  # a canary answers by a signature too
        "epsilon_micro": served.epsilon_micro,
        "epsilon_limit_micro": served.epsilon_limit_micro,
        "regions": tuple(charter.get("regions", ())),
        "max_age_days": charter.get("max_age_days", 0),
        "legal_basis_required": charter.get("legal_basis") == "required",
        "legal_effect": has_legal_effect(charter),
    }


def has_legal_effect(charter: dict[str, Any]) -> bool:
    """Say whether a person must review each decision before it is final (GDPR Art. 22)."""
    return charter.get("decisions") == "legal_effect"


_moment = lru_cache(maxsize=64)(datetime.fromisoformat)


def age_days(registered_at: str, now: datetime) -> int:
    """Whole days since `registered_at`; none where the clock was set back."""
    begun = _moment(registered_at)
    return max(0, int((now - begun).total_seconds()) // SECONDS_OF_DAY)
