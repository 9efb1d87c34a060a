"""What leaves the mechanism: neighbours look alike outside it, and the noise is what was declared."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clients.dp.errors import GridOverflowError, ShapeError, TermsError, UnsupportedModelError
from clients.dp.mechanism import Mechanism, MechanismTerms, Release
from clients.dp.randomness import SecureRandom


def terms(**changes) -> MechanismTerms:
    return MechanismTerms(
        **{"max_grad_norm": 1.0, "noise_multiplier": 2.0, "sample_rate": 1.0, "relation": "add_remove"}
        | changes
    )


LOCAL = {"local_steps": 4, "local_learning_rate": 0.5, "normaliser": 10.0}


@pytest.fixture
def data(rng):
    return torch.randn(40, 6, generator=rng).double(), torch.randint(0, 3, (40,), generator=rng)


def small_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for number, value in enumerate(model.parameters()):
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(number)))
    return model


class Tape:
    """Everything that crossed the boundary, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, object]] = []

    def __call__(self, name: str, value: object) -> None:
        self.seen.append((name, value))

    def inside(self, name: str) -> list[np.ndarray]:
        return [value for key, value in self.seen if key == f"inside.{name}"]

    def outside(self) -> list[tuple[str, object]]:
        flat = []
        for name, value in self.seen:
            if name.startswith("inside."):
                flat.append((name, None))  # that it happened is visible (time), what it was is not
            elif isinstance(value, Release):
                fields = dataclasses.asdict(value)
                update = fields.pop("update")
                flat.append((name, (fields, update.shape, update.dtype)))
            else:
                flat.append((name, value.tolist() if isinstance(value, torch.Tensor) else value))
        return flat


def record(seeded, given_terms, inputs, targets) -> Tape:
    tape = Tape()
    Mechanism(small_model(), given_terms, "cross_entropy", random=seeded(9), recorder=tape).release(
        inputs, targets
    )
    return tape


