"""Changing who belongs: invite, take a request, approve, revoke, let go, exchange node keys.

Every step is an entry, and the log is the only record of it; the same step again is the same entry. What a
request carries beyond its entry (the site's enrolment) waits in `<home>/network/requests` until somebody
approves. A refusal is an entry too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

from audit._files import write_durably
from audit.canonical import canonical_bytes
from audit.entries import (
    ZERO_DIGEST,
    Body,
    SiteEnrolled,
    body_document,
    columns_of,
    decode_entry,
    decode_signature,
    encode_entry,
    new_entry,
    parse_body,
    signing_payload,
)
from audit.errors import AuditError, EventIdConflictError
from audit.keys import VerifyKey, parse_public_key
from audit.ledger import Ledger
from audit.membership import (
    JoinRefused,
    NodeRefused,
    SiteApproved,
    SiteInvited,
    SiteJoined,
    SiteKeysRotated,
    SiteLeft,
    SiteRevoked,
)
from federation.coordinator import stable_event_id
from federation.errors import StatementError
from federation.network.errors import InvitationError, JoinRefusedError, MembershipError
from federation.network.invitation import (
    Invitation,
    format_time,
    new_secret,
    parse_time,
    secret_digest,
    site_slug,
)
from federation.network.pki import node_fingerprint, parse_node_key
from federation.network.roster import Member, Roster
from federation.statements import verify_enrolment

Clock = Callable[[], datetime]

MAX_NODE_DAYS: Final = 400
OPERATOR: Final = "coordinator"


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRequest:
    label: str
    name: str = ""  # by default made from the label
    valid_hours: int = 72
    auto_approve: bool = False


class Membership:
    """The writer. `ledger` is open; `folder` is the coordinator's `network` folder."""

    def __init__(self, ledger: Ledger, folder: Path, clock: Clock = utc_now) -> None:
        self._ledger, self._folder, self._clock = ledger, folder, clock
        self.roster = Roster(ledger)

    @property
    def origin(self) -> str:
        return self._ledger.origin

    def invite(self, request: InviteRequest, *, address: str, ca: str, log_key: str) -> Invitation:
        """Make an invitation; the secret is in the returned line and nowhere else.

        Raises:
            InvitationError: name, address or time cannot be.
            MembershipError: the site belongs already.
        """
        site = request.name or site_slug(request.label)
        present = self.roster.refresh().of_site(site)
        if present is not None and present.standing(self._clock()) == "approved":
            raise MembershipError(f"site {site} belongs already; `affidavit site revoke {site}` first")
        if not 1 <= request.valid_hours <= 24 * 90:
            raise InvitationError(
                f"an invitation is valid for 1 hour to 90 days, not {request.valid_hours} hours"
            )
        invitation = Invitation(
            address=address,
            ca=ca,
            expires=format_time(self._clock() + timedelta(hours=request.valid_hours)),
            label=request.label,
            log=log_key,
            secret=new_secret(),
            site=site,
        )
        body = SiteInvited(
            site=site,
            label=request.label,
            invitation=invitation.digest,
            expires=invitation.expires,
            approval="automatic" if request.auto_approve else "operator",
        )
        self._append(body, OPERATOR, "site.invited", invitation.digest)
        return invitation

    def request(self, secret: str, joined: object, enrolment: object) -> Member:
        """Take a site's signed request. The same request again gets the same answer.

        Raises:
            JoinRefusedError: with a reason of the closed list; it is in the log.
        """
        digest = secret_digest(secret)
        member = self.roster.refresh().of_invitation(digest)
        if member is None:
            self._refuse_stranger("not_invited")
        now = self._clock()
        try:
            body = parse_body(SiteJoined, joined)
        except AuditError:
            self._refuse(member, "signature")
        if member.state == "revoked":
            self._refuse(member, "revoked")
        if body.invitation != digest or body.site != member.site or body.origin != self.origin:
            self._refuse(member, "site_mismatch")
        known = (member.identity_key, member.node_key)
        if member.state != "invited" and (body.identity_key, body.node_key) != known:
            self._refuse(member, "used")
        if member.state == "invited" and now >= parse_time(member.invited_until):
            self._refuse(member, "expired")
        enrolled = self._proved(member, body, enrolment, now)
        if member.state != "invited":
            return member
        for other in self.roster:
            if other.invitation == digest:
                continue
            if other.identity_key == body.identity_key and other.site != body.site:
                self._refuse(member, "identity_taken")
            if body.node_key in (other.node_key, *other.past_keys):
                self._refuse(member, "key_taken")
        self._keep_request(digest, enrolled)
        try:
            self._append(body, f"site:{body.site}", "site.joined", digest)
        except EventIdConflictError:
            self._refuse(member, "used")
        if member.approval == "automatic":
            return self.approve(member.site, by="invitation")
        return self._present(digest)

    def approve(self, site: str, *, by: str = "operator") -> Member:
        """Let the site in: its enrolment becomes an entry, its node key may reach the federation.

        Raises:
            MembershipError: there is no request of that site.
        """
        member = self._one(site, "requested", "has sent no request that waits")
        enrolled = self._kept_request(member)
        latest = [body for _, body in self._bodies(SiteEnrolled, "site.enrolled", site)]
        if not latest or body_document(latest[-1]) != body_document(enrolled):
            self._append(enrolled, f"site:{site}", "site.enrolled", member.invitation, member.enrolment)
        body = SiteApproved(
            site=site,
            invitation=member.invitation,
            identity_key=member.identity_key,
            node_key=member.node_key,
            by=by,
        )
        self._append(body, OPERATOR, "site.approved", member.invitation)
        return self._present(member.invitation)

    def revoke(self, site: str, reason: str) -> tuple[Member, ...]:
        """Shut out every open invitation, request and membership of the site; it holds at once.

        Raises:
            MembershipError: there is nothing to revoke.
        """
        found = [
            member
            for member in self.roster.refresh()
            if member.site == site and member.state in ("invited", "requested", "approved")
        ]
        if not found:
            raise MembershipError(f"site {site} is not here: no invitation, request or membership is open")
        for member in found:
            body = SiteRevoked(site=site, invitation=member.invitation, reason=reason[:200])
            self._append(body, OPERATOR, "site.revoked", member.invitation)
        return tuple(self._present(member.invitation) for member in found)

    def leave(self, document: object) -> Member:
        """Take a site's signed word that it leaves.

        Raises:
            MembershipError, JoinRefusedError: it does not belong, or did not sign.
        """
        body = self._parsed(SiteLeft, document)
        member = self._signed_member(body)
        if member.state not in ("requested", "approved", "left"):
            raise MembershipError(f"site {body.site} does not belong; it is {member.state}")
        self._append(body, f"site:{body.site}", "site.left", body.invitation)
        return self._present(body.invitation)

    def rotate(self, document: object) -> Member:
        """Exchange a site's node key for the one that its identity key signed.

        Raises:
            MembershipError, JoinRefusedError: it does not belong, did not sign, or signed an older exchange.
        """
        body = self._parsed(SiteKeysRotated, document)
        member = self._signed_member(body)
        if member.state != "approved":
            raise MembershipError(f"site {body.site} does not belong; it is {member.state}")
        if member.node_key == body.node_key and body.previous_key in member.past_keys:
            return member
        if member.node_key != body.previous_key:
            raise MembershipError(
                f"site {body.site} has another node key by now; this exchange is an old one"
            )
        if self.roster.of_node_key(body.node_key) is not None:
            self._refuse(member, "key_taken")
        self._check_node(member, body.node_key, body.expires, self._clock())
        self._append(
            body,
            f"site:{body.site}",
            "site.keys_rotated",
            body.invitation,
            node_fingerprint(body.previous_key),
        )
        return self._present(body.invitation)

    def enrol(self, document: object) -> Member:
        """Take a member's new enrolment: other keys for statements and key agreement, by the same identity.

        Raises:
            MembershipError: it is no member's, or changes what an enrolment may not change.
            JoinRefusedError: its keys did not sign it.
        """
        body = self._parsed(SiteEnrolled, document)
        found = self.roster.refresh().of_identity(body.identity_key)
        if found is None or found.state != "approved" or found.site != body.site:
            raise MembershipError(f"site {body.site[:63]} does not belong under that identity")
        try:
            enrolled = verify_enrolment(found.site, found.identity_key, self.origin, document)
        except StatementError:
            self._refuse(found, "signature")
        past = [item for _, item in self._bodies(SiteEnrolled, "site.enrolled", found.site)]
        own = [item for item in past if item.identity_key == found.identity_key]
        if own:
            for field in ("population", "witness_key", "operator"):
                if getattr(enrolled, field) != getattr(own[-1], field):
                    raise MembershipError(f"site {found.site}: a new enrolment keeps its {field}")
            if body_document(own[-1]) == body_document(enrolled):
                return found
            if enrolled.statement_key in {item.statement_key for item in own}:
                raise MembershipError(f"site {found.site}: a statement key that was replaced stays replaced")
        digest = enrolment_digest(enrolled)
        self._append(enrolled, f"site:{found.site}", "site.enrolled", found.invitation, digest)
        return found

    def node_refused(self, site: str, fingerprint: str, reason: str) -> None:
        """Record that the gateway turned a key away: once an hour for a member's key and a reason, once an
        hour for all strangers together, so that nobody outside can fill the log.
        """
        hour = self._clock().strftime("%Y-%m-%dT%H")
        who = fingerprint if site else ""
        body = NodeRefused(site=site, node_key=fingerprint, reason=reason)
        event_id = stable_event_id("node.refused", who, reason, hour)
        if self._ledger.find_event(event_id) is None:
            self._append_as(body, OPERATOR, event_id)

    def members_enrolments(self) -> tuple[SiteEnrolled, ...]:
        """Return the latest enrolment of every approved site, in the order of names."""
        names = {member.site for member in self.roster.refresh().approved()}
        latest = {body.site: body for _, body in self._bodies(SiteEnrolled, "site.enrolled")}
        return tuple(latest[name] for name in sorted(names & set(latest)))

    def _proved(self, member: Member, body: SiteJoined, enrolment: object, now: datetime) -> SiteEnrolled:
        self._check_signature(member, body, body.identity_key)
        self._check_node(member, body.node_key, body.expires, now)
        try:
            enrolled = verify_enrolment(body.site, body.identity_key, self.origin, enrolment)
        except StatementError:
            self._refuse(member, "signature")
        if enrolment_digest(enrolled) != body.enrolment:
            self._refuse(member, "signature")
        return enrolled

    def _check_signature(self, member: Member, body: Any, identity_key: str) -> None:
        domain, payload = signing_payload(body)
        try:
            key = VerifyKey(parse_public_key(identity_key))
            key.verify(domain, payload, decode_signature(body.signature))
        except AuditError:
            self._refuse(member, "signature")

    def _check_node(self, member: Member, node_key: str, expires: str, now: datetime) -> None:
        try:
            parse_node_key(node_key)
            end = parse_time(expires)
        except (ValueError, InvitationError):
            self._refuse(member, "signature")
        if not now < end <= now + timedelta(days=MAX_NODE_DAYS):
            self._refuse(member, "expired")

    def _signed_member(self, body: SiteLeft | SiteKeysRotated) -> Member:
        member = self.roster.refresh().of_invitation(body.invitation)
        if member is None or member.site != body.site or body.origin != self.origin:
            raise MembershipError(f"site {body.site[:63]} does not belong under that invitation")
        self._check_signature(member, body, member.identity_key)
        return member

    def _parsed(self, kind: type[Any], document: object) -> Any:
        try:
            return parse_body(kind, document)
        except AuditError as error:
            raise MembershipError(f"the message is malformed: {error}") from error

    def _refuse(self, member: Member, reason: str) -> NoReturn:
        body = JoinRefused(site=member.site, invitation=member.invitation, reason=reason)
        self._append(body, OPERATOR, "join.refused", member.invitation, reason)
        raise JoinRefusedError(member.site, reason)

    def _refuse_stranger(self, reason: str) -> NoReturn:
        hour = self._clock().strftime("%Y-%m-%dT%H")
        body = JoinRefused(site="", invitation=ZERO_DIGEST, reason=reason)
        self._append(body, OPERATOR, "join.refused", reason, hour)
        raise JoinRefusedError("", reason)

    def _one(self, site: str, state: str, problem: str) -> Member:
        found = [m for m in self.roster.refresh() if m.site == site and m.state == state]
        if not found:
            raise MembershipError(f"site {site} {problem}; `affidavit site list` shows who is where")
        return found[-1]

    def _present(self, invitation: str) -> Member:
        member = self.roster.refresh().of_invitation(invitation)
        assert member is not None  # noqa: S101 - its entry was just written
        return member

    def _bodies(self, kind: type[Any], name: str, site: str | None = None) -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []
        after = -1
        while page := self._ledger.search(type=name, after=after, limit=500, site=site):
            for row in page:
                body = decode_entry(row.body).body
                if isinstance(body, kind):
                    found.append((row.leaf_index, body))
                after = row.leaf_index
        return found

    def _keep_request(self, digest: str, enrolled: SiteEnrolled) -> None:
        folder = self._folder / "requests"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_durably(folder / f"{digest}.json", canonical_bytes(body_document(enrolled)))

    def _kept_request(self, member: Member) -> SiteEnrolled:
        path = self._folder / "requests" / f"{member.invitation}.json"
        try:
            enrolled = parse_body(SiteEnrolled, json.loads(path.read_bytes()))
        except (OSError, ValueError, AuditError) as error:
            raise MembershipError(
                f"{path}: the request is not here ({error}); ask the site to join again"
            ) from error
        if enrolment_digest(enrolled) != member.enrolment:
            raise MembershipError(f"{path}: is not what the site signed; ask the site to join again")
        return enrolled

    def _append(self, body: Body, actor: str, *parts: str) -> None:
        self._append_as(body, actor, stable_event_id(*parts))

    def _append_as(self, body: Body, actor: str, event_id: str) -> None:
        found = self._ledger.find_event(event_id)
        if found is not None and body_document(decode_entry(found.body).body) == body_document(body):
            return
        entry = new_entry(body, actor=actor, time=format_time(self._clock()), event_id=event_id)
        data = encode_entry(entry)
        self._ledger.append_wait(data, event_id=event_id, index_columns=columns_of(data))


def enrolment_digest(enrolled: SiteEnrolled) -> str:
    """Return the SHA-256 of the canonical body, by which a request names its enrolment."""
    return hashlib.sha256(canonical_bytes(body_document(enrolled))).hexdigest()
