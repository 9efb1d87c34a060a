"""Who can lie about a version, its privacy, its gates or its approvals, and which step says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.cost_bodies import pack_costs
from audit.entries import (
    ZERO_DIGEST,
    decode_entry,
)
from audit.evidence import read_evidence, write_evidence
from audit.keys import SigningKey
from audit.models import model_file
from audit.verify import Verdict
from tests.audit_verify.judging import (
    APPROVALS,
    EPSILON,
    GATES,
    LINKS,
    ODOMETERS,
    WEIGHTS,
    assert_caught,
    in_round,
    once,
)

# the version


def test_a_swapped_model_file_fails(make_world):
    def swap(world, body):
        return replace(body, weights=world.put(model_file(world.charter.layers, [9.0] * 7)))

    world = make_world(before={"run.completed": swap})
    world.train()
    body_weights = world.blobs_of_last_run()
    index, opened = world.predict(body_weights, world.approve(body_weights, world.register(body_weights)))
    assert_caught(world.report(world.evidence(index, opened=opened)), WEIGHTS, "version.weights")


def test_a_version_that_is_not_its_run_s_fails(make_world):
    world = make_world()
    world.train()
    other = world.put(model_file(world.charter.layers, [0.1] * 7))
    index, opened = world.predict(other, world.approve(other, world.register(other)))
    assert_caught(world.report(world.evidence(index, opened=opened)), LINKS, "version.weights")


def test_a_false_average_is_named(make_world):
    hook = once(lambda body: replace(body, averaged_from=1))
    assert_caught(make_world(before={"version.registered": hook}).judge(), WEIGHTS, "version.average")


# privacy


def test_a_gap_in_an_odometer_of_this_run_fails(make_world):
    def skip(world, body):
        return replace(body, sequence=body.sequence + 1) if in_round(3, "west")(body) else body

    step = assert_caught(make_world(before={"site.statement": skip}).judge(), ODOMETERS, "odometer.gap")
    assert "west" in step.detail


def test_a_rewound_odometer_fails(make_world):
    def rewind(world, body):
        if in_round(3, "west")(body):
            return replace(body, sequence=1, previous_event=ZERO_DIGEST)
        return body

    assert_caught(make_world(before={"site.statement": rewind}).judge(), ODOMETERS, "odometer.sequence")


def test_an_odometer_whose_hashes_do_not_chain_fails(make_world):
    hook = once(lambda body: replace(body, previous_event="ab" * 32), in_round(2, "east"))
    assert_caught(make_world(before={"site.statement": hook}).judge(), ODOMETERS, "odometer.chain")


def test_an_earlier_run_left_out_of_the_file_is_no_evidence(make_world):
    world = make_world()
    world.train("run-0")
    digest = world.train("run-1")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)))
    evidence = read_evidence(world.evidence(index, opened=opened))

    def keep(data):
        body = decode_entry(data).body
        return getattr(body, "run", "") != "run-0"

    entries = {i: data for i, data in evidence.entries.items() if keep(data)}
    proofs = {i: proof for i, proof in evidence.proofs.items() if i in entries}
    report = world.report(write_evidence(replace(evidence, entries=entries, proofs=proofs)))
    assert_caught(report, ODOMETERS, "odometer.gap", Verdict.INCOMPLETE)


def test_an_acceptance_that_forgets_earlier_events_fails(make_world):
    hook = once(
        lambda body: replace(body, next_sequence=1, previous_event=ZERO_DIGEST),
        lambda body: body.run == "run-1",
    )
    world = make_world(before={"run.accepted": hook})
    world.train("run-0")
    digest = world.train("run-1")
    hook = once(lambda body: replace(body, next_sequence=2, previous_event="ab" * 32))
    world.before["run.accepted"] = hook
    digest = world.train("run-2")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest, "run-2")))
    report = world.report(world.evidence(index, opened=opened))
    assert_caught(report, ODOMETERS, "odometer.acceptance")


@pytest.mark.parametrize("field", ["run_epsilon", "lifetime_epsilon", "run_epsilon_rdp"])
def test_an_epsilon_claimed_lower_than_spent_fails(make_world, field):
    def claim(world, body):
        first = replace(body.epsilons[0], **{field: "1.5"})
        return replace(body, epsilons=(first, *body.epsilons[1:]))

    step = assert_caught(
        make_world(before={"version.registered": claim}).judge(), EPSILON, "epsilon.claimed_lower"
    )
    assert field in step.detail


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"delta": "0.1"}, "epsilon.terms"),
        ({"relation": "replace_one"}, "epsilon.terms"),
        ({"unit": "subject"}, "epsilon.terms"),
        ({"population": "ab" * 16}, "epsilon.terms"),
        ({"site": "south"}, "epsilon.claims"),
        ({"run_epsilon": "4.377200"}, "epsilon.claims"),
        ({"run_epsilon": "7"}, "epsilon.over_charter"),
    ],
    ids=lambda change: next(iter(change.items()))[0] if isinstance(change, dict) else "",
)
def test_an_epsilon_claimed_in_other_terms_fails(make_world, change, code):
    def claim(world, body):
        return replace(body, epsilons=(replace(body.epsilons[0], **change), *body.epsilons[1:]))

    assert_caught(make_world(before={"version.registered": claim}).judge(), EPSILON, code)


def test_claims_may_not_leave_a_site_out(make_world):
    hook = once(lambda body: replace(body, epsilons=body.epsilons[1:]))
    assert_caught(make_world(before={"version.registered": hook}).judge(), EPSILON, "epsilon.claims")


@pytest.mark.parametrize(
    ("change", "code"),
    [({}, "epsilon.claims"), ({"run_epsilon": "0.5"}, "epsilon.claims")],
    ids=["a site named many times", "and each time for less"],
)
def test_packed_claims_are_held_to_what_plain_ones_are(make_world, change, code):
    def claim(world, body):
        first = replace(body.epsilons[0], **change)
        plain, packed = pack_costs((first,) * 400 + body.epsilons[1:])
        assert packed
        return replace(body, epsilons=plain, packed=packed)

    assert_caught(make_world(before={"version.registered": claim}).judge(), EPSILON, code)


def test_a_run_above_the_charter_s_epsilon_fails(make_world):
    world = make_world(charter_changes=lambda charter: charter["privacy"].update(epsilon="2"))
    assert_caught(world.judge(), EPSILON, "epsilon.over_charter")


# gates and approvals


@pytest.mark.parametrize(
    "change",
    [{"value": "0.99"}, {"baseline": "0.4"}, {"passed": 0}, {"dataset": "ab" * 32}, {"floor": "0.2"}],
    ids=lambda change: next(iter(change)),
)
def test_a_gate_result_that_was_not_measured_fails(make_world, change):
    hook = once(lambda body: replace(body, gates=(replace(body.gates[0], **change),)))
    assert_caught(make_world(before={"version.registered": hook}).judge(), GATES, "gate.results")


def test_a_model_that_fails_its_gate_is_not_valid(make_world):
    def harder(charter):
        charter["gates"] = [{"metric": "auc", "source": "public_set", "margin_over_baseline": "0.6"}]

    assert_caught(make_world(charter_changes=harder).judge(), GATES, "gate.not_passed")


def test_gates_without_the_public_set_are_no_evidence(honest):
    evidence = read_evidence(honest.data)
    public = honest.world.charter.public_set
    artefacts = {digest: data for digest, data in evidence.artefacts.items() if digest != public}
    report = honest.world.report(write_evidence(replace(evidence, artefacts=artefacts)))
    assert_caught(report, GATES, "gate.public_set_missing", Verdict.INCOMPLETE)


def test_a_charter_without_gates_is_no_evidence(make_world):
    report = make_world(charter_changes=lambda charter: charter.update(gates=[])).judge()
    assert_caught(report, GATES, "gate.none", Verdict.INCOMPLETE)


def test_a_forged_approval_fails(make_world):
    def forge(world, body):
        return world.sign(body, SigningKey.generate())

    assert_caught(make_world(after={"version.transition": forge}).judge(), APPROVALS, "approval.signature")


def approved_by(world, key):
    digest = world.train()
    index, opened = world.predict(digest, world.approve(digest, world.register(digest), key=key))
    return world.report(world.evidence(index, opened=opened))


def test_an_approval_by_a_stranger_fails(make_world):
    assert_caught(approved_by(make_world(), SigningKey.generate()), APPROVALS, "approval.not_an_officer")


def test_an_approval_by_the_author_of_the_run_fails(make_world):
    author = SigningKey.generate()

    class Both(make_world):
        def _charter(self, rounds, public):
            self.author = author
            document = super()._charter(rounds, public)
            document["officers"].append({"name": "Cy", "key": author.text})
            return document

    assert_caught(approved_by(Both(), author), APPROVALS, "approval.own_work")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"from_state": "live"}, "approval.state"),
        ({"to_state": "live"}, "approval.state"),
        ({"to_state": "blessed"}, "approval.state"),
    ],
)
def test_an_illegal_change_of_state_fails(make_world, change, code):
    hook = once(lambda body: replace(body, **change))
    assert_caught(make_world(before={"version.transition": hook}).judge(), APPROVALS, code)


def test_a_second_history_of_transitions_fails(make_world):
    world = make_world()
    digest = world.train()
    registration = world.register(digest)
    world.move(digest, registration, "candidate", "retired")
    world.transitions.clear()
    index, opened = world.predict(digest, world.approve(digest, registration))
    assert_caught(world.report(world.evidence(index, opened=opened)), APPROVALS, "approval.fork")


def test_an_approval_of_other_gate_results_fails(make_world):
    world = make_world()
    digest = world.train()
    first = world.register(digest)
    second = world.register(digest)
    world.move(digest, first, "candidate", "approved")
    index, opened = world.predict(digest, world.move(digest, second, "approved", "live"))
    assert_caught(world.report(world.evidence(index, opened=opened)), APPROVALS, "approval.other_version")