def neighbours(inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    extra = torch.full((1, 6), 100.0).double()

    def with_row(row: torch.Tensor, label: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([inputs, row]), torch.cat([targets, torch.tensor([label])])

    return {
        "one row fewer": (inputs[:-1], targets[:-1]),
        "an outlier more": with_row(extra, 2),
        "a row of NaN more": with_row(extra * math.nan, 0),
        "an infinite row more": with_row(extra * math.inf, 0),
        "an overflowing row more": with_row(extra * 1e305, 0),
        "an unknown class more": with_row(extra, 17),
        "a duplicate more": with_row(inputs[:1], int(targets[0])),
    }


@pytest.mark.parametrize("rate", [1.0, 0.25])
@pytest.mark.parametrize("neighbour", list(neighbours(torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))))
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_neighbours_differ_only_inside_and_by_at_most_the_sensitivity(
    seeded, data, rate, neighbour, precision
):
    given = terms(sample_rate=rate, precision=precision, max_grad_norm=0.7)
    one = record(seeded, given, *data)
    other = record(seeded, given, *neighbours(*data)[neighbour])
    assert one.outside() == other.outside()
    assert np.array_equal(one.inside("noise")[0], other.inside("noise")[0])
    moved = np.linalg.norm((one.inside("sum")[0] - other.inside("sum")[0]).astype(float))
    assert moved <= terms(precision=precision).sensitivity_grid(83)


@pytest.mark.parametrize("row", [0, 17])
def test_replacing_a_row_moves_the_sum_within_its_own_sensitivity(seeded, data, row):
    inputs, targets = data
    changed, label = inputs.clone(), targets.clone()
    changed[row] *= -1000
    label[row] = (label[row] + 1) % 3
    given = terms(relation="replace_one", max_grad_norm=0.1)
    one, other = record(seeded, given, inputs, targets), record(seeded, given, changed, label)
    assert one.outside() == other.outside()
    moved = np.linalg.norm((one.inside("sum")[0] - other.inside("sum")[0]).astype(float))
    single = terms(max_grad_norm=0.1).sensitivity_grid(83)
    assert single < moved <= given.sensitivity_grid(83)


def test_a_person_with_several_rows_moves_the_sum_like_one(seeded, data):
    given = terms(rows_per_unit=3, max_grad_norm=0.1)
    inputs, targets = data
    person, labels = torch.full((3, 6), 50.0).double(), torch.tensor([2, 2, 2])
    one = record(seeded, given, inputs, targets)
    other = record(seeded, given, torch.cat([inputs, person]), torch.cat([targets, labels]))
    assert one.outside() == other.outside()
    moved = np.linalg.norm((one.inside("sum")[0] - other.inside("sum")[0]).astype(float))
    assert 0.99 * 2**24 < moved <= given.sensitivity_grid(83)


def test_the_sensitivity_test_can_fail(seeded, data):
    """Without clipping (a norm far above the gradients, accounted as a small one) the bound is broken."""
    loose = terms(max_grad_norm=1e6)
    one, other = (record(seeded, loose, *rows) for rows in (data, neighbours(*data)["an outlier more"]))
    moved = np.linalg.norm((one.inside("sum")[0] - other.inside("sum")[0]).astype(float)) * 1e6
    assert moved > terms(max_grad_norm=1.0).sensitivity_grid(83)


def test_local_steps_of_neighbours_differ_only_inside(seeded, data):
    inputs, targets = data
    malformed = inputs.clone()
    malformed[3] = math.nan
    given = terms(relation="zero_out", sample_rate=0.5, **LOCAL)
    one, other = record(seeded, given, inputs, targets), record(seeded, given, malformed, targets)
    assert one.outside() == other.outside()
    assert len(one.inside("sum")) == 4
    for mine, theirs in zip(one.inside("noise"), other.inside("noise"), strict=True):
        assert np.array_equal(mine, theirs)
    first = np.linalg.norm((one.inside("sum")[0] - other.inside("sum")[0]).astype(float))
    assert first <= given.sensitivity_grid(83)


def test_an_empty_site_releases_as_much_as_a_full_one(seeded, data):
    inputs, targets = data
    for given in (terms(), terms(sample_rate=0.1), terms(**LOCAL)):
        full, empty = record(seeded, given, *data), record(seeded, given, inputs[:0], targets[:0])
        assert full.outside() == empty.outside()


def test_the_event_follows_from_the_terms_alone(data):
    release = Mechanism(small_model(), terms(noise_multiplier=1.3), "cross_entropy").release(*data)
    assert release.sigma_grid / release.sensitivity_grid >= 1.3
    assert release.sigma_grid == math.ceil(1.3 * release.sensitivity_grid)
    assert (release.dimension, release.steps, release.sampling, release.grid_bits) == (83, 1, "full", 24)
    assert release.update.dtype == np.int64
    assert release.update.shape == (83,)


class Quieter(SecureRandom):
    """Draws noise five percent too small."""

    def discrete_gaussian(self, sigma, size):
        return super().discrete_gaussian(sigma * 0.95, size)


class Silent(SecureRandom):
    def discrete_gaussian(self, sigma, size):
        return np.zeros(size, dtype=np.int64)


class Repeating(SecureRandom):
    def __init__(self) -> None:
        super().__init__()
        self._first = None

    def discrete_gaussian(self, sigma, size):
        if self._first is None:
            self._first = super().discrete_gaussian(sigma, size)
        return self._first


class EverySecond(SecureRandom):
    def __init__(self) -> None:
        super().__init__()
        self._step = 0

    def discrete_gaussian(self, sigma, size):
        self._step += 1
        return super().discrete_gaussian(sigma, size) * (self._step % 2)


def broken(kind: type[SecureRandom]) -> SecureRandom:
    class Source(kind):
        def child(self, label):
            return kind()

    return Source()


def zero_gradient_job(random: SecureRandom | None, steps: int = 30) -> tuple[np.ndarray, int]:
    """Releases of a job whose rows are all malformed: an honest mechanism emits noise and nothing else."""
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    mechanism = Mechanism(model, terms(noise_multiplier=0.8, sample_rate=0.5), "cross_entropy", random=random)
    rows, labels = torch.full((20, 30), math.nan).double(), torch.zeros(20, dtype=torch.int64)
    return np.stack([mechanism.release(rows, labels).update for _ in range(steps)]), mechanism.sigma_grid


def test_a_job_without_gradients_emits_exactly_the_declared_noise(noise_alarms):
    releases, sigma = zero_gradient_job(None)
    assert not noise_alarms(releases, sigma).any


@pytest.mark.parametrize(
    ("kind", "alarm"),
    [(Quieter, "chi_square"), (Silent, "silence"), (Repeating, "correlation"), (EverySecond, "silence")],
)
def test_each_noise_fault_raises_its_alarm(noise_alarms, kind, alarm):
    releases, sigma = zero_gradient_job(broken(kind))
    assert getattr(noise_alarms(releases, sigma), alarm)


def test_local_steps_carry_the_noise_of_every_step(noise_alarms):
    """The delta of T steps without gradients is the scaled sum of T noises: variance T, no less."""
    model = nn.Linear(60, 40).double()
    given = terms(noise_multiplier=0.8, local_steps=5, local_learning_rate=2.0, normaliser=1.0)
    mechanism = Mechanism(model, given, "cross_entropy")
    rows, labels = torch.full((3, 60), math.nan).double(), torch.zeros(3, dtype=torch.int64)
    releases = np.stack([mechanism.release(rows, labels).update for _ in range(10)])
    assert not noise_alarms(releases, mechanism.sigma_grid * 2.0 * math.sqrt(5)).any


def test_two_sites_with_the_same_data_draw_different_noise(data):
    one, other = (Mechanism(small_model(), terms(), "cross_entropy").release(*data).update for _ in range(2))
    assert (one != other).mean() > 0.99


def test_the_same_site_never_draws_the_same_noise_twice(data):
    mechanism = Mechanism(small_model(), terms(), "cross_entropy")
    one, other = mechanism.release(*data).update, mechanism.release(*data).update
    assert (one != other).mean() > 0.99


def test_torch_seeds_choose_neither_rows_nor_noise(data, seeded):
    given = terms(sample_rate=0.3)
    free, tied = [], []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        free.append(Mechanism(small_model(), given, "cross_entropy").release(*data).update)
        torch.manual_seed(seed)
        tied.append(Mechanism(small_model(), given, "cross_entropy", random=seeded(3)).release(*data).update)
    assert (free[0] != free[1]).mean() > 0.99
    assert np.array_equal(tied[0], tied[1])
    assert np.array_equal(tied[0], tied[2])


def test_torch_generator_state_is_left_alone(data):
    model = small_model()
    before = torch.get_rng_state()
    Mechanism(model, terms(sample_rate=0.3), "cross_entropy").release(*data)
    assert torch.equal(before, torch.get_rng_state())


def test_the_release_is_the_clipped_sum_plus_noise_on_the_grid(data, seeded, vmap_gradients, clip_and_sum):
    tape = Tape()
    model = small_model()
    mechanism = Mechanism(model, terms(max_grad_norm=0.3), "cross_entropy", random=seeded(4), recorder=tape)
    update = mechanism.release(*data).update
    rows = vmap_gradients(model, *data, lambda z, y: nn.functional.cross_entropy(z, y))
    expected = clip_and_sum(rows, 0.3).numpy() * 2**24 / 0.3
    assert np.abs(tape.inside("sum")[0] - expected).max() <= 0.51
    assert np.array_equal(update, tape.inside("sum")[0] + tape.inside("noise")[0])


def test_the_delta_is_the_local_walk_on_the_grid(data, seeded):
    tape = Tape()
    mechanism = Mechanism(small_model(), terms(**LOCAL), "cross_entropy", random=seeded(4), recorder=tape)
    update = mechanism.release(*data).update
    noisy = [total + noise for total, noise in zip(tape.inside("sum"), tape.inside("noise"), strict=True)]
    expected = -0.5 / 10.0 * np.sum(noisy, axis=0, dtype=np.float64)
    assert np.abs(update - expected).max() <= 1


def test_local_steps_leave_the_base_where_it_was(data, seeded):
    mechanism = Mechanism(small_model(), terms(**LOCAL), "cross_entropy", random=seeded(4))
    before = mechanism._weights()
    mechanism.release(*data)
    assert torch.equal(before, mechanism._weights())


def test_loaded_weights_are_the_base(data, seeded):
    fresh = Mechanism(small_model(), terms(), "cross_entropy", random=seeded(4))
    zeros = torch.zeros(83, dtype=torch.float64)
    other = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    loaded = Mechanism(other, terms(), "cross_entropy", random=seeded(4))
    loaded.load(fresh._weights())
    assert np.array_equal(fresh.release(*data).update, loaded.release(*data).update)
    loaded.load(zeros.numpy())
    assert torch.equal(loaded._weights(), zeros)


@pytest.mark.parametrize("size", [0, 82, 84])
def test_weights_of_another_length_are_refused(size):
    with pytest.raises(ShapeError, match="weights"):
        Mechanism(small_model(), terms(), "cross_entropy").load(torch.zeros(size))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"relation": "friends"}, "relation"),
        ({"precision": "bfloat16"}, "precision"),
        ({"grid_bits": 0}, "grid_bits"),
        ({"rows_per_unit": 0}, "rows_per_unit"),
        ({"rows_per_unit": 2, "sample_rate": 0.5}, "rows_per_unit"),
        ({"local_steps": 0}, "local_steps"),
        ({"local_steps": 2}, "local_learning_rate"),
        ({"local_steps": 2, "local_learning_rate": 1.0}, "normaliser"),
        ({**LOCAL, "normaliser": 0.0}, "normaliser"),
    ],
)
def test_terms_out_of_range_are_refused_by_name(change, field):
    with pytest.raises(TermsError, match=field):
        terms(**change)


