from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi

from audit.replay import AggregationPlan, Aggregator, ReplayError, SiteUpdate, average, grid_scale

PLAN = AggregationPlan(
    strategy="fedavg",
    is_gradient=True,
    learning_rate=0.7,
    beta1=0.9,
    beta2=0.99,
    tau=0.001,
    scale=grid_scale(20, "1.5"),
    sample_rate=0.25,
    average_last=2,
)
ROWS, WEIGHTS = {"east": 101, "north": 57, "west": 30}, {"east": 0.3, "north": 0.1, "west": 0.45}


def updates(seed: int, dimension: int = 7) -> list[SiteUpdate]:
    rng = np.random.default_rng(seed)
    return [
        SiteUpdate(
            site=site,
            nominal_rows=ROWS[site],
            weight=WEIGHTS[site],
            values=[int(v) for v in rng.integers(-(2**30), 2**30, dimension)],
        )
        for site in sorted(ROWS)
    ]


def numpy_direction(plan: AggregationPlan, given: list[SiteUpdate]) -> np.ndarray:
    total = np.float64(0.0)
    for update in given:
        total = total + np.float64(update.weight)
    acc = np.zeros(len(given[0].values))
    for update in given:
        values = np.asarray(update.values, dtype=np.int64).astype(np.float64)
        divisor = plan.scale * (update.nominal_rows * plan.sample_rate) if plan.is_gradient else plan.scale
        acc = acc + (np.float64(update.weight) / total) * (values / divisor)
    return -acc if plan.is_gradient else acc


@pytest.mark.parametrize("is_gradient", [True, False])
def test_averaging_equals_numpy_bit_for_bit(is_gradient):
    plan = dataclasses.replace(PLAN, is_gradient=is_gradient)
    aggregator, weights, mirror = Aggregator(plan), [0.1] * 7, np.full(7, 0.1)
    for number in range(1, 6):
        weights = aggregator.step(number, weights, updates(number))
        mirror = mirror + plan.learning_rate * numpy_direction(plan, updates(number))
        assert weights == mirror.tolist()


class Averaged(FedAvg):
    """Flower's strategies above this one are handed the averaged arrays, without messages."""

    averaged: np.ndarray

    def aggregate_train(self, server_round, replies):
        return ArrayRecord({"w": Array(self.averaged)}), None


class GivenFedAdam(FedAdam, Averaged):
    pass


class GivenFedYogi(FedYogi, Averaged):
    pass


@pytest.mark.parametrize(("strategy", "flower"), [("fedadam", GivenFedAdam), ("fedyogi", GivenFedYogi)])
def test_optimisers_equal_flower_s(strategy, flower):
    plan = dataclasses.replace(PLAN, strategy=strategy)
    aggregator, weights = Aggregator(plan), [0.1] * 7
    theirs = flower(eta=plan.learning_rate, beta_1=plan.beta1, beta_2=plan.beta2, tau=plan.tau)
    current = np.full(7, 0.1)
    for number in range(1, 6):
        weights = aggregator.step(number, weights, updates(number))
        theirs.current_arrays = {"w": current}
        theirs.averaged = current + numpy_direction(plan, updates(number))
        arrays, _ = theirs.aggregate_train(number, [])
        current = arrays["w"].numpy()
        assert weights == pytest.approx(current.tolist(), abs=1e-12, rel=1e-12)


def test_missing_sites_are_left_out_of_the_weights():
    one = updates(1)[:1]
    alone = Aggregator(PLAN).step(1, [0.0] * 7, one)
    full_weight = Aggregator(PLAN).step(1, [0.0] * 7, [dataclasses.replace(one[0], weight=1.0)])
    assert alone == full_weight


def test_an_update_beyond_two_to_the_53_rounds_like_float64():
    given = [SiteUpdate(site="a", nominal_rows=1, weight=1.0, values=[2**62 + 1])]
    plan = dataclasses.replace(PLAN, is_gradient=False, scale=1.0, learning_rate=1.0)
    assert Aggregator(plan).step(1, [0.0], given) == [float(np.float64(np.int64(2**62 + 1)))]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: [],
        lambda given: given[::-1],
        lambda given: [given[0], given[0]],
        lambda given: [dataclasses.replace(given[0], values=[1, 2])],
        lambda given: [dataclasses.replace(given[0], values=[1] * 8)],
    ],
)
def test_updates_that_cannot_be_aggregated_are_refused(change):
    with pytest.raises(ReplayError):
        Aggregator(PLAN).step(1, [0.0] * 7, change(updates(1)))


def test_weights_that_diverge_are_an_error():
    plan = dataclasses.replace(PLAN, learning_rate=1e308, scale=1e-300)
    with pytest.raises(ReplayError, match="finite"):
        Aggregator(plan).step(1, [0.0] * 7, updates(1))


def test_an_unknown_strategy_is_refused():
    with pytest.raises(ReplayError, match="fedprox"):
        Aggregator(dataclasses.replace(PLAN, strategy="fedprox")).step(1, [0.0] * 7, updates(1))


def test_the_average_is_a_running_sum_and_one_division():
    rounds = [[0.1, 1e16], [0.2, 1.0], [0.3, -1e16]]
    assert average(rounds) == [((0.1 + 0.2) + 0.3) / 3, ((1e16 + 1.0) + -1e16) / 3]
    with pytest.raises(ReplayError):
        average([])
