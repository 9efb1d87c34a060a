"""The bodies of a site's own log: what its agent was asked and declined, and what its people decided.

A site's log holds copies of what the site signed for the federation (enrolment, charters, acceptances,
statements, refusals) and, beside them, these. Every one is signed by the site. They carry codes and
numbers only, never a row, a file name or a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLogOpened:
    """The site's identity vouches for the key that signs its own log's checkpoints."""

    site: str
    population: str
    identity_key: str
    log_key: str  # vkey of the site's own log
    signature: str  # by the identity key


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDecided:
    """What the site, by a person or by its rules, decided about a charter or one start of a run."""

    site: str
    run: str  # "": the charter, whatever the run
    charter: str
    start: str  # run_digest of the start decided on; zeros for a charter
    decision: str  # "accepted" | "refused" | "waiting"
    by: str  # "person" | "rules"
    rules: tuple[str, ...]  # names of the rules that were broken or asked, whoever decided
    reason: str  # a refusal code; "" unless refused
    run_epsilon: str  # what the whole plan costs at the site's own delta; "" when it was not computed
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRefused:
    """The agent declined a request that names no run, or that came in a flood."""

    site: str
    kind: str  # as asked, shortened and printable
    reason: str
    count: int  # how often, since the entry before of this kind and reason
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleDecided:
    """The site's people approved or withdrew a bundle, or its launcher was given one they had not."""

    site: str
    digest: str  # SHA-256 of the bundle's bytes
    decision: str  # "approved" | "withdrawn" | "refused"
    signature: str


SITE_DOMAINS: Final[dict[type[Any], str]] = {
    SiteLogOpened: "site-log",
    SiteDecided: "decision",
    RequestRefused: "request",
    BundleDecided: "bundle",
}
"""What each is signed for; see `audit.keys.DOMAINS`."""
