"""Versions: who may move one, what it must show first, and what its card says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import VersionRegistered, VersionTransition, decode_entry, signing_payload
from audit.keys import SigningKey, VerifyKey, parse_public_key
from audit.models import weights_of_file
from audit.principal import AccessDeniedError, Decision
from federation import registry, service
from federation.accounting import spent
from federation.charter import Charter
from federation.errors import (
    BlobAlteredError,
    BlobMissingError,
    GateNotPassedError,
    NotFoundError,
    OfficerError,
    PlanDoesNotFitError,
    PublicSetError,
    TransitionError,
)
from federation.evaluation import PublicData
from federation.gates import failed_gates
from federation.mechanism import planned_event
from federation.model_card import model_card
from federation.onnx_export import check_export


class Nobody:
    """An authoriser that refuses everything."""

    def decide(self, principal, question):
        return Decision(allowed=False, policies=("nobody",), policy_set="0" * 64)


def approve(federation, version, key, to_state="live"):
    request = service.ApproveRequest(version=version.digest, to_state=to_state, reason="looks good")
    return service.approve(federation.coordinator, federation.principal, federation.owner, request, key)


def test_a_registered_version_is_a_candidate_with_gates_and_epsilon(candidate):
    version = candidate.version
    assert version.state == "candidate"
    assert version.gates_passed
    assert {gate.source for gate in version.registered.gates} == {"public_set"}
    assert [cost.site for cost in version.registered.epsilons] == ["north", "south", "west"]


def test_claimed_epsilon_is_that_of_the_plan(candidate):
    federation, version = candidate.federation, candidate.version
    expected = spent([planned_event(federation.charter)] * 3, 1e-5)
    for cost in version.registered.epsilons:
        assert (cost.run_epsilon, cost.run_epsilon_rdp) == (expected.pld_text, expected.rdp_text)
        assert (cost.events, cost.lifetime_epsilon) == (3, cost.run_epsilon)


def test_lifetime_epsilon_counts_every_run(candidate):
    federation = candidate.federation
    second = federation.registered()
    expected = spent([planned_event(federation.charter)] * 6, 1e-5)
    for cost in second.registered.epsilons:
        assert cost.lifetime_epsilon == expected.pld_text
        assert float(cost.run_epsilon) < float(cost.lifetime_epsilon) < 2 * float(cost.run_epsilon)


def test_registering_twice_is_one_entry(federation):
    run = federation.train().run
    for _ in range(2):
        service.register(
            federation.coordinator, federation.principal, federation.owner, service.RegisterRequest(run=run)
        )
    assert len(federation.bodies(VersionRegistered)) == 1


def test_an_officer_makes_a_version_live_with_a_signature_of_her_own(candidate):
    federation = candidate.federation
    version = approve(federation, candidate.version, federation.officer)
    assert version.state == "live"
    first, second = federation.bodies(VersionTransition)
    assert (first.from_state, first.to_state, second.from_state, second.to_state) == (
        "candidate", "approved", "approved", "live",
    )  # fmt: skip
    assert first.previous_transition == "0" * 64
    assert second.previous_transition == version.transitions[0].leaf_hash
    for body in (first, second):
        domain, payload = signing_payload(body)
        import base64

        VerifyKey(parse_public_key(federation.officer.text)).verify(
            domain, payload, base64.b64decode(body.signature)
        )


def test_whoever_trained_it_cannot_approve_it_although_an_officer(candidate):
    federation, version = candidate.federation, candidate.version
    assert federation.author.text in {officer.key for officer in federation.charter.officers}
    with pytest.raises(OfficerError, match="another officer"):
        approve(federation, version, federation.author)
    assert federation.bodies(VersionTransition) == []


def test_a_stranger_cannot_approve(candidate):
    with pytest.raises(OfficerError, match="not one of the charter's officers"):
        approve(candidate.federation, candidate.version, SigningKey.generate())


def test_the_authoriser_is_asked_before_anything_is_written(candidate):
    federation, version = candidate.federation, candidate.version
    coordinator, principal, nobody = federation.coordinator, federation.principal, Nobody()
    size = coordinator.ledger.tree_size
    attempts = [
        lambda: service.start_run(
            coordinator,
            principal,
            nobody,
            service.TrainRequest(charter=federation.charter),
            federation.author,
        ),
        lambda: service.register(
            coordinator, principal, nobody, service.RegisterRequest(run=version.registered.run)
        ),
        lambda: service.approve(
            coordinator, principal, nobody, service.ApproveRequest(version=version.digest), federation.officer
        ),
        lambda: service.rollback(
            coordinator, principal, nobody, service.RollbackRequest(model="cells"), federation.officer
        ),
        lambda: service.retire(coordinator, principal, nobody, version.digest, federation.officer, ""),
    ]
    for attempt in attempts:
        with pytest.raises(AccessDeniedError):
            attempt()
    assert coordinator.ledger.tree_size == size


def test_a_version_that_failed_a_gate_is_on_record_and_never_approved(federation, charter_text):
    charter = Charter.parse(charter_text.replace("floor: 0.1", "floor: 0.999"))
    federation.charter = charter
    version = federation.registered()
    assert [gate.passed for gate in version.registered.gates] == [0]
    with pytest.raises(GateNotPassedError, match=r"floor 0\.999"):
        approve(federation, version, federation.officer)


def test_a_charter_without_gates_approves_nothing(federation, charter_text):
    text = charter_text.replace("gates:\n  - {metric: auc, source: public_set, floor: 0.1}\n", "gates: []\n")
    federation.charter = Charter.parse(text)
    version = federation.registered()
    assert not version.gates_passed
    with pytest.raises(GateNotPassedError, match="no gate"):
        approve(federation, version, federation.officer)


def test_more_epsilon_than_the_charter_allows_is_a_gate_too(candidate):
    federation, version = candidate.federation, candidate.version
    costly = [replace(cost, run_epsilon="3.0001") for cost in version.registered.epsilons]
    failed = failed_gates(federation.charter, version.registered.gates, costly[:1])
    assert failed == ["epsilon of site north is 3.0001, the charter allows 3"]


def test_a_plan_that_could_never_be_approved_spends_nothing(federation, charter_text):
    costly = Charter.parse(charter_text.replace("epsilon: 3", "epsilon: 0.5"))
    with pytest.raises(PlanDoesNotFitError, match=r"allows 0\.5; write noise_multiplier:") as caught:
        federation.train(charter=costly)
    assert Charter.parse(
        charter_text.replace("noise_multiplier: 3", f"noise_multiplier: {caught.value.noise}")
    )
    assert all(site.asked == [] for site in federation.sites.values())


def test_a_version_moves_only_forward(candidate):
    federation, version = candidate.federation, candidate.version
    approve(federation, version, federation.officer, "approved")
    with pytest.raises(TransitionError):
        approve(federation, version, federation.officer, "approved")
    approve(federation, version, federation.officer)
    with pytest.raises(TransitionError):
        approve(federation, version, federation.officer)
    with pytest.raises(TransitionError, match="approve to"):
        approve(federation, version, federation.officer, "retired")


def second_run(federation, charter_text):
    federation.charter = Charter.parse(charter_text.replace("rounds: 3", "rounds: 2"))
    return federation.registered()


def test_a_new_live_version_retires_the_old_and_rollback_brings_it_back(candidate, charter_text):
    federation = candidate.federation
    coordinator, ledger = federation.coordinator, federation.coordinator.ledger
    first = approve(federation, candidate.version, federation.officer)
    second = approve(federation, second_run(federation, charter_text), federation.officer)
    assert registry.find_version(ledger, first.digest).state == "retired"
    assert registry.live_version(ledger, "cells").digest == second.digest
    request = service.RollbackRequest(model="cells", reason="drift")
    back = service.rollback(coordinator, federation.principal, federation.owner, request, federation.officer)
    assert (back.digest, back.state) == (first.digest, "live")
    assert registry.find_version(ledger, second.digest).state == "retired"
    chain = federation.bodies(VersionTransition)
    hashes = ["0" * 64, *[stored.leaf_hash.hex() for stored, _ in coordinator.bodies(VersionTransition)]]
    assert [body.previous_transition for body in chain] == hashes[:-1]


def test_rollback_needs_an_earlier_live_version_and_an_officer(candidate, charter_text):
    federation = candidate.federation
    coordinator, principal, owner = federation.coordinator, federation.principal, federation.owner
    approve(federation, candidate.version, federation.officer)
    with pytest.raises(TransitionError, match="nothing to roll back to"):
        service.rollback(
            coordinator, principal, owner, service.RollbackRequest(model="cells"), federation.officer
        )
    approve(federation, second_run(federation, charter_text), federation.officer)
    for key in (SigningKey.generate(), federation.author):
        with pytest.raises(OfficerError):
            service.rollback(coordinator, principal, owner, service.RollbackRequest(model="cells"), key)
    with pytest.raises(TransitionError):
        service.rollback(
            coordinator,
            principal,
            owner,
            service.RollbackRequest(model="cells", version="f" * 64),
            federation.officer,
        )


def test_retiring_leaves_no_live_version(candidate):
    federation = candidate.federation
    version = approve(federation, candidate.version, federation.officer)
    arguments = (
        federation.coordinator,
        federation.principal,
        federation.owner,
        version.digest,
        federation.officer,
    )
    assert service.retire(*arguments, "recalled").state == "retired"
    assert registry.live_version(federation.coordinator.ledger, "cells") is None
    with pytest.raises(TransitionError, match="already"):
        service.retire(*arguments, "again")


@pytest.mark.parametrize("digest", ["", "abc", "0" * 64, "zz" * 32])
def test_unknown_versions_are_named(federation, digest):
    with pytest.raises(NotFoundError):
        registry.find_version(federation.coordinator.ledger, digest)


def test_an_unfinished_run_registers_nothing(federation):
    request = service.TrainRequest(charter=federation.charter)
    run = service.start_run(
        federation.coordinator, federation.principal, federation.owner, request, federation.author
    )
    with pytest.raises(NotFoundError, match="run"):
        service.register(
            federation.coordinator, federation.principal, federation.owner, service.RegisterRequest(run=run)
        )


def test_without_the_public_set_nothing_is_judged(federation, public_set):
    run = federation.train().run
    digest = federation.charter.public_set.digest
    path = federation.coordinator.home / "blobs" / digest[:2] / digest
    path.unlink()
    request = service.RegisterRequest(run=run)
    with pytest.raises(PublicSetError, match="add the file"):
        service.register(federation.coordinator, federation.principal, federation.owner, request)
    path.write_bytes(public_set + b"1,1,true,I,benign\n")
    with pytest.raises(BlobAlteredError):
        service.register(federation.coordinator, federation.principal, federation.owner, request)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"1,1,true,I,benign\n",
        lambda data: data.replace(b"malignant", b"unclear"),
        lambda data: data.replace(b"radius", b"radios"),
        lambda data: b"",
    ],
)
def test_another_public_set_than_agreed_is_refused(charter, public_set, change):
    from hashlib import sha256

    altered = change(public_set)
    with pytest.raises(PublicSetError, match="the very file"):
        PublicData.read(charter, altered)
    agreed = Charter.parse(charter.to_yaml().replace(charter.public_set.digest, sha256(altered).hexdigest()))
    with pytest.raises(PublicSetError):
        PublicData.read(agreed, altered)


def test_blobs_are_checked_when_read(federation):
    blobs = federation.coordinator.blobs
    digest = blobs.put(b"weights")
    assert blobs.put(b"weights") == digest
    (blobs.folder / digest[:2] / digest).write_bytes(b"other")
    with pytest.raises(BlobAlteredError):
        blobs.get(digest)
    assert blobs.put(b"weights") == digest
    assert blobs.get(digest) == b"weights"
    for missing in ("0" * 64, "../../../etc/passwd", ""):
        assert blobs.find(missing) is None
        with pytest.raises(BlobMissingError):
            blobs.get(missing)


def test_the_card_tells_what_the_log_shows_and_what_it_does_not(candidate):
    federation, version = candidate.federation, candidate.version
    ledger = federation.coordinator.ledger
    before = model_card(ledger, version.digest)
    assert "NO EVIDENCE: nobody has approved this version." in before
    approve(federation, version, federation.officer)
    card = model_card(ledger, version.digest[:12])
    for words in (
        version.digest,
        "state | live",
        "radius | number | mm | 0 to 10",
        "(log)",
        "relation add_remove",
        "delta 0.00001",
        version.registered.epsilons[0].run_epsilon,
        "| auc |",
        "public_set",
        "dr-lee",
        "looks good",
        "3 of 3 rounds completed",
        "Attributions of an answer to single features are given on request",
        "has less protection",
    ):
        assert words in card


def test_a_card_says_when_no_metric_is_shown(federation, charter_text):
    text = charter_text.replace("gates:\n  - {metric: auc, source: public_set, floor: 0.1}\n", "gates: []\n")
    federation.charter = Charter.parse(text)
    card = model_card(federation.coordinator.ledger, federation.registered().digest)
    assert "NO EVIDENCE: the charter names no metric" in card


def test_a_registration_that_says_passed_still_meets_the_epsilon_gate(candidate):
    federation, version = candidate.federation, candidate.version
    costly = tuple(replace(cost, run_epsilon="7") for cost in version.registered.epsilons)
    forged = replace(version.registered, version="ab" * 32, epsilons=costly)
    federation.coordinator.append(forged, "coordinator")
    with pytest.raises(GateNotPassedError):
        approve(
            federation, registry.find_version(federation.coordinator.ledger, "ab" * 32), federation.officer
        )


def test_trial_is_signed_with_its_share_and_ends_where_it_began(candidate):
    federation, version = candidate.federation, candidate.version
    approve(federation, version, candidate.federation.officer, "approved")

    def trial(to_state, share=0, key=candidate.federation.officer):
        request = service.TrialRequest(version=version.digest, to_state=to_state, share=share)
        return service.trial(federation.coordinator, federation.principal, federation.owner, request, key)

    for to_state, share in (("canary", 0), ("canary", 100), ("shadow", 5), ("live", 0)):
        with pytest.raises(TransitionError):
            trial(to_state, share)
    with pytest.raises(OfficerError):
        trial("canary", 10, key=SigningKey.generate())
    assert trial("shadow").state == "shadow"
    tried = trial("canary", 10)
    assert (tried.state, tried.transitions[-1].body.share) == ("canary", 10)
    body = tried.transitions[-1].body
    _, payload = signing_payload(body)
    assert b'"share":10' in payload
    assert trial("approved").state == "approved"
    trial("canary", 10)
    assert approve(federation, version, candidate.federation.officer).state == "live"


def test_registration_enters_the_export_and_how_far_its_answers_lie(candidate):
    (stored,) = candidate.federation.coordinator.ledger.search(type="version.exported")
    body = decode_entry(stored.body).body
    assert body.version == candidate.version.digest
    assert float(body.difference) <= float(body.tolerance)
    data = candidate.federation.coordinator.blobs.get(body.digest)
    weights = weights_of_file(
        candidate.federation.charter.layers, candidate.federation.coordinator.blobs.get(body.version)
    )
    check_export(
        data, candidate.federation.charter.layers, weights, candidate.federation.charter.encoded_width
    )
