"""Who can lie, and which step says so: every forgery names the step, and the code, that must catch it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from dataclasses import replace

import pytest

from audit.canonical import canonical_bytes
from audit.checkpoints import add_signatures
from audit.entries import (
    ZERO_DIGEST,
    CharterSigned,
    LogCreated,
    Metric,
    decode_entry,
)
from audit.evidence import read_evidence, write_evidence
from audit.keys import SigningKey
from audit.models import model_file
from audit.notes import parse_note
from audit.verify import Verdict, Word
from audit.weights import encode_update

CHECKPOINT, INCLUSION, LINKS = "The log's checkpoint", "Every entry is in the log", "The chain of references"
CHARTER, SITES, RUN = "The charter", "The sites and their keys", "The training run"
ROUNDS, REPLAY, WEIGHTS = "The rounds and their statements", "The aggregation", "The model's weights"
ODOMETERS, EPSILON = "The odometers", "Epsilon"
METRICS, GATES, APPROVALS = "The rounds' metrics", "The gates", "The approvals"
DECISION, ANSWER, RECEIPT = "The decision to answer", "The answer", "The receipt"


def assert_caught(report, title, code, verdict=Verdict.INVALID):
    step = report.step(title)
    assert (report.verdict, step.code) == (verdict, code), report.text()
    assert report.exit_code not in (0, 2)
    if verdict is Verdict.INVALID:
        first = report.failures[0]
        assert first.title == title, report.text()
        assert first.detail
    return step


def once(change, when=lambda body: True):
    """A hook that changes the first body for which `when` holds."""
    done = []

    def hook(world, body):
        if done or not when(body):
            return body
        done.append(body)
        return change(body) if change else None

    return hook


def in_round(number, site=None):
    return lambda body: body.round == number and site in (None, getattr(body, "site", None))


# the operator: another log, a rewritten log


def test_a_wholly_forged_rekeyed_file_is_refused_by_the_policy(honest, make_world):
    forger = make_world()
    index, opened = forger.whole()
    forged = forger.evidence(index, opened=opened, receipt=True)
    assert forger.report(forged).verdict is Verdict.VALID, "it is perfect, but for whose keys they are"
    assert_caught(
        forger.report(forged, policy_text=honest.world.policy), CHECKPOINT, "audit.no_known_signature"
    )
    assert forger.report(forged, policy_text=None).verdict is Verdict.SELF_CONSISTENT_ONLY


def test_a_log_rewritten_and_resigned_by_its_operator_has_no_witnesses(make_world):
    world = make_world()
    index, opened = world.whole()
    honest_note = world.publish()
    world.replace_leaf(index, lambda body: replace(body, purpose="research"))
    world.publish(witnesses=[])
    assert_caught(
        world.report(world.evidence(index, opened=opened)),
        CHECKPOINT,
        "verify.unwitnessed",
        Verdict.UNWITNESSED,
    )
    lines = [line.format() for line in parse_note(honest_note).signatures if line.name != "log.example/tiny"]
    world.log.notes = [add_signatures(world.log.notes[0], lines)]
    report = world.report(world.evidence(index, opened=opened))
    assert_caught(report, CHECKPOINT, "audit.bad_signature")


def test_a_forger_with_the_log_s_key_cannot_invent_sites(make_world):
    victim = make_world()
    forger = make_world()
    forger.log_key = victim.log_key
    forger.log.leaves.clear()
    forger.append(forger_log_created(forger))
    for hospital in forger.hospitals:
        forger.append(forger._enrolment(hospital))
    forger.publish_charter()
    index, opened = forger.whole()
    forger.publish(witnesses=[])
    report = forger.report(forger.evidence(index, opened=opened), policy_text=victim.policy)
    assert report.verdict is Verdict.UNWITNESSED
    assert report.step(SITES).code == "site.unanchored"


def forger_log_created(world):
    return LogCreated(origin="log.example/tiny", log_key=world.log_signer.vkey)


def test_unanchored_sites_are_no_evidence_even_when_witnesses_cosigned(make_world):
    """The operator enrols invented sites in the real, witnessed log."""
    world = make_world()
    strangers = {hospital.name: SigningKey.generate() for hospital in world.hospitals}

    class Invented(make_world):
        def _enrolment(self, hospital):
            real, hospital.witness = hospital.witness, strangers[hospital.name]
            body = super()._enrolment(hospital)
            hospital.witness = real
            return body

    report = Invented().judge()
    assert_caught(report, SITES, "site.unanchored", Verdict.INCOMPLETE)


def test_one_witness_cannot_anchor_another_site_s_name(make_world):
    def steal(world, body):
        east = world.hospital("east")
        return replace(body, witness_key=east.note_signer.vkey) if body.site == "west" else body

    class Stealing(make_world):
        def _enrolment(self, hospital):
            real = hospital.witness
            if hospital.name == "west":
                hospital.witness = self.hospital("east").witness
            body = super()._enrolment(hospital)
            hospital.witness = real
            return body

    report = Stealing(before={"site.enrolled": steal}).judge()
    assert_caught(report, SITES, "site.enrolment")


def test_another_log_s_first_entry_is_refused(make_world):
    other = SigningKey.generate()
    key = dataclasses.replace(make_world().log_signer, key=other).vkey
    report = make_world(after={"log.created": lambda world, body: replace(body, log_key=key)}).judge()
    assert_caught(report, INCLUSION, "verify.log_created")


# members and charter


@pytest.mark.parametrize("field", ["signature", "statement_proof", "witness_proof"])
def test_an_enrolment_needs_all_three_keys(make_world, field):
    fake = base64.b64encode(bytes(64)).decode()
    hook = once(lambda body: replace(body, **{field: fake}))
    assert_caught(make_world(after={"site.enrolled": hook}).judge(), SITES, "site.enrolment")


def test_a_missing_charter_signature_is_no_evidence(make_world):
    report = make_world(before={"charter.signed": once(None, lambda body: body.site == "north")}).judge()
    step = assert_caught(report, CHARTER, "charter.signature_missing", Verdict.INCOMPLETE)
    assert "north" in step.detail


def test_a_charter_signature_by_another_key_fails(make_world):
    def forge(world, body):
        return world.sign(body, SigningKey.generate()) if body.site == "north" else body

    assert_caught(make_world(after={"charter.signed": forge}).judge(), CHARTER, "charter.signature")


def test_a_charter_signature_for_another_charter_does_not_count(make_world):
    def other(world, body):
        return CharterSigned(digest="cd" * 32, author=body.author, site=body.site, signature="")

    report = make_world(before={"charter.signed": once(other_of(other), lambda b: b.site == "east")}).judge()
    assert_caught(report, CHARTER, "charter.signature_missing", Verdict.INCOMPLETE)


def other_of(function):
    return lambda body: function(None, body)


def test_a_charter_changed_after_signing_fails(make_world):
    def change(world, body):
        return replace(
            body, canonical=body.canonical.replace('"noise_multiplier":"2"', '"noise_multiplier":"1"')
        )

    assert_caught(make_world(after={"charter.published": change}).judge(), CHARTER, "charter.digest")


# the run


def test_a_run_that_starts_from_other_weights_fails(make_world):
    def start(world, body):
        layers = world.charter.layers
        return replace(body, initial_model=world.put(model_file(layers, [0.5] * world.charter.dimension)))

    assert_caught(make_world(before={"run.started": start}).judge(), RUN, "run.initial_model")


def test_a_run_signed_by_nobody_fails(make_world):
    fake = base64.b64encode(bytes(64)).decode()
    report = make_world(after={"run.started": lambda world, body: replace(body, signature=fake)}).judge()
    assert_caught(report, RUN, "run.signature")


@pytest.mark.parametrize(
    "change",
    [{"planned_events": 3}, {"population": "00" * 16}, {"charter": "ab" * 32}, {"site": "south"}],
    ids=lambda change: next(iter(change)),
)
def test_an_acceptance_of_other_terms_fails(make_world, change):
    hook = once(lambda body: replace(body, **change))
    assert_caught(make_world(before={"run.accepted": hook}).judge(), RUN, "run.acceptance")


def test_missing_acceptances_are_no_evidence(make_world):
    report = make_world(after={"run.accepted": lambda world, body: None}).judge()
    assert_caught(report, RUN, "run.acceptance_missing", Verdict.INCOMPLETE)


# statements and rounds


def test_a_tampered_statement_fails(make_world):
    hook = once(lambda body: replace(body, agent_code="ab" * 32), in_round(2, "north"))
    step = assert_caught(make_world(after={"site.statement": hook}).judge(), ROUNDS, "statement.signature")
    assert step.entry is not None
    assert "north" in step.detail


def test_a_statement_by_the_wrong_key_fails(make_world):
    def forge(world, body):
        return world.sign(body, world.hospital("east").statement) if body.site == "west" else body

    assert_caught(make_world(after={"site.statement": forge}).judge(), ROUNDS, "statement.signature")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"run": "run-0"}, "statement.field"),
        ({"round": 3}, "statement.field"),
        ({"charter": "ab" * 32}, "statement.field"),
        ({"population": "ab" * 16}, "statement.field"),
        ({"base_model": "ab" * 32}, "statement.field"),
        ({"participants": ("east", "north")}, "statement.field"),
        ({"previous_round": "ab" * 32}, "statement.field"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_statement_about_something_else_fails(make_world, change, code):
    hook = once(lambda body: replace(body, **change), in_round(2, "north"))
    assert_caught(make_world(before={"site.statement": hook}).judge(), ROUNDS, code)


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_grid": 1 << 20},
        {"sensitivity_grid": 1 << 10, "sigma_grid": 1 << 12},
        {"steps": 2},
        {"sampling": "poisson", "sample_rate": "0.5"},
        {"dimension": 3},
        {"grid_bits": 10},
        {"relation": "zero_out"},
        {"unit": "subject"},
        {"mechanism": "none"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_release_below_the_charter_s_terms_fails(make_world, change):
    hook = once(lambda body: replace(body, event=replace(body.event, **change)), in_round(3, "west"))
    step = assert_caught(make_world(before={"site.statement": hook}).judge(), ROUNDS, "statement.event")
    assert "event." in step.detail


def test_a_dropped_round_fails(make_world):
    """The operator logs no entry for round 3; round 4 builds on round 2's."""
    report = make_world(before={"round.completed": lambda w, body: None if body.round == 3 else body}).judge()
    assert_caught(report, ROUNDS, "round.chain")


