"""Counts that sites release with noise: who can lie about them, and which step says so, by which code."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import ZERO_DIGEST, VersionRegistered
from audit.epsilon import rdp_epsilon, recompute
from audit.evidence import read_evidence, write_evidence
from audit.private_evaluation import private_gate, worth
from audit.round_bodies import Metric, RunEvaluated
from audit.verify import Verdict, Word
from audit.weights import encode_update
from tests.audit_verify.judging import EPSILON, GATES, METRICS, ODOMETERS, ROUNDS, fails, once, says
from tests.audit_verify.world import World, up

COUNTS = [40 << 16, 3 << 16, 4 << 16, 41 << 16]


class CountingWorld(World):
    """Two rounds, then each hospital's noisy counts; the only gate stands on them."""

    def __init__(self, *, silent=(), floor="0.8", **hooks):
        self.silent = silent

        def changes(document):
            document["plan"] |= {"average_last": 1}
            document["evaluation"] = {"share": "0.2", "noise_multiplier": "3"}
            document["gates"] = [{"metric": "accuracy", "source": "private_release", "floor": floor}]

        super().__init__(rounds=2, charter_changes=changes, **hooks)

    def train(self, run="run-1", *, model="tiny"):
        self.evaluated = False
        return super().train(run, model=model)

    def lie(self, body):
        kind = type(body).__name__
        if kind == "RunAccepted":
            body = replace(body, planned_events=self.charter.releases)
        if kind == "RunCompleted" and not self.evaluated:
            self.evaluate(body)
        if kind == "VersionRegistered":
            body = self.claims(body)
        return super().lie(body)

    def evaluate(self, completed):
        self.evaluated = True
        number, event = self.charter.rounds + 1, self.charter.evaluation.event
        leaves, matrices, missing = [], [], []
        for hospital in self.hospitals:
            if hospital.name in self.silent:
                missing.append(hospital.name)
                continue
            body = self.statement(
                hospital, completed.run, number, completed.weights, completed.last_round, COUNTS, event=event
            )
            leaves.append(self.append(body)[1])
            matrices.append(COUNTS)
        found = worth(self.charter.evaluation, matrices)
        metric = Metric(name="accuracy", value=found.accuracy, source="private_release", dataset=ZERO_DIGEST)
        body = RunEvaluated(
            run=completed.run, round=number, weights=completed.weights, statements=tuple(leaves),
            missing=tuple(missing), metrics=(metric,), baseline=found.baseline, spread=found.spread,
        )  # fmt: skip
        body = self.lie(body)
        if body is not None:
            self.append(body)
        self.found = found

    def statement(self, hospital, run, number, base, previous, values, *, event=None):
        if event is None:
            return super().statement(hospital, run, number, base, previous, values)
        usual = self.event
        self.event = lambda: event
        try:
            return super().statement(hospital, run, number, base, previous, values)
        finally:
            self.event = usual

    def claims(self, body: VersionRegistered) -> VersionRegistered:
        events = [self.event()] * 2 + [self.charter.evaluation.event]
        delta = float(self.charter.privacy.delta)
        cost, rdp = up(recompute(events, delta).value), up(rdp_epsilon(events, delta))
        changed = {"events": 3, "run_epsilon": cost, "run_epsilon_rdp": rdp, "lifetime_epsilon": cost}
        return replace(body, epsilons=tuple(replace(claim, **changed) for claim in body.epsilons))

    def register(self, digest, run="run-1", *, model="tiny"):
        body = RunEvaluated(
            run=run, round=3, weights=digest, statements=(), missing=(),
            metrics=(Metric(name="accuracy", value=self.found.accuracy, source="", dataset=""),),
            baseline=self.found.baseline, spread=self.found.spread,
        )  # fmt: skip
        charter = self.charter
        gates = tuple(private_gate(gate, body) for gate in charter.gates)
        registered = VersionRegistered(
            version=digest, model=model, charter=charter.digest, run=run, author=self.author.text,
            averaged_from=2, averaged_to=2, gates=gates,
            epsilons=tuple(self._claim(hospital, run) for hospital in self.hospitals),
        )  # fmt: skip
        return self.append(self.lie(registered))[1]

    def registered_file(self):
        digest = self.train()
        self.register(digest)
        return self.evidence(self.find("version.registered"))

    def judged(self):
        return self.report(self.registered_file(), replay=True)


@pytest.fixture(scope="module")
def counting():
    return CountingWorld()


@pytest.fixture(scope="module")
def file(counting):
    return counting.registered_file()


