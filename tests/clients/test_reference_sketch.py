"""The sketch of the training rows: paid for, noised in every bin, and what a score by it finds far."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from audit.charter_view import CharterFormError, read_charter
from audit.encoding import RowEncoder
from audit.entries import RunAccepted, SiteStatement
from audit.reference import (
    GRID_BITS,
    OodScorer,
    Reference,
    SketchError,
    row_bins,
    sketch_counts,
    sketch_document,
    sketch_sensitivity,
)
from audit.round_bodies import RunReferenced
from audit.verify import Verdict, Word, verify_evidence
from clients.dp.randomness import SecureRandom
from clients.loader import load_training_data
from clients.simulation import simulate
from clients.sketching import noisy_sketch, true_sketch
from clients.terms import read_terms
from federation.charter import Charter
from federation.errors import CharterError

CHARTER = """
name: sketched
task: binary
features:
  - {name: x, type: number, lower: -3, upper: 3}
  - {name: ward, type: category, categories: [north, south]}
  - {name: fever, type: boolean}
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 1}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
evaluation: {share: 0.25, noise_multiplier: 2}
reference: {bins: 6, noise_multiplier: 2}
answers: {decimals: 2, cache: true}
fairness: {groups: [ward, x]}
gates: [{metric: accuracy, source: private_release, floor: 0.3}]
"""


def frame(rows, seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(0, 0.6, rows).clip(-3, 3).round(4)
    return pd.DataFrame(
        {
            "x": x,
            "ward": np.where(draw.random(rows) < 0.9, "north", "south"),
            "fever": draw.random(rows) < 0.2,
            "y": np.where(x > 0.3, "yes", "no"),
        }
    )


SITES = {"a": frame(1_600, 1), "b": frame(1_200, 2)}


@pytest.fixture(scope="module")
def run():
    made = simulate(CHARTER, SITES)
    made.register()
    made.approve()
    yield made
    made.close()


@pytest.fixture(scope="module")
def scorer(run):
    log = run.federation.coordinator
    (body,) = [body for _, body in log.bodies(RunReferenced)]
    reference = Reference.of_charter(run.charter.document)
    counts = sketch_counts(log.blobs.get(body.sketch), digest=body.sketch, reference=reference)
    return OodScorer(run.charter.document["features"], reference=reference, counts=counts)


def scores(scorer, run, rows):
    encoder = RowEncoder(run.charter.document["features"])
    records = rows.drop(columns="y").to_dict("records")
    return [scorer.score(encoder.encode(record)) for record in records]


def test_the_sketch_is_the_last_release_and_the_odometer_counts_it(run):
    log = run.federation.coordinator
    statements = [body for _, body in log.bodies(SiteStatement) if body.round == 3]
    reference = Reference.of_charter(run.charter.document)
    assert {body.event for body in statements} == {reference.event}
    assert [body.sequence for body in statements] == [3, 3]
    assert [body.planned_events for _, body in log.bodies(RunAccepted)] == [3, 3]
    assert all(site.events == 3 for site in run.version.registered.epsilons)
    assert reference.event.dimension == 6 + 2 + 2


def test_the_verifier_proves_the_sum_and_says_whose_word_the_counts_are(run):
    report = verify_evidence(run.evidence(), policy_text=run.policy, replay=True)
    assert report.verdict is Verdict.VALID, report.text()
    step = report.step("The rounds' metrics")
    assert (step.word, "the sum of what 2 sites released" in step.detail) == (Word.ATTESTED, True)


class Spy(SecureRandom):
    """Notes what noise was asked for."""

    def discrete_gaussian(self, sigma, size):
        self.asked = (sigma, size)
        return super().discrete_gaussian(sigma, size)


def test_every_bin_is_noised_and_one_row_moves_the_counts_by_the_sensitivity(run):
    terms = read_terms(run.charter.canonical().decode(), site="a")
    data, spy = load_training_data(run.federation.files["a"], terms), Spy()
    assert len(noisy_sketch(terms.reference, terms, data, random=spy)) == 10
    assert spy.asked == (terms.reference.event.sigma_grid, 10)
    fewer = type(data)(data.inputs[1:], data.targets[1:])
    counts, without = (true_sketch(terms.reference, terms, rows) for rows in (data, fewer))
    moved = np.linalg.norm((counts - without) << GRID_BITS)
    assert moved <= terms.reference.event.sensitivity_grid < moved + 1
    empty = type(data)(data.inputs[:0], data.targets[:0])
    assert len(noisy_sketch(terms.reference, terms, empty)) == 10


@pytest.mark.parametrize(
    ("relation", "rows", "features", "least"),
    [("add_remove", 1, 4, 2 << 16), ("replace_one", 1, 4, 4 << 16), ("zero_out", 3, 9, 9 << 16)],
)
def test_sensitivity_covers_a_person_of_many_rows_and_features(relation, rows, features, least):
    assert sketch_sensitivity(features, rows=rows, relation=relation) == least


def test_honest_rows_raise_no_storm_and_far_rows_are_found(run, scorer):
    honest = scores(scorer, run, frame(2_000, 77))
    assert scorer.basis == "reference"
    assert sum(found["out"] for found in honest) / len(honest) < 0.02
    far = pd.DataFrame({"x": [-2.9], "ward": ["south"], "fever": [True], "y": ["no"]})
    (found,) = scores(scorer, run, far)
    assert found["out"] is True


def test_without_a_paid_sketch_the_bounds_are_the_basis():
    features = Charter.parse(_complete(CHARTER)).document["features"]
    plain, encoder = OodScorer(features), RowEncoder(features)
    middle, edge = ({"x": value, "ward": "north", "fever": False} for value in (0.0, 2.99))
    assert plain.score(encoder.encode(middle)) == {"basis": "bounds", "out": False, "score": "0"}
    assert plain.score(encoder.encode(edge)) == {"basis": "bounds", "out": True, "score": "1"}


@pytest.mark.parametrize("highest", [0.0, 0.9499999, 0.95, 1.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_score_by_bounds_counts_the_edges_whether_there_are_any_or_not(highest, sign):
    features = [
        {"name": f"x{k}", "type": "number", "lower": "-1", "upper": "1", "unit": "", "missing": "refuse"}
        for k in range(4)
    ]
    found = OodScorer(features).score([0.0, sign * highest, 0.5, -0.5])
    edges = 1 if highest >= 0.95 else 0
    assert found == {"basis": "bounds", "out": False, "score": "0.25" if edges else "0"}


def test_a_claimed_score_is_compared_with_the_sketch(run, scorer):
    encoded = RowEncoder(run.charter.document["features"]).encode({"x": 0, "ward": "north", "fever": False})
    right = scorer.score(encoded)
    assert scorer.differs(right, encoded) == ""
    lies = [
        {**right, "score": "0.001"},
        {**right, "out": not right["out"]},
        {**right, "basis": "bounds"},
        {**right, "score": "nan"},
        {**right, "more": 1},
        {"score": right["score"]},
        "fine",
    ]
    assert all(scorer.differs(lie, encoded) for lie in lies)


def test_bins_close_at_the_upper_bound_and_a_missing_category_has_none():
    features = [
        {"name": "x", "type": "number", "lower": "0", "upper": "1", "unit": "", "missing": "refuse"},
        {"name": "c", "type": "category", "categories": ["a", "b"], "unit": "", "missing": "midpoint"},
    ]
    assert row_bins(features, (4, 2), [1.0, 0.0, 1.0]) == [3, 5]
    assert row_bins(features, (4, 2), [-1.0, 0.0, 0.0]) == [0]
    assert row_bins(features, (4, 2), [7.0, 1.0, 0.0]) == [3, 4]


def test_a_sketch_of_other_bytes_or_bins_is_refused(run):
    reference = Reference.of_charter(run.charter.document)
    with pytest.raises(SketchError, match="counts a site"):
        sketch_document(reference, run="r", charter="c", sites=["a"], counts=[[1, 2]])
    good = sketch_document(reference, run="r", charter="c", sites=["a"], counts=[[1] * 10])
    with pytest.raises(SketchError, match="bytes"):
        sketch_counts(good, digest="0" * 64, reference=reference)


def _complete(text):
    from audit.keys import SigningKey

    site = f"sites: [{{name: a, identity: '{SigningKey.generate().text}', nominal_rows: 300}}]\n"
    return "affidavit: 1\npurposes: [test]\n" + text + site


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("bins: 6", "bins: 1", "reference.bins"),
        ("bins: 6, noise_multiplier: 2", "bins: 6", "reference.noise_multiplier"),
        ("bins: 6, noise_multiplier: 2", "bins: 6, noise_multiplier: 1e7", "reference.noise_multiplier"),
        ("decimals: 2", "decimals: 7", "answers.decimals"),
        ("decimals: 2", "decimals: 2, labels: true", "answers.labels"),
        ("groups: [ward, x]", "groups: [weight]", "fairness.groups[0]"),
        ("groups: [ward, x]", "groups: [x, x]", "fairness.groups[1]"),
        ("groups: [ward, x]", "groups: []", "fairness.groups"),
    ],
)
def test_a_charter_names_what_is_wrong_with_these_parts(old, new, path):
    assert old in CHARTER
    with pytest.raises(CharterError) as caught:
        Charter.parse(_complete(CHARTER.replace(old, new)))
    assert path in [problem.path for problem in caught.value.problems]


def test_these_parts_read_back_from_both_forms_and_old_charters_keep_their_names():
    charter = Charter.parse(_complete(CHARTER))
    assert Charter.from_canonical(charter.canonical().decode()).digest == charter.digest
    assert Charter.parse(charter.to_yaml()).digest == charter.digest
    without = "".join(
        line for line in CHARTER.splitlines(True) if not line.startswith(("ref", "ans", "fair"))
    )
    old = Charter.parse(_complete(without)).document
    assert not {"reference", "answers", "fairness"} & set(old)
    view = read_charter(charter.canonical())
    assert (view.releases, view.serving.answers.decimals, view.serving.groups) == (3, 2, ("ward", "x"))


@pytest.mark.parametrize(
    "changed",
    [
        {"reference": {"bins": "6", "noise_multiplier": "2"}},
        {"reference": {"bins": 6}},
        {"reference": {"bins": 65, "noise_multiplier": "2"}},
        {"answers": {"decimals": 2}},
        {"answers": {"decimals": 2, "label_only": 2, "cache": 0}},
        {"answers": {"decimals": True, "label_only": 0, "cache": 0}},
        {"fairness": {"groups": ["weight"]}},
        {"fairness": {"groups": "x"}},
        {"fairness": {"groups": ["x", "x"]}},
        {"fairness": []},
    ],
)
def test_a_verifier_refuses_parts_that_no_charter_could_have(changed):
    from audit.canonical import canonical_bytes

    document = Charter.parse(_complete(CHARTER)).document
    with pytest.raises(CharterFormError):
        read_charter(canonical_bytes({**document, **changed}))