def test_a_file_without_one_round_s_entry_is_incomplete(honest):
    evidence = read_evidence(honest.data)
    gone = honest.world.find("round.completed", 1)
    entries = {index: data for index, data in evidence.entries.items() if index != gone}
    proofs = {index: proof for index, proof in evidence.proofs.items() if index != gone}
    report = honest.world.report(write_evidence(replace(evidence, entries=entries, proofs=proofs)))
    assert_caught(report, ROUNDS, "verify.entry_missing", Verdict.INCOMPLETE)


def test_an_invented_round_fails(make_world):
    class Inventing(make_world):
        def train(self, run="run-1", *, model="tiny"):
            digest = super().train(run, model=model)
            last = self.log.leaves[self.find("round.completed", 3)]
            body = decode_entry(last).body
            self.append(replace(body, round=5, base_model=body.output_model))
            return digest

    assert_caught(Inventing().judge(), ROUNDS, "round.invented")


def test_a_statement_left_out_of_its_round_fails(make_world):
    def leave_out(world, body):
        return replace(body, statements=body.statements[:2], missing=("west",)) if body.round == 2 else body

    report = make_world(before={"round.completed": leave_out}).judge()
    assert_caught(report, ROUNDS, "round.sites")


def test_a_statement_that_no_round_counts_fails(make_world):
    class Extra(make_world):
        def register(self, digest, run="run-1", *, model="tiny"):
            hospital = self.hospital("east")
            values = [0] * self.charter.dimension
            self.append(self.statement(hospital, run, 9, "ab" * 32, ZERO_DIGEST, values))
            return super().register(digest, run, model=model)

    assert_caught(Extra().judge(), ROUNDS, "round.statement_left_out")


