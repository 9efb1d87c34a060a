"""The sketch of the training rows: who can lie about it, and which step says so, by which code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import ZERO_DIGEST, VersionRegistered
from audit.epsilon import rdp_epsilon, recompute
from audit.evidence import read_evidence, write_evidence
from audit.reference import sketch_document
from audit.round_bodies import RunReferenced
from audit.verify import Verdict, Word
from audit.weights import encode_update
from tests.audit_verify.judging import METRICS, ODOMETERS, fails, once, says
from tests.audit_verify.world import World, up


class SketchingWorld(World):
    """Two rounds, then each hospital's noisy counts by bin."""

    def __init__(self, *, silent=(), also=lambda document: None, **hooks):
        self.silent = silent

        def changes(document):
            document["plan"] |= {"average_last": 1}
            document["reference"] = {"bins": 4, "noise_multiplier": "3"}
            also(document)

        super().__init__(rounds=2, charter_changes=changes, **hooks)

    def lie(self, body):
        kind = type(body).__name__
        if kind == "RunAccepted":
            body = replace(body, planned_events=self.charter.releases)
        if kind == "RunCompleted":
            self.sketch(body)
        if kind == "VersionRegistered":
            body = self.claims(body)
        return super().lie(body)

    def counts(self, hospital):
        return [(7 * place + len(hospital.name)) << 16 for place in range(self.terms.event.dimension)]

    def sketch(self, completed):
        self.terms = self.charter.serving.reference
        counted = [hospital for hospital in self.hospitals if hospital.name not in self.silent]
        leaves = [self.append(self.counting(hospital, completed))[1] for hospital in counted]
        document = sketch_document(
            self.terms,
            run=completed.run,
            charter=self.charter.digest,
            sites=[hospital.name for hospital in counted],
            counts=[self.counts(hospital) for hospital in counted],
        )
        body = RunReferenced(
            run=completed.run,
            round=3,
            statements=tuple(leaves),
            missing=tuple(self.silent),
            sketch=self.put(document),
        )
        body = self.lie(body)
        if body is not None:
            self.append(body)

    def counting(self, hospital, completed):
        usual, self.event = self.event, lambda: self.terms.event
        try:
            return self.statement(
                hospital, completed.run, 3, completed.weights, completed.last_round, self.counts(hospital)
            )
        finally:
            self.event = usual

    def claims(self, body: VersionRegistered) -> VersionRegistered:
        events = [self.event()] * 2 + [self.terms.event]
        delta = float(self.charter.privacy.delta)
        cost, rdp = up(recompute(events, delta).value), up(rdp_epsilon(events, delta))
        changed = {"events": 3, "run_epsilon": cost, "run_epsilon_rdp": rdp, "lifetime_epsilon": cost}
        return replace(body, epsilons=tuple(replace(claim, **changed) for claim in body.epsilons))

    def completed_file(self):
        self.train()
        return self.evidence(self.find("run.completed"))

    def judged(self):
        return self.report(self.completed_file(), replay=True)


@pytest.fixture(scope="module")
def sketching():
    return SketchingWorld()


@pytest.fixture(scope="module")
def file(sketching):
    return sketching.completed_file()


def test_an_honest_sketch_is_the_sum_of_what_sites_attest(sketching, file):
    report = sketching.report(file, replay=True)
    assert "the sum of what 3 sites released" in says(report, METRICS, Word.ATTESTED).detail
    assert report.step(ODOMETERS).code == "ok"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"round": 2}, "reference.round"),
        ({"sketch": "7" * 64}, "reference.sketch"),
        ({"sketch": ""}, "reference.sketch"),
        ({"missing": ("west",)}, "reference.sites"),
        ({"statements": ()}, "reference.statements"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_an_operator_who_misreports_the_sketch_is_contradicted(change, code):
    lying = SketchingWorld(before={"run.referenced": lambda world, body: replace(body, **change)})
    fails(lying.judged(), METRICS, code)


@pytest.mark.parametrize("field", ["base_model", "previous_round"])
def test_a_statement_of_another_sketch_fails(field):
    hook = once(lambda body: replace(body, **{field: "7" * 64}), lambda body: body.round == 3)
    fails(SketchingWorld(before={"site.statement": hook}).judged(), METRICS, "statement.field")


def test_a_sketch_with_less_noise_than_agreed_fails():
    def quiet(body):
        return replace(body, event=replace(body.event, sigma_grid=body.event.sigma_grid - 1))

    hook = once(quiet, lambda body: body.round == 3)
    fails(SketchingWorld(before={"site.statement": hook}).judged(), METRICS, "statement.field")


def test_a_sketch_that_never_came_is_a_gap():
    report = SketchingWorld(before={"run.referenced": lambda world, body: None}).judged()
    says(report, METRICS, Word.NO_EVIDENCE, "reference.missing", Verdict.INCOMPLETE)


def test_counts_that_are_not_in_the_file_prove_no_sketch(sketching, file):
    evidence = read_evidence(file)
    lost = encode_update(sketching.counts(sketching.hospitals[0]))
    kept = {digest: data for digest, data in evidence.artefacts.items() if data != lost}
    report = sketching.report(write_evidence(replace(evidence, artefacts=kept)), replay=True)
    says(report, METRICS, Word.NO_EVIDENCE, "reference.counts_missing", Verdict.INCOMPLETE)


def test_a_sketch_under_a_charter_that_asks_for_none_fails(make_world):
    def smuggled(world, body):
        world.append(RunReferenced(run=body.run, round=5, statements=(), missing=(), sketch=ZERO_DIGEST))
        return body

    world = make_world(before={"run.completed": smuggled})
    world.train()
    report = world.report(world.evidence(world.find("run.completed")), replay=True)
    fails(report, METRICS, "reference.none")


def test_a_site_that_did_not_sketch_is_named_as_the_operators_word():
    step = SketchingWorld(silent=("west",)).judged().step(ODOMETERS)
    assert (step.code, "west in the sketch" in step.detail) == ("odometer.missing_site", True)
