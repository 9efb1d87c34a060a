"""The bodies that say how a service was used and by which rules: alarms, reviews, rules, keys' successors.

`audit.bodies` holds all other bodies; these are entries like them, in a file of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

ALARM_KINDS: Final = frozenset({"drift", "extraction", "membership", "out_of_distribution"})
"""What an alarm may be about. While one of kind `drift` is open, policy `drift-alarm-open` answers nobody."""

REVIEW_OUTCOMES: Final = frozenset({"confirmed", "overturned"})
"""What a person made of a decision: it stands, or it does not."""

LEGAL_BASES: Final = frozenset(
    {
        "consent",  # Art. 6(1)(a), 9(2)(a): the request names the consent
        "contract",  # Art. 6(1)(b)
        "legal_obligation",  # Art. 6(1)(c)
        "vital_interests",  # Art. 6(1)(d), 9(2)(c)
        "public_task",  # Art. 6(1)(e)
        "legitimate_interests",  # Art. 6(1)(f)
        "health_care",  # Art. 9(2)(h)
        "public_health",  # Art. 9(2)(i)
        "research",  # Art. 9(2)(j)
    }
)
"""The words for a legal basis in the sense of GDPR Art. 6 and 9. That it applies is the caller's claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmRaised:
    """Something about a model, or about how somebody uses it, passed a threshold."""

    alarm: str  # 32 hex; what `alarm.closed` names
    kind: str  # one of ALARM_KINDS
    model: str  # "" where it is about none
    measure: str  # what was measured, by name
    value: str  # decimal text
    threshold: str  # decimal text
    window_s: int  # over how long; 0: at once
    version: str = ""
    principal: str = ""  # whose requests, where it is about somebody's


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmClosed:
    """A person looked into it."""

    alarm: str
    kind: str
    model: str
    principal: str
    role: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionReviewed:
    """A person stands behind a decision with legal effect, or against it (GDPR Art. 22(3)).

    Written once a decision: what a first officer found stays found. Without `signature` the API says that the
    holder of an officer's key did it; with it, the person's own key says so.
    """

    decision: str  # event id of the prediction's entry
    prediction: str  # leaf hash of that entry
    model: str
    version: str
    outcome: str  # one of REVIEW_OUTCOMES
    reason: str  # closed words or a file number; it must name nobody
    principal: str
    role: str
    officer: str  # public key, or ""
    signature: str  # base64, or "" where `officer` is ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyChanged:
    """From here on these rules decide. Signed by an officer of every charter that has a live version."""

    policy_set: str  # SHA-256 of `text`
    schema_digest: str
    text: str  # the Cedar policies, whole
    previous_change: str  # leaf hash of the change before; zeros for the first
    officer: str  # public key
    reason: str
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReplaced:
    """A key got a successor for the same principal, and ends."""

    key_id: str
    successor: str
    expires: str  # when the old one ends


ServingBody = AlarmRaised | AlarmClosed | PredictionReviewed | PolicyChanged | KeyReplaced

SERVING_TYPES: Final[dict[str, type[Any]]] = {
    "alarm.raised": AlarmRaised,
    "alarm.closed": AlarmClosed,
    "prediction.reviewed": PredictionReviewed,
    "policy.changed": PolicyChanged,
    "key.replaced": KeyReplaced,
}
SERVING_DOMAINS: Final[dict[type[Any], str]] = {
    PredictionReviewed: "review",
    PolicyChanged: "access-policy",
}
"""What each is signed for; see `audit.keys.DOMAINS`."""
