"""Who can lie about a log, its members, a charter or a run, and which step says so, by which code."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from dataclasses import replace

import pytest

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
from tests.audit_verify.judging import (
    CHARTER,
    CHECKPOINT,
    INCLUSION,
    METRICS,
    REPLAY,
    ROUNDS,
    RUN,
    SITES,
    assert_caught,
    in_round,
    once,
)

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


def test_kinds_of_entries_cannot_stand_in_for_each_other(make_world):
    def confuse(world, body):
        if body.round != 2:
            return body
        return replace(body, statements=(world.log_hash("run.started", 0), *body.statements[1:]))

    report = make_world(before={"round.completed": confuse}).judge()
    assert_caught(report, ROUNDS, "verify.wrong_kind")
