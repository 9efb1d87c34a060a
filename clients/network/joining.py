"""Joining a federation, leaving it, and exchanging the node key: what `affidavit site …` calls.

Keys are made here and stay here. What is sent is public and signed by the site's identity key; each step can
be repeated, and ends where it left off.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from audit._files import write_durably
from audit.entries import SiteEnrolled, body_document, signing_payload
from audit.errors import AuditError
from audit.membership import SiteJoined, SiteKeysRotated, SiteLeft
from audit.notes import NoteVerifier
from audit.site_bodies import RequestRefused
from audit.tlog_policy import Policy
from clients.errors import ClientsError, HomeError
from clients.home import SiteHome
from clients.identity import SiteKeys, signature_text
from clients.network.coordinator import CoordinatorError, CoordinatorLink, WrongCaError, fetch_ca
from clients.network.membership import NetworkFolder, SiteMembership, network_folder
from federation.errors import StatementError
from federation.network.errors import JoinRefusedError
from federation.network.invitation import Invitation, format_time, parse_time
from federation.network.membership import enrolment_digest
from federation.network.pki import create_node_key, read_node_key, renewal_margin
from federation.statements import verify_enrolment

_logger = logging.getLogger(__name__)

B = TypeVar("B", SiteJoined, SiteLeft, SiteKeysRotated)
Clock = Callable[[], datetime]

NODE_LIFETIME_S: Final = 365 * 86_400.0
POLL_S: Final = 1.0
RESTART_S: Final = 30.0  # for an agent to notice that its keys were exchanged
WAITS: Final = frozenset({"requested"})


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Where a request stands: "requested" or "approved"."""

    site: str
    state: str
    home: Path
    identity: str


def join(
    home: SiteHome,
    invitation: Invitation,
    *,
    node_lifetime_s: float = NODE_LIFETIME_S,
    clock: Clock = utc_now,
) -> Joined:
    """Pin the coordinator, make the node key, send the signed request; again does no harm.

    Raises:
        HomeError: the home is another site's, or belongs to another federation.
        WrongCaError: somebody else answers.
        JoinRefusedError: the coordinator refuses; the reason says what to do.
    """
    if home.name != invitation.site:
        raise HomeError(home.path, f"is site {home.name}", f"the invitation is for {invitation.site}")
    folder, keys = network_folder(home.path), home.keys()
    if folder.exists():
        present = folder.read()
        if present.approved and present.invitation != invitation.digest:
            raise HomeError(
                home.path, "belongs to a federation already", "leave it with `affidavit site leave` first"
            )
    _check_log(home, invitation.log)
    with noting_wrong_ca(home):
        pem = fetch_ca(invitation.address, invitation.ca)
    folder.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(folder.ca, pem, mode=0o644)
    node_key = (
        read_node_key(folder.node_key) if folder.node_key.exists() else create_node_key(folder.node_key)
    )
    known = folder.read() if folder.exists() else None
    fresh = known is None or known.invitation != invitation.digest
    expires = (
        format_time(clock() + timedelta(seconds=node_lifetime_s))
        if fresh or known is None
        else known.node_expires
    )
    membership = SiteMembership(
        address=invitation.address,
        log=invitation.log,
        invitation=invitation.digest,
        label=invitation.label,
        node_expires=expires,
        approved=False if known is None or fresh else known.approved,
        node_lifetime_s=node_lifetime_s,
    )
    folder.write(membership)
    enrolment = keys.enrolment(
        home.name, home.config.population.pseudonym, invitation.origin, home.config.operator
    )
    body = _signed(
        keys,
        SiteJoined(
            site=home.name,
            origin=invitation.origin,
            invitation=invitation.digest,
            identity_key=keys.identity.text,
            node_key=node_key,
            expires=expires,
            enrolment=enrolment_digest(enrolment),
            signature="",
        ),
    )
    answer = CoordinatorLink(invitation.address, folder.ca).request(invitation.secret, body, enrolment)
    return _noted(home, folder, membership, answer)


@contextmanager
def noting_wrong_ca(home: SiteHome) -> Iterator[None]:
    """Enter it in the site's own log when somebody else answers at the coordinator's address."""
    try:
        yield
    except (WrongCaError, CoordinatorError) as error:
        if error.code == WrongCaError.code:
            note_wrong_ca(home)
        raise