def test_a_grid_that_could_overflow_is_refused_before_any_row():
    with pytest.raises(GridOverflowError):
        Mechanism(small_model(), terms(grid_bits=38, noise_multiplier=0.01), "cross_entropy")
    with pytest.raises(TermsError, match="2\\*\\*32"):
        Mechanism(small_model(), terms(grid_bits=38, noise_multiplier=1.0), "cross_entropy")


def test_a_model_that_mixes_rows_is_refused_before_any_data():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    mechanism = Mechanism(nn.Sequential(Centred(), nn.Linear(6, 3)), terms(), "cross_entropy")
    with pytest.raises(UnsupportedModelError):
        mechanism.check((6,))
    Mechanism(small_model(), terms(), "cross_entropy").check((6,))


def test_double_inputs_serve_a_single_precision_mechanism(data):
    release = Mechanism(small_model(), terms(precision="float32"), "cross_entropy").release(*data)
    assert release.sensitivity_grid > 2**24 * (1 + 2**-8)


def prepared(data, count=3, **changes):
    """A mechanism that has released once, and `count` sites' rows."""
    tape = Tape()
    mechanism = Mechanism(small_model(), terms(**changes), "cross_entropy", recorder=tape)
    mechanism.release(*data)
    return mechanism, tape, [(data[0][i:].clone(), data[1][i:].clone()) for i in range(count)]


