"""A site believes the witnesses of the charter that it signed, whatever the coordinator shows it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from clients.network.coordinator import CoordinatorError
from clients.network.joining import members_policy

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture
def members(office):
    return {name: office.hospital(name) for name in NAMES}


@pytest.fixture
def charter(members):
    identities = {name: site.keys.identity.text for name, site in members.items()}
    return SimpleNamespace(site_names=NAMES, site=lambda name: SimpleNamespace(identity=identities[name]))


def test_the_charters_members_are_the_witnesses(office, members, charter):
    policy = members_policy(charter, [site.enrolment() for site in members.values()], office.log_key)
    assert {witness.name for witness in policy.witnesses} == set(NAMES)
    assert [log.verifier.vkey for log in policy.logs] == [office.log_key]


def test_a_witness_that_the_operator_adds_is_none(office, members, charter):
    extra = office.hospital("operators-own")
    listed = [*(site.enrolment() for site in members.values()), extra.enrolment()]
    assert "operators-own" not in members_policy(charter, listed, office.log_key).format()


def test_a_member_shown_with_the_operators_keys_is_refused(office, members, charter):
    forged = dataclasses.replace(office.hospital("other"), name="beta").enrolment()
    listed = [members["alpha"].enrolment(), forged, members["gamma"].enrolment()]
    with pytest.raises(CoordinatorError) as caught:
        members_policy(charter, listed, office.log_key)
    assert caught.value.code == "site.members_differ"


def test_a_members_witness_key_cannot_be_exchanged_for_another(office, members, charter):
    other = office.hospital("other").keys.witness_signer("beta").vkey
    forged = dataclasses.replace(members["beta"].enrolment(), witness_key=other)
    listed = [members["alpha"].enrolment(), forged, members["gamma"].enrolment()]
    with pytest.raises(CoordinatorError, match="beta"):
        members_policy(charter, listed, office.log_key)


def test_an_enrolment_for_another_log_is_refused(office, members, charter):
    listed = [site.enrolment("log.example.org/other") for site in members.values()]
    with pytest.raises(CoordinatorError, match="alpha"):
        members_policy(charter, listed, office.log_key)


def test_who_has_not_joined_is_named(office, members, charter):
    with pytest.raises(CoordinatorError, match="gamma") as caught:
        members_policy(charter, [members["alpha"].enrolment(), members["beta"].enrolment()], office.log_key)
    assert caught.value.code == "site.members_missing"