def test_a_round_counting_a_site_twice_fails(make_world):
    def twice(world, body):
        doubled = (body.statements[0], *body.statements[:2])
        return replace(body, statements=doubled) if body.round == 2 else body

    assert_caught(make_world(before={"round.completed": twice}).judge(), ROUNDS, "round.sites")


def test_a_round_on_another_base_model_fails(make_world):
    hook = once(lambda body: replace(body, base_model="ab" * 32), in_round(1))
    assert_caught(make_world(before={"round.completed": hook}).judge(), ROUNDS, "statement.field")


def test_a_false_aggregation_fails_in_its_own_round(make_world):
    class Cheating(make_world):
        def round(self, run, number, weights, base, previous, aggregator):
            self.cheat = number == 3
            return super().round(run, number, weights, base, previous, aggregator)

    def poison(world, body):
        if not world.cheat:
            return body
        return replace(body, output_model=world.put(model_file(world.charter.layers, [0.25] * 7)))

    world = Cheating(before={"round.completed": poison})
    original = world.round

    def follow(run, number, weights, base, previous, aggregator):
        weights, output, leaf = original(run, number, weights, base, previous, aggregator)
        if number == 3:
            weights = [0.25] * 7
            output = hashlib.sha256(model_file(world.charter.layers, weights)).hexdigest()
        return weights, output, leaf

    world.round = follow
    step = assert_caught(world.judge(), REPLAY, "replay.output_model")
    assert "round 3" in step.detail


