"""Federated evaluation: held-out rows counted at the sites with noise, on the odometer and in a gate."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from audit.entries import RunAccepted, SiteStatement
from audit.epsilon import recompute
from audit.keys import SigningKey
from audit.private_evaluation import GRID_BITS, Evaluation, EvaluationError, worth
from audit.round_bodies import RunEvaluated
from audit.verify import Verdict, Word, verify_evidence
from clients.decisions import run_cost
from clients.dp.randomness import SecureRandom
from clients.evaluation import noisy_counts, true_counts
from clients.loader import load_all_data, load_evaluation_data, load_training_data
from clients.proposals import Proposal
from clients.reviewing import review_proposal
from clients.service import review
from clients.simulation import simulate
from clients.terms import read_terms
from federation.charter import Charter
from federation.errors import CharterError

CHARTER = """
name: counted
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
evaluation: {share: 0.25, noise_multiplier: 2}
gates: [{metric: accuracy, source: private_release, margin_over_baseline: 0.2}]
"""


def frame(rows, seed):
    draw = np.random.default_rng(seed)
    x = draw.uniform(-3, 3, rows).round(4)
    return pd.DataFrame({"x": x, "y": np.where(x > 0.3, "yes", "no")})


SITES = {"a": frame(400, 1), "b": frame(300, 2), "c": frame(350, 3)}


@pytest.fixture(scope="module")
def run():
    made = simulate(CHARTER, SITES)
    made.register()
    made.approve()
    yield made
    made.close()


def test_a_sites_people_are_told_what_the_counts_cost_too(run):
    text, home = run.charter.canonical().decode(), run.federation.homes["a"]
    planned = read_terms(text, site="a").planned
    whole = recompute(planned, 1e-5).value
    assert whole > recompute(planned[:2], 1e-5).value * 1.05
    signing, deciding = review(home, text), review_proposal(home, Proposal(charter=text, run=None))
    assert (signing.releases, signing.charter_epsilon) == (3, whole)
    assert deciding.run_epsilon == whole
    assert signing.lifetime_after == deciding.lifetime_after == recompute(planned * 2, 1e-5).value
    assert run_cost(read_terms(text, site="a"), 1e-5) == whole  # what the site's own rules compare


def test_a_run_prints_as_one_line(run):
    assert (
        repr(run)
        == f"<SimulatedRun {run.id[:12]} of {run.charter.name}: 3 sites, version {run.version.digest[:12]}>"
    )


def test_each_site_releases_one_matrix_and_the_odometer_counts_it(run):
    log = run.federation.coordinator
    statements = [body for _, body in log.bodies(SiteStatement) if body.round == 3]
    assert sorted(body.site for body in statements) == ["a", "b", "c"]
    assert {body.sequence for body in statements} == {3}
    evaluation = Evaluation.of_charter(run.charter.document)
    assert {body.event for body in statements} == {evaluation.event}
    assert [body.planned_events for _, body in log.bodies(RunAccepted)] == [3, 3, 3]
    assert all(site.events == 3 for site in run.version.registered.epsilons)
    alone = (evaluation.event.sigma_grid, evaluation.event.sensitivity_grid, evaluation.event.dimension)
    assert alone == (2 << 16, 1 << 16, 4)


def test_the_released_accuracy_is_near_the_true_one_and_judges_the_gate(run):
    (body,) = [body for _, body in run.federation.coordinator.bodies(RunEvaluated)]
    canonical = run.charter.canonical().decode()
    right = rows = 0
    for name, path in run.federation.files.items():
        terms = read_terms(canonical, site=name)
        counts = true_counts(terms.evaluation, terms, run.weights, load_evaluation_data(path, terms))
        right, rows = right + counts[0] + counts[3], rows + counts.sum()
    (metric,) = body.metrics
    assert (metric.name, metric.source) == ("accuracy", "private_release")
    assert abs(float(metric.value) - right / rows) < 6 * float(body.spread) + 0.02
    (gate,) = run.version.registered.gates
    assert (gate.source, gate.value, gate.passed) == ("private_release", metric.value, 1)


def test_the_verifier_adds_the_counts_up_and_says_whose_word_they_are(run):
    report = verify_evidence(run.evidence(), policy_text=run.policy, replay=True)
    assert report.verdict is Verdict.VALID, report.text()
    gates = report.step("The gates")
    assert (gates.word, gates.code) == (Word.ATTESTED, "gate.private_release")
    assert "added up again" in report.step("The rounds' metrics").detail
    assert report.step("The odometers").code == "ok"
    assert all(line.events == 3 for line in report.epsilons)


def test_a_row_is_trained_on_or_counted_and_others_do_not_move_it(run, tmp_path):
    terms = read_terms(run.charter.canonical().decode(), site="a")
    path = run.federation.files["a"]
    whole, held_out = load_all_data(path, terms)
    train, count = load_training_data(path, terms), load_evaluation_data(path, terms)
    assert len(train.targets) + len(count.targets) == len(whole.targets) == 400
    assert 60 < len(count.targets) < 140
    fewer = tmp_path / "fewer.csv"
    SITES["a"].drop(index=range(0, 400, 3)).to_csv(fewer, index=False)
    _, after = load_all_data(fewer, terms)
    assert after.tolist() == [flag for place, flag in enumerate(held_out.tolist()) if place % 3]


def test_a_subject_is_never_on_both_sides(tmp_path):
    rows = frame(300, 5).assign(patient=[f"p{i // 3}" for i in range(300)])
    path = tmp_path / "rows.csv"
    rows.to_csv(path, index=False)
    text = CHARTER.replace("unit: row", "unit: subject, subject_id: patient, max_rows_per_subject: 3")
    site = "sites: [{name: a, identity: KEY, nominal_rows: 300}]\n"
    charter = Charter.parse(
        "affidavit: 1\npurposes: [test]\n" + text + site.replace("KEY", SigningKey.generate().text)
    )
    terms = read_terms(charter.canonical().decode(), site="a")
    assert terms.evaluation.event.sensitivity_grid == 3 << 16
    _, held_out = load_all_data(path, terms)
    sides = {tuple(held_out[i : i + 3].tolist()) for i in range(0, 300, 3)}
    assert sides == {(True,) * 3, (False,) * 3}


class Spy(SecureRandom):
    """Notes what noise was asked for."""

    def discrete_gaussian(self, sigma, size):
        self.asked = (sigma, size)
        return super().discrete_gaussian(sigma, size)


def test_every_cell_is_noised_and_one_row_moves_the_counts_by_the_sensitivity(run):
    terms = read_terms(run.charter.canonical().decode(), site="a")
    data = load_evaluation_data(run.federation.files["a"], terms)
    spy = Spy()
    released = noisy_counts(terms.evaluation, terms, run.weights, data, random=spy)
    assert spy.asked == (terms.evaluation.event.sigma_grid, 4)
    assert len(released) == 4
    before = true_counts(terms.evaluation, terms, run.weights, data)
    fewer = type(data)(data.inputs[1:], data.targets[1:])
    gap = np.linalg.norm((before - true_counts(terms.evaluation, terms, run.weights, fewer)) << GRID_BITS)
    assert gap == terms.evaluation.event.sensitivity_grid
    empty = type(data)(data.inputs[:0], data.targets[:0])
    assert len(noisy_counts(terms.evaluation, terms, run.weights, empty)) == 4


def test_counts_that_are_only_noise_say_nothing():
    evaluation = Evaluation.of_charter(
        {
            "evaluation": {"share": "0.1", "noise_multiplier": "10"},
            "label": {"classes": ["no", "yes"]},
            "privacy": {"unit": "row", "relation": "replace_one", "max_rows_per_subject": 1},
        }
    )
    assert evaluation.event.sensitivity_grid == 2 << 16
    for counts in ([], [[1, 2, 3]], [[-5, 1, 1, 1]]):
        with pytest.raises(EvaluationError):
            worth(evaluation, counts)
    found = worth(evaluation, [[90 << 16, 10 << 16, 20 << 16, 80 << 16]])
    assert (found.accuracy, found.baseline) == ("0.85", "0.5")
    assert 0.1 < float(found.spread) < 0.3


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("evaluation: {share: 0.25, noise_multiplier: 2}", "", "gates[0]"),
        ("metric: accuracy", "metric: auc", "gates[0].metric"),
        ("share: 0.25", "share: 1", "evaluation.share"),
        ("share: 0.25, ", "", "evaluation.share"),
        (
            "share: 0.25, noise_multiplier: 2",
            "share: 0.25, noise_multiplier: 0",
            "evaluation.noise_multiplier",
        ),
        (
            "share: 0.25, noise_multiplier: 2",
            "share: 0.25, noise_multiplier: 1e7",
            "evaluation.noise_multiplier",
        ),
        ('classes: ["no", "yes"]}', "lower: 0, upper: 1}", "evaluation"),
    ],
)
def test_a_charter_names_what_is_wrong_with_its_evaluation(run, old, new, path):
    text = run.charter.to_yaml()
    before = CHARTER.strip().split("\n")
    assert any(old in line for line in before)
    changed = CHARTER.replace(old, new)
    if path == "evaluation":
        changed = changed.replace("task: binary", "task: regression").replace("logistic_regression", "linear")
        changed = changed.replace("metric: accuracy, source: private_release", "metric: r2")
    sites = text[text.index("sites:") : text.index("gates:")]
    purposes = "affidavit: 1\npurposes: [test]\n"
    with pytest.raises(CharterError) as caught:
        Charter.parse(purposes + changed + sites.split("evaluation:")[0].split("aggregation:")[0])
    assert path in [problem.path for problem in caught.value.problems]
