"""Who belongs to the federation, read from the log alone, kept up to date as it grows."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from audit.entries import decode_entry
from audit.ledger import Ledger
from audit.membership import (
    SiteApproved,
    SiteInvited,
    SiteJoined,
    SiteKeysRotated,
    SiteLeft,
    SiteRevoked,
)
from federation.network.invitation import parse_time
from federation.network.pki import urgency_of

State = Literal["invited", "requested", "approved", "revoked", "left", "replaced"]

TYPES: Final = (
    "site.invited",
    "site.joined",
    "site.approved",
    "site.revoked",
    "site.left",
    "site.keys_rotated",
)
_PAGE: Final = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One invitation and what became of it."""

    site: str
    label: str
    invitation: str
    invited_until: str
    approval: str
    state: State = "invited"
    identity_key: str = ""
    node_key: str = ""
    node_expires: str = ""
    enrolment: str = ""
    reason: str = ""
    past_keys: tuple[str, ...] = ()

    def standing(self, now: datetime) -> str:
        """Return the state, or "expired" where its time is over."""
        if self.state == "invited" and now >= parse_time(self.invited_until):
            return "expired"
        if self.state == "approved" and now >= parse_time(self.node_expires):
            return "expired"
        return self.state

    def urgency(self, now: datetime) -> str:
        """Return "urgent" or "soon" for a member whose node key ends within 7 or 30 days.

        A site that is up exchanges its key before; where this shows, it is away or cannot.
        """
        if self.standing(now) != "approved":
            return ""
        return urgency_of(parse_time(self.node_expires) - now)


class Roster:
    """The fold of all membership entries. Thread-safe; `refresh` reads what is new."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._after = ledger, -1
        self._members: dict[str, Member] = {}
        self._lock = threading.Lock()

    def refresh(self) -> Roster:
        """Read the entries that were added since; return this roster."""
        with self._lock:
            while page := self._ledger.search(type=TYPES, after=self._after, limit=_PAGE):
                for row in page:
                    self._take(decode_entry(row.body).body)
                    self._after = row.leaf_index
        return self

    def __iter__(self) -> Iterator[Member]:
        with self._lock:
            return iter(list(self._members.values()))

    def of_invitation(self, digest: str) -> Member | None:
        with self._lock:
            return self._members.get(digest)

    def of_site(self, site: str) -> Member | None:
        """Return the site's newest record that says most: approved before requested before invited."""
        found = [member for member in self if member.site == site]
        for state in ("approved", "requested", "invited"):
            for member in reversed(found):
                if member.state == state:
                    return member
        return found[-1] if found else None

    def of_identity(self, identity_key: str) -> Member | None:
        """Return the newest record of an identity key."""
        found = [member for member in self if member.identity_key == identity_key]
        return found[-1] if found else None

    def of_node_key(self, node_key: str) -> Member | None:
        """Return the record that has, or had, this node key; the one that has it first."""
        past = None
        for member in self:
            if member.node_key == node_key:
                return member
            if node_key in member.past_keys:
                past = member
        return past

    def approved(self) -> tuple[Member, ...]:
        return tuple(member for member in self if member.state == "approved")

    def _take(self, body: object) -> None:
        """Apply one entry; one that does not follow from the state before changes nothing."""
        if isinstance(body, SiteInvited):
            if body.invitation not in self._members:
                self._members[body.invitation] = Member(
                    site=body.site,
                    label=body.label,
                    invitation=body.invitation,
                    invited_until=body.expires,
                    approval=body.approval,
                )
            return
        invitation = getattr(body, "invitation", "")
        member = self._members.get(invitation)
        if member is None or getattr(body, "site", None) != member.site:
            return
        state = member.state
        if isinstance(body, SiteJoined) and state == "invited":
            member = dataclasses.replace(
                member,
                state="requested",
                identity_key=body.identity_key,
                node_key=body.node_key,
                node_expires=body.expires,
                enrolment=body.enrolment,
            )
        elif isinstance(body, SiteApproved) and state == "requested":
            if (body.identity_key, body.node_key) != (member.identity_key, member.node_key):
                return
            self._replace_others(member)
            member = dataclasses.replace(member, state="approved")
        elif isinstance(body, SiteRevoked) and state in ("invited", "requested", "approved"):
            member = dataclasses.replace(member, state="revoked", reason=body.reason)
        elif isinstance(body, SiteLeft) and state in ("requested", "approved"):
            member = dataclasses.replace(member, state="left")
        elif isinstance(body, SiteKeysRotated) and state == "approved":
            if body.previous_key != member.node_key:
                return
            member = dataclasses.replace(
                member,
                node_key=body.node_key,
                node_expires=body.expires,
                past_keys=(*member.past_keys, body.previous_key),
            )
        else:
            return
        self._members[invitation] = member

    def _replace_others(self, member: Member) -> None:
        for digest, other in list(self._members.items()):
            if other.site == member.site and other.state == "approved":
                self._members[digest] = dataclasses.replace(other, state="replaced")


def seconds_left(ledger: Ledger) -> float | None:
    """Return the seconds until the first of the members' node keys ends; None without members."""
    now = datetime.now(UTC)
    left = [
        (parse_time(member.node_expires) - now).total_seconds()
        for member in Roster(ledger).refresh().approved()
    ]
    return min(left, default=None)
