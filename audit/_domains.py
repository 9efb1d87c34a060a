"""Which bodies somebody signs, and under which domain."""

from __future__ import annotations

from typing import Any, Final

from audit.bodies import (
    CharterSigned,
    KeyRotated,
    LogCompromised,
    RunAccepted,
    RunStarted,
    SiteEnrolled,
    SiteRefused,
    SiteStatement,
    VersionTransition,
)
from audit.membership import MEMBERSHIP_DOMAINS
from audit.secure_bodies import SECURE_DOMAINS
from audit.serving_bodies import SERVING_DOMAINS
from audit.site_bodies import SITE_DOMAINS

SIGNATURE_FIELDS: Final = frozenset({"signature", "statement_proof", "successor_proof", "witness_proof"})
DOMAINS: Final[dict[type[Any], str]] = {
    SiteEnrolled: "enrolment",
    CharterSigned: "charter",
    RunStarted: "run",
    RunAccepted: "acceptance",
    SiteRefused: "refusal",
    SiteStatement: "statement",
    VersionTransition: "transition",
    KeyRotated: "rotation",
    LogCompromised: "compromise",
    **SITE_DOMAINS,
    **MEMBERSHIP_DOMAINS,
    **SERVING_DOMAINS,
    **SECURE_DOMAINS,
}
