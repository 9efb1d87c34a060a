"""Who belongs is what the log says: each step is an entry, each refusal too, and no step happens twice."""

from __future__ import annotations

import dataclasses

import pytest

from audit.entries import SiteEnrolled, body_document
from audit.keys import SigningKey
from audit.membership import JoinRefused, NodeRefused
from clients.identity import SiteKeys
from federation.network.errors import InvitationError, JoinRefusedError, MembershipError
from federation.network.invitation import format_time
from federation.network.membership import Membership
from federation.network.roster import Roster
from tests.network.conftest import ORIGIN

JOINING = ["site.invited", "site.joined", "site.enrolled", "site.approved"]


def test_joining_leaves_every_step_in_the_log(office):
    hospital, invitation = office.hospital(), office.invite()
    assert office.ask(hospital, invitation).state == "requested"
    assert office.membership.approve("st-mary").state == "approved"
    assert office.types() == JOINING


def test_automatic_approval_is_of_its_invitation_alone(office):
    hospital = office.hospital()
    member = office.ask(hospital, office.invite(auto_approve=True))
    assert member.state == "approved"
    assert office.types() == JOINING
    other = office.hospital("st-olaf")
    assert office.ask(other, office.invite("St Olaf")).state == "requested"


def test_the_same_request_again_changes_nothing(office):
    hospital, invitation = office.hospital(), office.invite()
    request = hospital.joined(invitation), body_document(hospital.enrolment())
    first = office.membership.request(invitation.secret, *request)
    assert office.membership.request(invitation.secret, *request) == first
    assert office.types() == ["site.invited", "site.joined"]


def test_an_invitation_used_twice_is_refused_and_logged(office):
    invitation = office.invite()
    office.ask(office.hospital(), invitation)
    thief = type(office.hospital("x")).make(office.folder / "thief", "st-mary")
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(thief, invitation)
    assert caught.value.reason == "used"
    assert "tell the operator" in str(caught.value)
    assert office.bodies(JoinRefused) == [
        JoinRefused(site="st-mary", invitation=invitation.digest, reason="used")
    ]


def test_a_thief_who_comes_first_is_seen_by_whoever_comes_second(office):
    invitation = office.invite()
    thief = type(office.hospital("x")).make(office.folder / "thief", "st-mary")
    office.ask(thief, invitation)
    with pytest.raises(JoinRefusedError, match="somebody else has read it"):
        office.ask(office.hospital(), invitation)
    office.membership.revoke("st-mary", "stolen")
    with pytest.raises(MembershipError):
        office.membership.approve("st-mary")


def test_an_expired_invitation_is_refused_and_logged(office):
    hospital, invitation = office.hospital(), office.invite(valid_hours=1)
    office.clock.turn(hours=1)
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(hospital, invitation)
    assert caught.value.reason == "expired"
    assert office.types() == ["site.invited", "join.refused"]


def test_an_unknown_secret_costs_one_entry_an_hour_however_often_it_is_tried(office):
    hospital, invitation = office.hospital(), office.invite()
    for attempt in range(5):
        with pytest.raises(JoinRefusedError) as caught:
            office.membership.request(f"{attempt:064x}", hospital.joined(invitation), {})
        assert caught.value.reason == "not_invited"
    assert office.types() == ["site.invited", "join.refused"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"site": "st-olaf"}, "site_mismatch"),
        ({"origin": "log.example.org/other"}, "site_mismatch"),
        ({"invitation": "0" * 64}, "site_mismatch"),
        ({"enrolment": "0" * 64}, "signature"),
        ({"node_key": "AAAA"}, "signature"),
        ({"expires": "tomorrow"}, "signature"),
        ({"expires": "2026-11-24T07:00:00Z"}, "expired"),
        ({"expires": "2036-11-24T07:00:00Z"}, "expired"),
    ],
)
def test_a_signed_request_that_says_something_else_is_refused(office, change, reason):
    hospital, invitation = office.hospital(), office.invite()
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(hospital, invitation, **change)
    assert caught.value.reason == reason
    assert office.membership.roster.of_site("st-mary").state == "invited"


def test_a_request_that_another_key_signed_is_refused(office):
    hospital, invitation = office.hospital(), office.invite()
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(hospital, invitation, by=SigningKey.generate())
    assert caught.value.reason == "signature"


def test_an_enrolment_of_other_keys_or_another_log_is_refused(office):
    hospital, other, invitation = office.hospital(), office.hospital("st-olaf"), office.invite()
    for enrolment in (other.enrolment(), hospital.enrolment("log.example.org/other")):
        with pytest.raises(JoinRefusedError) as caught:
            office.membership.request(
                invitation.secret, hospital.joined(invitation), body_document(enrolment)
            )
        assert caught.value.reason == "signature"