def test_an_altered_round_output_fails(make_world):
    hook = once(lambda body: replace(body, output_model="ab" * 32), in_round(4))
    assert_caught(make_world(before={"round.completed": hook}).judge(), REPLAY, "replay.output_model")


def test_an_update_withheld_from_the_file_is_no_evidence(honest):
    evidence = read_evidence(honest.data)
    world = honest.world
    statement = evidence.entries[world.find("site.statement", 4)]
    gone = decode_entry(statement).body.update
    artefacts = {digest: data for digest, data in evidence.artefacts.items() if digest != gone}
    report = world.report(write_evidence(replace(evidence, artefacts=artefacts)))
    assert_caught(report, REPLAY, "replay.update_missing", Verdict.INCOMPLETE)


def test_an_update_of_the_wrong_length_fails(make_world):
    def shorten(world, body):
        return replace(body, update=world.put(encode_update([1, 2]))) if in_round(2, "east")(body) else body

    assert_caught(make_world(before={"site.statement": shorten}).judge(), REPLAY, "replay.update")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"value": "0.123456"}, "metric.value"),
        ({"value": "high"}, "metric.value"),
        ({"name": "r2"}, "metric.value"),
        ({"dataset": "ab" * 32}, "metric.source"),
        ({"source": "sites"}, "metric.source"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_metric_that_a_round_did_not_reach_fails(make_world, change, code):
    metric = Metric(name="auc", value="0.9", source="public_set", dataset="")

    def claim(world, body):
        honest = replace(metric, dataset=world.charter.public_set)
        return replace(body, metrics=(replace(honest, **change),)) if body.round == 2 else body

    step = assert_caught(make_world(before={"round.completed": claim}).judge(), METRICS, code)
    assert step.word is Word.FAIL


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


# predictions


def test_an_answer_by_another_model_fails(make_world):
    world = make_world()
    digest = world.train()
    better = world.put(model_file(world.charter.layers, [0.4, -1.0, 2.0, 0.1, 0.0, 0.0, 0.0]))
    index, opened = world.predict(digest, world.approve(digest, world.register(digest)), answer_by=better)
    assert_caught(world.report(world.evidence(index, opened=opened)), ANSWER, "answer.other_model")


def test_an_answer_by_a_version_that_is_only_approved_fails(make_world):
    world = make_world()
    digest = world.train()
    approved = world.move(digest, world.register(digest), "candidate", "approved")
    index, opened = world.predict(digest, approved)
    assert_caught(
        world.report(world.evidence(index, opened=opened)), APPROVALS, "prediction.version_not_live"
    )


def test_an_answer_by_a_version_retired_since_fails(make_world):
    world = make_world()
    digest = world.train()
    registration = world.register(digest)
    live = world.approve(digest, registration)
    world.move(digest, registration, "live", "retired")
    index, opened = world.predict(digest, live)
    assert_caught(world.report(world.evidence(index, opened=opened)), DECISION, "prediction.version_not_live")


@pytest.mark.parametrize(
    ("change", "title", "code"),
    [
        ({"purpose": "marketing"}, DECISION, "prediction.purpose"),
        ({"policies": ()}, DECISION, "prediction.policies"),
        ({"site": "south"}, DECISION, "prediction.site"),
        ({"version": "ab" * 32}, LINKS, "prediction.other_version"),
        ({"model": "other"}, LINKS, "prediction.other_version"),
        ({"charter": "ab" * 32}, LINKS, "prediction.other_version"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_a_prediction_outside_its_charter_fails(make_world, change, title, code):
    world = make_world(before={"prediction": lambda w, body: replace(body, **change)})
    assert_caught(world.judge(), title, code)


def test_a_prediction_by_a_transition_that_is_not_in_the_log_is_incomplete(make_world):
    world = make_world()
    index, opened = world.whole()
    evidence = read_evidence(world.evidence(index, opened=opened))
    gone = world.find("version.transition", 1)
    kept = {i: data for i, data in evidence.entries.items() if i != gone}
    proofs = {i: proof for i, proof in evidence.proofs.items() if i != gone}
    report = world.report(write_evidence(replace(evidence, entries=kept, proofs=proofs)))
    assert_caught(report, LINKS, "verify.entry_missing", Verdict.INCOMPLETE)


@pytest.mark.parametrize("field", ["input", "output", "input_salt", "output_salt"])
def test_opened_rows_that_are_not_those_committed_to_fail(honest, field):
    wrong = {"input": '{"alpha":"1","beta":"1","gamma":"1"}', "output": '{"label":"no","probability":"0"}'}
    first = {**honest.opened[0], field: wrong.get(field, "00" * 32)}
    data = honest.world.evidence(honest.index, opened=[first, *honest.opened[1:]])
    assert_caught(honest.world.report(data), ANSWER, "answer.commitment")


def test_opened_rows_may_not_be_fewer(honest):
    data = honest.world.evidence(honest.index, opened=honest.opened[:1])
    assert_caught(honest.world.report(data), ANSWER, "answer.rows")


@pytest.mark.parametrize("field", ["leaf_index", "leaf_hash", "time", "signature"])
def test_a_receipt_that_the_log_did_not_sign_fails(honest, field):
    receipt = honest.world.receipt(honest.index)
    fake = {
        "leaf_index": receipt["leaf_index"] - 1,
        "leaf_hash": "ab" * 32,
        "time": "2026-11-23T10:00:00Z",
        "signature": base64.b64encode(bytes(64)).decode(),
    }
    receipt[field] = fake[field]
    assert_caught(
        honest.world.report(honest.data, receipt=canonical_bytes(receipt)), RECEIPT, "receipt.invalid"
    )


def test_a_receipt_for_another_entry_fails(honest):
    receipt = canonical_bytes(honest.world.receipt(honest.index - 1))
    assert_caught(honest.world.report(honest.data, receipt=receipt), RECEIPT, "receipt.other_entry")


def test_kinds_of_entries_cannot_stand_in_for_each_other(make_world):
    def confuse(world, body):
        if body.round != 2:
            return body
        return replace(body, statements=(world.log_hash("run.started", 0), *body.statements[1:]))

    report = make_world(before={"round.completed": confuse}).judge()
    assert_caught(report, ROUNDS, "verify.wrong_kind")
