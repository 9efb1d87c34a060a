"""Robust rules: Flower's own arithmetic to rounding, the definition's bits, and what liars can do to each."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.replay import AggregationPlan, SiteUpdate, pseudo_gradient
from audit.robust import AggregationRule, RuleError, check_rule
from audit.robust import combine as defined
from audit.update_bounds import UpdateTerms, is_too_long
from federation.charter import Charter
from federation.errors import CharterError
from federation.grid import InProcessGrid
from federation.robust_rules import combine

RULES = {
    "krum": AggregationRule(name="krum", byzantine=2, keep=1),
    "multi_krum": AggregationRule(name="multi_krum", byzantine=2, keep=5),
    "median": AggregationRule(name="median", byzantine=2),
    "trimmed_mean": AggregationRule(name="trimmed_mean", byzantine=2),
    "mean": AggregationRule(),
}
FLOWERS = {
    "krum": lambda: Krum(num_malicious_nodes=2),
    "multi_krum": lambda: MultiKrum(num_malicious_nodes=2, num_nodes_to_select=5),
    "median": lambda: FedMedian(),
    "trimmed_mean": lambda: FedTrimmedAvg(beta=0.25),  # two of eight at each end
}


@pytest.fixture(scope="module", autouse=True)
def run_identity():
    """Flower's messages can only be made inside a run."""
    with InProcessGrid(ClientApp(), {"a": {}}):
        yield


def by_flower(strategy, rows, weights):
    strategy.current_arrays = ArrayRecord({"w": Array(np.zeros(len(rows[0])))})
    replies = []
    for row, weight in zip(rows, weights, strict=True):
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.array(row))}),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        replies.append(Message(content, reply_to=Message(RecordDict(), 7, "train")))
    arrays, _ = strategy.aggregate_train(1, replies)
    return arrays["w"].numpy()


@pytest.mark.parametrize("name", FLOWERS)
@pytest.mark.parametrize("seed", range(3))
def test_each_rule_is_flowers_own(name, seed):
    order = np.random.default_rng(seed)
    rows = order.normal(size=(8, 23)) + order.normal(size=23)
    rows[seed] *= -40
    weights = order.integers(1, 900, size=8).tolist()
    ours = combine(RULES[name], list(rows), [float(w) for w in weights])
    assert ours == pytest.approx(by_flower(FLOWERS[name](), rows, weights), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_numpy_gives_the_definitions_bits(name, data):
    dimension = data.draw(st.integers(1, 5))
    numbers = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e9, 1e9), st.just(0.1))
    rows = [data.draw(st.lists(numbers, min_size=dimension, max_size=dimension)) for _ in range(8)]
    weights = [data.draw(st.floats(0.5, 500)) for _ in rows]
    ours = combine(RULES[name], [np.array(row) for row in rows], weights)
    assert ours.tolist() == defined(RULES[name], rows, weights)


@pytest.mark.parametrize("name", ["krum", "multi_krum", "median", "trimmed_mean"])
def test_two_liars_of_eight_cannot_leave_the_honest_range(name):
    order = np.random.default_rng(5)
    honest = order.normal(1.0, 0.1, size=(6, 12))
    for lie in (1e12, -1e12, -3.0):
        rows = [*honest, np.full(12, lie), np.full(12, lie)]
        found = combine(RULES[name], rows, [1.0] * 6 + [1e9] * 2)
        assert (found >= honest.min(axis=0)).all()
        assert (found <= honest.max(axis=0)).all()


def test_a_mean_follows_one_liar_anywhere():
    found = combine(RULES["mean"], [np.ones(3)] * 7 + [np.full(3, -1e6)], [1.0] * 8)
    assert (found < -1e5).all()


def test_equal_updates_are_decided_by_the_order_of_sites():
    rows = [[1.0], [1.0], [1.0], [2.0], [2.0], [2.0], [2.0]]
    rule = AggregationRule(name="krum", byzantine=2, keep=1)
    assert defined(rule, rows, [1.0] * 7) == [2.0]  # three equals are near the 2s, two near the 1s
    tied = [[1.0], [1.0], [1.0], [2.0], [2.0], [2.0]]
    one = AggregationRule(name="krum", byzantine=1, keep=1)
    assert defined(one, tied, [1.0] * 6) == [1.0]