def test_a_prepared_release_is_of_its_own_rows_with_noise_of_its_own(data):
    mechanism, tape, sites = prepared(data, noise_multiplier=2.0)
    mechanism.prepare(sites)
    found = [mechanism.release(*rows) for rows in sites]
    sums, noises = tape.inside("sum")[1:], tape.inside("noise")[1:]
    assert len({noise.tobytes() for noise in noises}) == len(sites)
    for rows, release, total, noise in zip(sites, found, sums, noises, strict=True):
        np.testing.assert_array_equal(release.update, total + noise)
        assert np.abs(total - mechanism._to_grid(mechanism._gradient(*rows))).max() <= 1
    again = mechanism.release(*sites[0])  # what was prepared is used up
    assert not np.array_equal(again.update, found[0].update)
    assert len({tape.inside("noise")[-1].tobytes(), *(noise.tobytes() for noise in noises)}) == 4


def test_noise_that_was_prepared_is_what_was_declared(noise_alarms):
    model = nn.Linear(40, 5, bias=False).double()
    mechanism = Mechanism(model, terms(), "cross_entropy")
    sites = [(torch.zeros(4, 40).double(), torch.zeros(4, dtype=torch.int64)) for _ in range(30)]
    mechanism.release(*sites[0])
    mechanism.prepare(sites)
    assert len(mechanism._prepared) == len(sites)
    updates = np.stack([mechanism.release(*rows).update for rows in sites])
    assert not mechanism._prepared
    assert not noise_alarms(updates, mechanism.sigma_grid).any


def test_other_rows_or_weights_take_nothing_that_was_prepared(data):
    mechanism, tape, sites = prepared(data)
    mechanism.prepare(sites)
    held = [item.noise for item in mechanism._prepared.values()]
    mechanism.release(sites[0][0].clone(), sites[0][1])
    mechanism.release(sites[1][0], sites[1][1].clone())
    mechanism.load(mechanism._weights() + 1)
    mechanism.release(*sites[2])
    assert not {noise.tobytes() for noise in held} & {noise.tobytes() for noise in tape.inside("noise")}
    expected = mechanism._to_grid(mechanism._gradient(*sites[2]))
    np.testing.assert_array_equal(tape.inside("sum")[-1], expected)


@pytest.mark.parametrize("changes", [{"sample_rate": 0.5}, LOCAL])
def test_nothing_is_prepared_where_rows_are_sampled_or_steps_follow_each_other(data, changes):
    mechanism, _, sites = prepared(data, **changes)
    mechanism.prepare(sites)
    assert not mechanism._prepared


def test_a_copy_of_the_process_takes_nothing_that_was_prepared(data):
    mechanism, _, sites = prepared(data)
    mechanism.prepare(sites)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.write(writing, mechanism.release(*sites[0]).update.tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(reading, 1 << 16), dtype=np.int64)
    ours = mechanism.release(*sites[0]).update
    for descriptor in (reading, writing):
        os.close(descriptor)
    assert theirs.shape == ours.shape
    assert not np.array_equal(theirs, ours)
