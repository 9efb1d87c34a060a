"""Who may be left out of a round, and what the officer was shown: every lie about it, and its code."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from audit.anomaly import SiteFacts, examine, plain_dot
from audit.canonical import canonical_bytes
from audit.entries import RoundCompleted, SiteUndelivered
from audit.evidence import read_evidence, write_evidence
from audit.replay import SiteUpdate
from audit.round_bodies import RoundExamined, UpdateRefused
from audit.update_bounds import is_too_long, square_norm
from audit.verify import Verdict, Word
from audit.weights import encode_update
from tests.audit_verify.judging import REPLAY, fails, says
from tests.audit_verify.world import World

LONG = 1 << 40


class RobustWorld(World):
    """One round under a norm bound; west sends what no honest site does, and the operator refuses it."""

    def __init__(self, *, rule="median", norm_bound=1, long=True, believes=is_too_long, **hooks):
        self.long, self.believes = long, believes

        def changes(document):
            document["plan"] |= {"average_last": 1}
            document["aggregation"] = {"rule": rule, "byzantine": 0, "keep": 0, "norm_bound": norm_bound}

        super().__init__(rounds=1, charter_changes=changes, **hooks)

    def round(self, run, number, weights, base, previous, aggregator):
        charter = self.charter
        leaves, updates, seen, missing = [], [], {}, []
        for hospital in self.hospitals:
            values = self._update(hospital, weights)
            if hospital.name == "west" and self.long:
                values = [LONG] * charter.dimension
            statement = self.statement(hospital, run, number, base, previous, values)
            site, terms = charter.site(hospital.name), charter.updates[hospital.name]
            seen[site.name] = values
            if self.believes(terms, values):
                missing.append(site.name)
                _, reported = self.append(SiteUndelivered(statement=statement))
                length, most = math.isqrt(square_norm(values)), terms.norm_bound
                refusal = UpdateRefused(
                    run=run, round=number, site=site.name, update=statement.update, statement=reported,
                    reason="norm_bound", norm=str(length), bound=str(most),
                )  # fmt: skip
                self.append(self.lie(refusal))
                continue
            leaves.append(self.append(statement)[1])
            updates.append(
                SiteUpdate(site=site.name, nominal_rows=site.nominal_rows, weight=site.weight, values=values)
            )
        weights = aggregator.step(number, weights, updates)
        output = self.put(encode_model(charter, weights))
        completed = RoundCompleted(
            run=run, round=number, base_model=base, statements=tuple(leaves), missing=tuple(missing),
            output_model=output, metrics=(),
        )  # fmt: skip
        leaf = self.append(completed)[1]
        self.append(self.lie(self.view(run, number, seen)))
        return weights, output, leaf

    def view(self, run, number, seen):
        facts, vectors = [], []
        for site, values in sorted(seen.items()):
            terms = self.charter.updates[site]
            divisor = self.charter.aggregation.divisor(terms.nominal_rows)
            facts.append(
                SiteFacts(site=site, bound=terms.norm_bound / divisor, noise=terms.noise_std / divisor)
            )
            vectors.append([float(value) / divisor for value in values])
        view = examine(number, facts, vectors, self.charter.released, plain_dot)
        digest = self.put(canonical_bytes(view))
        return RoundExamined(run=run, round=number, digest=digest, apart=tuple(view["apart"]))

    def finished(self):
        self.train()
        return self.evidence(self.find("run.completed"))


def encode_model(charter, weights):
    from audit.models import model_file

    return model_file(charter.layers, weights)


def judged(world):
    return world.report(world.finished(), replay=True)


@pytest.fixture(scope="module")
def refusing():
    return RobustWorld()


@pytest.fixture(scope="module")
def file(refusing):
    return refusing.finished()


def test_an_honest_refusal_is_measured_again(refusing, file):
    report = refusing.report(file, replay=True)
    step = says(report, REPLAY, Word.PROVED, verdict=Verdict.VALID)
    assert "under median" in step.detail
    assert "1 were and are left out" in step.detail


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "1"},
        {"bound": "1"},
        {"reason": "disliked"},
        {"site": "north"},
        {"site": "nowhere"},
        {"round": 2},
        {"update": "7" * 64},
    ],
    ids=lambda change: next(iter(change.items()))[0] + "=" + str(next(iter(change.values())))[:8],
)
def test_a_refusal_that_says_anything_else_fails(change):
    lying = RobustWorld(before={"update.refused": lambda world, body: replace(body, **change)})
    fails(judged(lying), REPLAY, "replay.refusal")


def test_an_honest_update_cannot_be_refused_for_its_length():
    disliked = RobustWorld(long=False, believes=lambda terms, values: terms.nominal_rows == 30)
    step = fails(judged(disliked), REPLAY, "replay.refusal")
    assert "within the bound" in step.detail


def test_a_refusal_needs_a_charter_that_sets_a_bound():
    fails(judged(RobustWorld(norm_bound=0)), REPLAY, "replay.refusal")


def test_what_the_bound_refuses_cannot_be_counted():
    step = fails(judged(RobustWorld(believes=lambda terms, values: False)), REPLAY, "replay.norm_bound")
    assert "west" in step.detail


@pytest.mark.parametrize("change", [{"digest": "7" * 64}, {"apart": ("north",)}], ids=["digest", "apart"])
def test_a_view_of_other_updates_fails(change):
    lying = RobustWorld(before={"round.examined": lambda world, body: replace(body, **change)})
    fails(judged(lying), REPLAY, "replay.examined")


def test_a_refused_update_that_is_not_in_the_file_proves_nothing(refusing, file):
    evidence = read_evidence(file)
    dropped = [digest for digest, data in evidence.artefacts.items() if data == long_update(refusing)]
    kept = {digest: data for digest, data in evidence.artefacts.items() if digest not in dropped}
    assert len(kept) == len(evidence.artefacts) - 1
    report = refusing.report(write_evidence(replace(evidence, artefacts=kept)), replay=True)
    says(report, REPLAY, Word.NO_EVIDENCE, "replay.update_missing", Verdict.INCOMPLETE)


def long_update(world):
    return encode_update([LONG] * world.charter.dimension)


@pytest.mark.parametrize("rule", ["mean", "median", "trimmed_mean"])
def test_another_rule_than_the_charters_is_found(rule):
    """The operator averages by one rule under a charter that names another."""
    other = {"mean": "median", "median": "mean", "trimmed_mean": "median"}[rule]
    world = RobustWorld(rule=rule, long=False)
    plan = world.charter.aggregation
    wrong = replace(world.charter, aggregation=replace(plan, rule=replace(plan.rule, name=other)))
    honest_charter, world.charter = world.charter, wrong
    world.train()
    world.charter = honest_charter
    report = world.report(world.evidence(world.find("run.completed")), replay=True)
    fails(report, REPLAY, "replay.output_model")