@pytest.mark.parametrize(
    ("rule", "sites", "field"),
    [
        (AggregationRule(name="krum", byzantine=2, keep=1), 6, "byzantine"),
        (AggregationRule(name="multi_krum", byzantine=1, keep=4), 4, "byzantine"),
        (AggregationRule(name="multi_krum", byzantine=1, keep=5), 5, "keep"),
        (AggregationRule(name="multi_krum", byzantine=1), 5, "keep"),
        (AggregationRule(name="median", byzantine=2), 4, "byzantine"),
        (AggregationRule(name="trimmed_mean", byzantine=4), 8, "byzantine"),
        (AggregationRule(name="trimmed_mean", byzantine=-1), 8, "byzantine"),
        (AggregationRule(name="mean", byzantine=1), 8, "byzantine"),
        (AggregationRule(name="mean", keep=1), 8, "keep"),
        (AggregationRule(name="bulyan"), 8, "rule"),
    ],
)
def test_a_rule_that_cannot_hold_its_promise_is_refused(rule, sites, field):
    with pytest.raises(RuleError) as caught:
        check_rule(rule, sites)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("aggregation", "path"),
    [
        ("{rule: krum, byzantine: 1}", "aggregation.byzantine"),  # rounds may end with 2 sites
        ("{rule: median, byzantine: 1}", "aggregation.byzantine"),
        ("{rule: mean, byzantine: 1}", "aggregation.byzantine"),
        ("{rule: median, keep: 2}", "aggregation.keep"),
        ("{rule: bulyan}", "aggregation.rule"),
        ("{rule: median, f: 0}", "aggregation.f"),
    ],
)
def test_a_charter_names_what_its_rule_lacks(charter_text, aggregation, path):
    with pytest.raises(CharterError) as caught:
        Charter.parse(charter_text + f"aggregation: {aggregation}\n")
    assert [problem.path for problem in caught.value.problems] == [path]
    assert all(problem.fix for problem in caught.value.problems)


def test_a_charter_without_the_key_keeps_its_digest_and_one_with_it_reads_back(charter_text):
    plain = Charter.parse(charter_text)
    assert "aggregation" not in plain.document
    text = charter_text.replace("minimum_sites: 2", "minimum_sites: 3")
    robust = Charter.parse(text + "aggregation: {rule: trimmed_mean, byzantine: 1}\n")
    again = Charter.from_canonical(robust.canonical().decode())
    assert again.digest == robust.digest == Charter.parse(robust.to_yaml()).digest
    assert again.rule == AggregationRule(name="trimmed_mean", byzantine=1, norm_bound=True)


def test_secure_aggregation_and_robust_rules_exclude_each_other(charter_text):
    from types import SimpleNamespace

    from federation._aggregation_checks import check_aggregation
    from federation.charter import Aggregation

    def problems(part):
        asked = SimpleNamespace(
            aggregation=part, secure_aggregation=True, rule=AggregationRule(), minimum_sites=8
        )
        return [problem.path for problem in check_aggregation(asked)]

    assert problems(Aggregation(rule="median")) == ["aggregation.rule", "aggregation.norm_bound"]
    assert problems(Aggregation()) == ["aggregation.norm_bound"]
    assert problems(Aggregation(norm_bound=False)) == []


def terms(**changes):
    given = {
        "nominal_rows": 100,
        "sample_rate": Fraction(1),
        "rows_per_unit": 1,
        "grid_bits": 20,
        "precision": "float64",
        "sigma_grid": 3 << 20,
        "dimension": 40,
        "released": 40,
        "local_steps": 1,
        "local_learning_rate": Fraction(1, 10),
    }
    return UpdateTerms(**given | changes)


@pytest.mark.parametrize("rate", [Fraction(1), Fraction(1, 10)])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_longest_honest_update_passes_the_bound(rate, steps):
    """Every row's clipped gradient the same way, in each step, and true noise: never refused."""
    order = np.random.default_rng(0)
    bounds = terms(sample_rate=rate, local_steps=steps)
    direction = np.full(40, 1 / math.sqrt(40)) * 2**20
    factor = 1.0 if steps == 1 else 0.1 / (100 * float(rate))
    for _ in range(200):
        total = np.zeros(40)
        for _ in range(steps):
            total += order.binomial(100, float(rate)) * direction + order.normal(0, 3 << 20, size=40)
        values = np.rint(factor * total).astype(np.int64).tolist()
        assert not is_too_long(bounds, values)
    assert is_too_long(bounds, [8 * v for v in values])


def test_the_bound_follows_only_charter_constants_and_grows_with_rows_and_noise():
    base = terms().norm_bound
    assert terms(nominal_rows=1000).norm_bound > base
    assert terms(sigma_grid=30 << 20).norm_bound > base
    assert terms(rows_per_unit=5).norm_bound < base
    assert terms(sample_rate=Fraction(1, 10)).norm_bound < base


def test_local_layers_leave_gaps_that_no_update_fills():
    plan = AggregationPlan(
        strategy="fedavg", is_gradient=True, learning_rate=1.0, beta1=0.9, beta2=0.99, tau=0.001, scale=1.0,
        sample_rate=1.0, average_last=1, spans=((0, 2), (4, 5)),
    )  # fmt: skip
    updates = [SiteUpdate(site="a", nominal_rows=2, weight=1.0, values=[2, 4, 6])]
    assert pseudo_gradient(plan, updates, dimension=6) == [-1.0, -2.0, 0.0, 0.0, -3.0, 0.0]