@pytest.mark.parametrize("junk", [None, [], {}, "x", {"site": 1}])
def test_malformed_requests_are_refused(office, junk):
    invitation = office.invite()
    with pytest.raises(JoinRefusedError):
        office.membership.request(invitation.secret, junk, junk)


def test_a_node_key_serves_one_site(office):
    hospital = office.hospital()
    office.admit(hospital)
    copy = office.hospital("st-olaf")
    copy.node = hospital.node
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(copy, office.invite("St Olaf"))
    assert caught.value.reason == "key_taken"


def test_an_identity_serves_one_site(office):
    hospital = office.hospital()
    office.admit(hospital)
    twin = office.hospital("st-olaf")
    twin.keys = hospital.keys
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(twin, office.invite("St Olaf"))
    assert caught.value.reason == "identity_taken"


def test_a_member_is_not_invited_twice_and_a_revoked_one_may_come_back(office):
    hospital = office.hospital()
    office.admit(hospital)
    with pytest.raises(MembershipError, match="belongs already"):
        office.invite()
    office.membership.revoke("st-mary", "machine stolen")
    assert office.membership.roster.of_node_key(hospital.node_key).state == "revoked"
    back = type(hospital)(hospital.name, hospital.keys, office.hospital("y").node, hospital.population)
    office.ask(back, office.invite())
    assert office.membership.approve("st-mary").state == "approved"


def test_a_revoked_invitation_is_worth_nothing(office):
    invitation = office.invite()
    office.membership.revoke("st-mary", "sent to the wrong person")
    with pytest.raises(JoinRefusedError) as caught:
        office.ask(office.hospital(), invitation)
    assert caught.value.reason == "revoked"


def test_leaving_takes_the_sites_own_signature(office):
    hospital, other = office.hospital(), office.hospital("st-olaf")
    invitation = office.admit(hospital)
    forged = {**other.leaving(invitation), "site": "st-mary"}
    with pytest.raises(JoinRefusedError):
        office.membership.leave(forged)
    assert office.membership.leave(hospital.leaving(invitation)).state == "left"
    assert office.types()[-1] == "site.left"


def test_a_node_key_is_exchanged_once_and_an_old_exchange_is_not_taken_again(office):
    hospital = office.hospital()
    invitation = office.admit(hospital)
    first, second = office.hospital("a").node_key, office.hospital("b").node_key
    exchange = hospital.rotation(invitation, first)
    assert office.membership.rotate(exchange).node_key == first
    assert office.membership.rotate(exchange).node_key == first
    onward = hospital.rotation(invitation, second, previous_key=first)
    assert office.membership.rotate(onward).node_key == second
    with pytest.raises(MembershipError, match="old one"):
        office.membership.rotate(exchange)
    assert office.types().count("site.keys_rotated") == 2


@pytest.mark.parametrize("state", ["left", "revoked"])
def test_who_is_out_cannot_exchange_keys(office, state):
    hospital = office.hospital()
    invitation = office.admit(hospital)
    if state == "left":
        office.membership.leave(hospital.leaving(invitation))
    else:
        office.membership.revoke("st-mary", "")
    with pytest.raises(MembershipError, match=state):
        office.membership.rotate(hospital.rotation(invitation, office.hospital("a").node_key))


def test_a_taken_or_everlasting_key_is_not_exchanged_for(office):
    hospital, other = office.hospital(), office.hospital("st-olaf")
    invitation = office.admit(hospital)
    office.admit(other)
    with pytest.raises(JoinRefusedError, match="registered already"):
        office.membership.rotate(hospital.rotation(invitation, other.node_key))
    with pytest.raises(JoinRefusedError):
        office.membership.rotate(
            hospital.rotation(invitation, office.hospital("a").node_key, expires="2099-01-01T00:00:00Z")
        )


def test_a_membership_ends_with_its_node_key(office):
    hospital = office.hospital()
    office.admit(hospital)
    member = office.membership.roster.of_site("st-mary")
    assert member.standing(office.clock()) == "approved"
    office.clock.turn(days=366)
    assert member.standing(office.clock()) == "expired"


def test_another_process_sees_the_same_roster(office):
    office.admit(office.hospital())
    office.invite("St Olaf")
    read = {member.site: member.state for member in Roster(office.ledger).refresh()}
    assert read == {"st-mary": "approved", "st-olaf": "invited"}