def test_honest_counts_are_attested_and_their_sum_is_proved(counting, file):
    report = counting.report(file, replay=True)
    step = says(report, GATES, Word.ATTESTED, "gate.private_release")
    assert "1 gates passed" in step.detail
    assert "added up again" in says(report, METRICS, Word.ATTESTED).detail
    assert report.step(EPSILON).code == "ok"
    assert report.step(ODOMETERS).code == "ok"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"weights": "7" * 64}, "evaluation.weights"),
        ({"round": 2}, "evaluation.round"),
        ({"baseline": "0.1"}, "evaluation.metric"),
        ({"spread": "0"}, "evaluation.metric"),
        ({"metrics": ()}, "evaluation.metric"),
        ({"missing": ("west",)}, "evaluation.sites"),
        ({"statements": ()}, "evaluation.statements"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_operator_who_misreports_the_counts_is_contradicted(change, code):
    lying = CountingWorld(before={"run.evaluated": lambda world, body: replace(body, **change)})
    fails(lying.judged(), METRICS, code)


def test_a_better_accuracy_than_the_counts_give_fails():
    def better(world, body):
        return replace(body, metrics=(replace(body.metrics[0], value="0.99"),))

    fails(CountingWorld(before={"run.evaluated": better}).judged(), METRICS, "evaluation.metric")


def test_a_matrix_left_out_of_the_sum_fails():
    def dropped(world, body):
        return replace(body, statements=body.statements[:-1], missing=("west",))

    fails(CountingWorld(before={"run.evaluated": dropped}).judged(), METRICS, "evaluation.statements")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"base_model": "7" * 64}, "statement.field"),
        ({"participants": ("east",)}, "statement.field"),
        ({"previous_round": "7" * 64}, "statement.field"),
    ],
    ids=["model", "participants", "round"],
)
def test_a_statement_of_other_counts_fails(change, code):
    hook = once(lambda body: replace(body, **change), lambda body: body.round == 3)
    fails(CountingWorld(before={"site.statement": hook}).judged(), METRICS, code)


def test_counts_with_less_noise_than_agreed_fail():
    def quiet(body):
        return replace(body, event=replace(body.event, sigma_grid=body.event.sigma_grid - 1))

    hook = once(quiet, lambda body: body.round == 3)
    fails(CountingWorld(before={"site.statement": hook}).judged(), METRICS, "statement.field")


def test_counts_without_a_charter_that_asks_for_them_fail(make_world):
    world = make_world()
    body = RunEvaluated(
        run="run-1", round=5, weights=ZERO_DIGEST, statements=(), missing=(), metrics=(), baseline="",
        spread="",
    )  # fmt: skip
    digest = world.train()
    world.append(body)
    world.register(digest)
    fails(world.report(world.evidence(world.find("version.registered"))), METRICS, "evaluation.none")


def test_an_evaluation_that_never_came_is_a_gap_and_its_gate_has_no_ground():
    report = CountingWorld(before={"run.evaluated": lambda world, body: None}).judged()
    says(report, METRICS, Word.NO_EVIDENCE, "evaluation.missing", Verdict.INCOMPLETE)
    assert report.step(GATES).word is Word.NO_EVIDENCE


def test_counts_that_are_not_in_the_file_prove_nothing(counting, file):
    evidence = read_evidence(file)
    kept = {d: data for d, data in evidence.artefacts.items() if data != encode_update(COUNTS)}
    report = counting.report(write_evidence(replace(evidence, artefacts=kept)), replay=True)
    says(report, METRICS, Word.NO_EVIDENCE, "evaluation.counts_missing", Verdict.INCOMPLETE)


def test_a_site_that_did_not_count_is_named_as_the_operators_word():
    world = CountingWorld(silent=("west",))
    world.train()
    step = world.report(world.evidence(world.find("run.completed")), replay=True).step(ODOMETERS)
    assert (step.code, "west in the evaluation" in step.detail) == ("odometer.missing_site", True)


def test_a_gate_that_the_counts_do_not_pass_fails():
    world = CountingWorld(floor="0.99", before={"version.registered": passing})
    fails(world.judged(), GATES, "gate.results")
    honest = CountingWorld(floor="0.99")
    fails(honest.judged(), GATES, "gate.not_passed")


def passing(world, body):
    return replace(body, gates=tuple(replace(gate, passed=1) for gate in body.gates))


def test_one_more_release_under_the_charter_is_an_invented_one():
    """A second statement of counts, of the same round, is on no odometer."""
    world = CountingWorld()
    digest = world.train()
    hospital = world.hospitals[0]
    again = world.statement(
        hospital, "run-1", 3, digest, ZERO_DIGEST, COUNTS, event=world.charter.evaluation.event
    )
    world.append(again)
    world.register(digest)
    report = world.report(world.evidence(world.find("version.registered")), replay=True)
    assert report.verdict is Verdict.INVALID
    assert report.step(ROUNDS).code == "ok"
    assert report.failures[0].code == "evaluation.statements"