def note_wrong_ca(home: SiteHome, *, clock: Clock = utc_now) -> None:
    """Write a request.refused of kind "coordinator" into the site's log, once an hour."""
    from clients.site_log import SiteLog, event_id

    body = RequestRefused(site=home.name, kind="coordinator", reason="wrong_ca", count=1, signature="")
    hour = clock().strftime("%Y-%m-%dT%H")
    try:
        log = SiteLog.open(home.path, home.name)
        try:
            log.append(home.keys().signed(body), event_id=event_id("coordinator.wrong_ca", hour))
        finally:
            log.close()
    except (AuditError, ClientsError):
        _logger.exception("site %s: that another CA answers could not be entered in its log", home.name)


def wait_for_approval(
    home: SiteHome, *, timeout_s: float, sleep: Callable[[float], None] = time.sleep
) -> Joined:
    """Ask until the operator has decided, or the time is up.

    Raises:
        JoinRefusedError: they shut the site out.
        CoordinatorError: the coordinator is not there, or nobody has decided in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        joined = standing(home)
        if joined.state not in WAITS:
            return joined
        if time.monotonic() >= deadline:
            raise CoordinatorError(
                "nobody has approved the request yet; the same command goes on waiting later", "site.waiting"
            )
        sleep(POLL_S)


def standing(home: SiteHome) -> Joined:
    """Ask the coordinator where this site stands, and keep it.

    Raises:
        JoinRefusedError: the site is revoked, or its key's time is over.
    """
    folder = network_folder(home.path)
    membership = folder.read()
    with noting_wrong_ca(home):
        answer = CoordinatorLink(membership.address, folder.ca).standing(home.keys().identity.text)
    return _noted(home, folder, membership, answer)


def leave(home: SiteHome) -> None:
    """Say, signed, that this site leaves. The home stays: its ledger counts for life.

    Raises:
        NotJoinedError, CoordinatorError: it belongs nowhere, or the coordinator is not there.
    """
    folder, keys = network_folder(home.path), home.keys()
    membership = folder.read()
    body = _signed(
        keys,
        SiteLeft(
            site=home.name,
            origin=NoteVerifier.parse(membership.log).name,
            invitation=membership.invitation,
            signature="",
        ),
    )
    with noting_wrong_ca(home):
        CoordinatorLink(membership.address, folder.ca).leave(body)
    folder.write(dataclasses.replace(membership, approved=False))


def rotate_keys(home: SiteHome, *, clock: Clock = utc_now) -> str:
    """Exchange the node key for a new one; return it. After a crash the next call finishes the exchange.

    Raises:
        NotJoinedError, CoordinatorError: it belongs nowhere, or the coordinator does not take the new key.
    """
    folder, keys = network_folder(home.path), home.keys()
    membership = folder.read()
    pending = folder.next_node_key
    fresh = read_node_key(pending) if pending.exists() else create_node_key(pending)
    link = CoordinatorLink(membership.address, folder.ca)
    expires = format_time(clock() + timedelta(seconds=membership.node_lifetime_s))
    with noting_wrong_ca(home):
        present = link.standing(keys.identity.text)
    if present["node_key"] != fresh:
        body = _signed(
            keys,
            SiteKeysRotated(
                site=home.name,
                origin=NoteVerifier.parse(membership.log).name,
                invitation=membership.invitation,
                previous_key=folder.node_public_key(),
                node_key=fresh,
                expires=expires,
                signature="",
            ),
        )
        present = link.rotate(body)
    os.replace(pending, folder.node_key)
    folder.write(dataclasses.replace(membership, node_expires=str(present["node_expires"])))
    return fresh


def rotate_signing_keys(home: SiteHome, *, is_up: Callable[[], bool] = lambda: False) -> SiteEnrolled:
    """Exchange the keys for statements and key agreement; return the enrolment that delegates the new ones.

    What the old statement key signed stays valid where it stands in the log. `is_up` says whether an agent
    that started under the old keys still answers; the coordinator is told once it does not.

    Raises:
        HomeError: a run is open, whose statements the old key has to sign.
        NotJoinedError, CoordinatorError: it belongs nowhere, or the coordinator is not there; then the new
            keys are known with the next run.
    """
    from clients.ledger import SiteLedger

    folder = network_folder(home.path)
    membership = folder.read()
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        runs = [item.run for item in ledger.open_reservations(home.config.population.pseudonym)]
    finally:
        ledger.close()
    if runs:
        raise HomeError(
            home.path,
            f"is in run {', '.join(runs)}",
            "exchange its keys when the run has ended, or was refused",
        )
    keys = SiteKeys.rotate(home.path / "keys")
    deadline = time.monotonic() + RESTART_S
    while is_up() and time.monotonic() < deadline:
        time.sleep(0.1)
    origin = NoteVerifier.parse(membership.log).name
    enrolment = keys.enrolment(home.name, home.config.population.pseudonym, origin, home.config.operator)
    CoordinatorLink(membership.address, folder.ca).enrol(enrolment)
    return enrolment


def needs_rotation(folder: NetworkFolder, *, clock: Clock = utc_now) -> bool:
    """Whether the node key is due for renewal, or an exchange was begun and not finished."""
    membership = folder.read()
    left = parse_time(membership.node_expires) - clock()
    return folder.next_node_key.exists() or left < renewal_margin(
        timedelta(seconds=membership.node_lifetime_s)
    )


def follow_members(home: SiteHome, charter: Any) -> SiteHome:
    """Believe the log that the invitation named, under a policy of the charter's own members.

    Every witness key is proved by the identity key that the charter, which this site's people have read,
    names for that member; so the coordinator can put no witness of its own among them.

    Raises:
        CoordinatorError: a member of the charter has not joined yet, or is shown with other keys.
    """
    folder = network_folder(home.path)
    membership = folder.read()
    with noting_wrong_ca(home):
        listed = CoordinatorLink(membership.address, folder.ca).members(home.keys().identity.text)
    home.join(members_policy(charter, listed, _log_line(home, membership.log)))
    return SiteHome.open(home.path)


def members_policy(charter: Any, listed: Sequence[SiteEnrolled], log: str) -> Policy:
    """Return the policy in which the charter's members are the witnesses of `log` (a vkey).

    Args:
        listed: enrolments as the coordinator shows them; one is taken only for a member of the charter, and
            only when the charter's identity of that member has signed it, for this log.

    Raises:
        CoordinatorError: a member is missing, or shown with other keys.
    """
    from federation.trust import federation_policy

    origin, by_name = NoteVerifier.parse(log).name, {body.site: body for body in listed}
    missing = sorted(set(charter.site_names) - set(by_name))
    if missing:
        raise CoordinatorError(
            f"{', '.join(missing)} of this charter have not joined yet; sign again when they have",
            "site.members_missing",
        )
    witnesses, operators = {}, {}
    for name in charter.site_names:
        try:
            proved = verify_enrolment(name, charter.site(name).identity, origin, body_document(by_name[name]))
        except StatementError as error:
            raise CoordinatorError(
                f"the coordinator shows other keys for {name} than the charter: {error}; call both",
                "site.members_differ",
            ) from error
        witnesses[name] = proved.witness_key
        if proved.operator:
            operators[name] = proved.operator
    return federation_policy(log, witnesses, operators=operators)


def _log_line(home: SiteHome, invited: str) -> str:
    """The key that this site believes: the invitation's, or what its people have followed since."""
    if not (home.path / "policy.txt").exists():
        return invited
    return home.policy().logs[-1].verifier.vkey


def _check_log(home: SiteHome, log: str) -> None:
    if not (home.path / "policy.txt").exists():
        return
    if NoteVerifier.parse(log).name not in {known.origin for known in home.policy().logs}:
        raise HomeError(home.path, "follows another log already", "add a new site for another federation")


def _signed(keys: SiteKeys, body: B) -> B:
    domain, payload = signing_payload(body)
    return dataclasses.replace(body, signature=signature_text(keys.identity, domain, payload))


def _noted(
    home: SiteHome, folder: NetworkFolder, membership: SiteMembership, answer: dict[str, Any]
) -> Joined:
    state = str(answer.get("state"))
    if state in ("revoked", "expired", "left", "replaced"):
        folder.write(dataclasses.replace(membership, approved=False))
        raise JoinRefusedError(home.name, "revoked" if state == "revoked" else state)
    if membership.approved != (state == "approved"):
        folder.write(dataclasses.replace(membership, approved=state == "approved"))
    return Joined(site=home.name, state=state, home=home.path, identity=home.keys().identity.text)