def test_entries_that_do_not_follow_change_nothing(office):
    hospital, invitation = office.hospital(), office.invite()
    office.ask(hospital, invitation)
    writer = Membership(office.ledger, office.folder / "network", office.clock)
    member = writer.roster.refresh().of_site("st-mary")
    forged = body_document(hospital.enrolment())
    assert member is not None
    from audit.membership import SiteApproved

    body = SiteApproved(
        site="st-mary",
        invitation=invitation.digest,
        identity_key=member.identity_key,
        node_key=office.hospital("a").node_key,
        by="operator",
    )
    writer._append(body, "coordinator", "forged")
    assert writer.roster.refresh().of_site("st-mary").state == "requested"
    assert forged["site"] == "st-mary"


def test_an_enrolment_changed_on_disk_is_not_approved(office):
    hospital, invitation = office.hospital(), office.invite()
    office.ask(hospital, invitation)
    path = office.folder / "network" / "requests" / f"{invitation.digest}.json"
    path.write_text(path.read_text().replace(hospital.population, "0" * 32))
    with pytest.raises(MembershipError, match="not what the site signed"):
        office.membership.approve("st-mary")


def test_refused_nodes_cost_one_entry_an_hour(office):
    for _ in range(3):
        office.membership.node_refused("st-mary", "ab" * 32, "revoked")
    for number in range(3):
        office.membership.node_refused("", f"{number:064x}", "unregistered")
    assert len(office.bodies(NodeRefused)) == 2
    office.clock.turn(hours=1)
    office.membership.node_refused("st-mary", "ab" * 32, "revoked")
    assert len(office.bodies(NodeRefused)) == 3


@pytest.mark.parametrize("hours", [0, -1, 100_000])
def test_invitations_have_a_sensible_time(office, hours):
    with pytest.raises(InvitationError):
        office.invite(valid_hours=hours)


def test_times_are_written_in_one_form(office):
    assert format_time(office.clock()) == "2026-11-24T08:00:00Z"


def renewed(office, hospital, **changes):
    """The enrolment after the site exchanged its keys for statements and key agreement."""
    hospital.keys = SiteKeys.rotate(office.folder / "sites" / hospital.name)
    return body_document(dataclasses.replace(hospital.enrolment(), **changes))


def test_new_signing_keys_are_an_entry_and_the_same_again_is_the_same_one(office):
    hospital = office.hospital()
    office.admit(hospital)
    first = hospital.enrolment()
    document = renewed(office, hospital)
    assert office.membership.enrol(document).state == "approved"
    office.membership.enrol(document)
    (before, after) = office.bodies(SiteEnrolled)
    assert before == first
    assert body_document(after) == document
    assert office.membership.members_enrolments() == (after,)


def test_a_replaced_statement_key_is_not_taken_back(office):
    hospital = office.hospital()
    office.admit(hospital)
    stolen = body_document(hospital.enrolment())
    office.membership.enrol(renewed(office, hospital))
    with pytest.raises(MembershipError, match="stays replaced"):
        office.membership.enrol(stolen)


@pytest.mark.parametrize("field", ["population", "operator"])
def test_an_enrolment_changes_keys_and_nothing_else(office, field):
    hospital = office.hospital()
    office.admit(hospital)
    hospital.keys = SiteKeys.rotate(office.folder / "sites" / hospital.name)
    other = {"population": "ab" * 16, "operator": "group"}
    population = other["population"] if field == "population" else hospital.population
    operator = other["operator"] if field == "operator" else ""
    enrolment = hospital.keys.enrolment(hospital.name, population, ORIGIN, operator)
    with pytest.raises(MembershipError, match=f"keeps its {field}"):
        office.membership.enrol(body_document(enrolment))


def test_an_enrolment_that_its_identity_did_not_sign_is_refused_and_logged(office):
    hospital = office.hospital()
    office.admit(hospital)
    thief = office.hospital("st-olaf")
    document = renewed(office, hospital, statement_key=thief.keys.statement.text)
    with pytest.raises(JoinRefusedError, match="signature"):
        office.membership.enrol(document)
    assert [body.reason for body in office.bodies(JoinRefused)] == ["signature"]


def test_who_is_no_member_enrols_nothing(office):
    stranger = office.hospital()
    with pytest.raises(MembershipError, match="does not belong"):
        office.membership.enrol(body_document(stranger.enrolment()))
    office.admit(stranger)
    office.membership.revoke("st-mary", "test")
    with pytest.raises(MembershipError, match="does not belong"):
        office.membership.enrol(renewed(office, stranger))
