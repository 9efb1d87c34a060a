"""The view of a round's updates: liars stand apart, honest sites do not, and noise alone marks nobody."""

from __future__ import annotations

import math
import random

import pytest

from audit.anomaly import AnomalyError, SiteFacts, examine, plain_dot

D = 40


def round_of(vectors, noise=0.1):
    facts = [SiteFacts(site=f"s{i}", bound=10.0, noise=noise) for i in range(len(vectors))]
    return examine(3, facts, vectors, D, plain_dot)


def honest(count, *, signal=1.0, noise=0.1, seed=1):
    draw = random.Random(seed)
    direction = [draw.gauss(0, signal) for _ in range(D)]
    return [[v + draw.gauss(0, noise) for v in direction] for _ in range(count)]


def test_sites_that_learn_alike_are_a_noise_apart_and_none_is_marked():
    view = round_of(honest(8))
    assert view["apart"] == []
    assert all(0.7 < float(value) < 1.3 for value in view["distance"])
    assert all(float(value) > 0.9 for value in view["cosine"])
    assert view["cosines"][2][2] == "1"


def test_noise_alone_marks_nobody_whatever_the_draw():
    marked = sum(len(round_of(honest(8, signal=0.0, seed=seed))["apart"]) for seed in range(100))
    assert marked <= 8  # of 800


@pytest.mark.parametrize("lie", ["flip", "scale", "other"])
def test_one_or_two_liars_stand_apart(lie):
    for liars in (1, 2):
        vectors = honest(8)
        for i in range(liars):
            if lie == "flip":
                vectors[i] = [-v for v in vectors[i]]
            elif lie == "scale":
                vectors[i] = [5 * v for v in vectors[i]]
            else:
                vectors[i] = honest(1, seed=99)[0]
        assert round_of(vectors)["apart"] == [f"s{i}" for i in range(liars)]


def test_among_three_nobody_can_say_who_lies():
    vectors = honest(3)
    vectors[0] = [-9 * v for v in vectors[0]]
    assert round_of(vectors)["apart"] == []


def test_zeros_and_a_single_site_give_numbers():
    view = round_of([[0.0] * D])
    assert (view["distance"], view["cosine"], view["cosines"]) == (["0"], ["0"], [["0"]])
    view = round_of([[0.0] * D] * 4)
    assert view["apart"] == []
    assert not any(math.isnan(float(v)) for v in view["distance"])


def test_a_round_without_updates_is_refused():
    with pytest.raises(AnomalyError, match="round 3"):
        round_of([])
