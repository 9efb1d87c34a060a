"""Noise that is drawn before it is asked for: as declared, taken once, by this process alone."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clients.dp.mechanism import Mechanism, MechanismTerms


def terms() -> MechanismTerms:
    return MechanismTerms(max_grad_norm=1.0, noise_multiplier=2.0, sample_rate=1.0, relation="add_remove")


@pytest.fixture
def data(rng):
    return torch.randn(40, 6, generator=rng).double(), torch.randint(0, 3, (40,), generator=rng)


class Tape:
    """Everything that a mechanism records, in order."""

    def __init__(self):
        self.entries = []

    def __call__(self, name, value):
        self.entries.append((name, value))

    def inside(self, what):
        return [value for name, value in self.entries if name == f"inside.{what}"]


def prepared(data, count=3):
    """A mechanism that has released once, and `count` sites' rows."""
    tape = Tape()
    mechanism = Mechanism(nn.Linear(6, 3).double(), terms(), "cross_entropy", recorder=tape)
    mechanism.release(*data)
    return mechanism, tape, [(data[0][i:].clone(), data[1][i:].clone()) for i in range(count)]


def test_noise_that_was_drawn_ahead_is_taken_once_by_a_release_that_is_prepared(data):
    mechanism, tape, sites = prepared(data)
    assert not mechanism.draw_ahead(len(sites)), "nothing was ever prepared, so nothing is drawn"
    mechanism.prepare(sites)
    for rows in sites:
        mechanism.release(*rows)
    assert [mechanism.draw_ahead(2) for _ in range(3)] == [True, False, False]
    ahead = {noise.tobytes() for noise in mechanism._ahead}
    before = {noise.tobytes() for noise in tape.inside("noise")}
    assert len(ahead) == 2
    assert not ahead & before
    mechanism.release(*sites[0])  # not prepared: it draws for itself
    assert tape.inside("noise")[-1].tobytes() not in ahead
    mechanism.prepare(sites)
    found = [mechanism.release(*rows) for rows in sites]
    taken = [noise.tobytes() for noise in tape.inside("noise")[-len(sites) :]]
    assert len(set(taken)) == len(sites)
    assert ahead < set(taken)
    assert not mechanism._ahead
    for release, total, noise in zip(found, tape.inside("sum")[-3:], tape.inside("noise")[-3:], strict=True):
        np.testing.assert_array_equal(release.update, total + noise)


def test_noise_that_was_drawn_ahead_is_what_was_declared(noise_alarms):
    model = nn.Linear(40, 5, bias=False).double()
    mechanism = Mechanism(model, terms(), "cross_entropy")
    sites = [(torch.zeros(4, 40).double(), torch.zeros(4, dtype=torch.int64)) for _ in range(30)]
    mechanism.prepare(sites[:1])
    while mechanism.draw_ahead(len(sites)):
        pass
    mechanism.prepare(sites)
    assert not mechanism._ahead
    updates = np.stack([mechanism.release(*rows).update for rows in sites])
    assert not noise_alarms(updates, mechanism.sigma_grid).any


def test_a_copy_of_the_process_takes_nothing_that_was_drawn_ahead(data):
    mechanism, _, sites = prepared(data)
    mechanism.prepare(sites)
    while mechanism.draw_ahead(len(sites)):
        pass
    ahead = {noise.tobytes() for noise in mechanism._ahead}
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        mechanism.draw_ahead(1)
        theirs = [noise.tobytes() for noise in mechanism._ahead]
        mechanism.prepare(sites)
        theirs += [item.noise.tobytes() for item in mechanism._prepared.values()]
        os.write(writing, bytes([len(theirs), len(ahead & set(theirs))]))
        os._exit(0)
    os.waitpid(child, 0)
    assert tuple(os.read(reading, 2)) == (4, 0)
    for descriptor in (reading, writing):
        os.close(descriptor)


def test_noise_is_drawn_ahead_up_to_a_limit_of_memory(data, monkeypatch):
    mechanism, _, sites = prepared(data)
    mechanism.prepare(sites)
    monkeypatch.setattr("clients.dp.mechanism._MOST_AHEAD", 2 * mechanism.dimension)
    assert [mechanism.draw_ahead(1000) for _ in range(4)] == [True, False, False, False]
    assert len(mechanism._ahead) == 2
