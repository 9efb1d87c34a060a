"""The mechanism: everything that leaves a site's rows passes through `Mechanism.release`.

One step: coins choose the rows, `ClippedGradient` sums their clipped gradients, the sum goes to the integer
grid, a discrete Gaussian is added. With local_steps = 1 these integers are the release. With more, each noisy
sum moves a local copy of the weights and the difference of the weights, on the same grid, is the release: a
function of the noisy sums, so it costs nothing more. The count of rows decides how many coins are tossed and
nothing else; rates, norms, steps, normaliser and noise are constants of the charter.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audit.shared_noise import share_grid, site_sensitivity_grid
from clients.dp.bookkeeping import ClippedGradient
from clients.dp.errors import ShapeError, TermsError
from clients.dp.grid import (
    Precision,
    Relation,
    check_clip,
    float_below,
    sensitivity_grid,
    sigma_grid,
    sum_limit,
)
from clients.dp.losses import Loss
from clients.dp.randomness import SecureRandom
from clients.dp.sampling import Sampling, sample_rows, sampling_of

Recorder = Callable[[str, object], None]

_MOST_AHEAD = 1 << 21  # numbers of noise that are kept for releases to come: 16 MiB
_DTYPES: dict[Precision, torch.dtype] = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class MechanismTerms:
    """The charter's constants of a release; none of them may depend on data."""

    max_grad_norm: float | Decimal  # C, gradient units
    noise_multiplier: float | Decimal | Fraction  # noise parameter / sensitivity, dimensionless
    sample_rate: float | Decimal  # probability that a row takes part in a step; 1 = every row
    relation: Relation
    grid_bits: int = 24  # C maps to 2**grid_bits grid units
    precision: Precision = "float64"
    local_steps: int = 1
    local_learning_rate: float | Decimal | None = None  # required when local_steps > 1
    normaliser: float | Decimal | None = None  # nominal rows * sample_rate; required when local_steps > 1
    proximal: float | Decimal = 0  # FedProx's mu: each local step is also drawn back towards the base model
    rows_per_unit: int = 1  # rows one person may have; each is clipped to C / rows_per_unit, a person to C
    sharers: int = 0  # how many sites' noise together makes sigma_grid; 0: this site's alone does
    summed_sites: int = 1  # how many sites' releases are added up in 64 bits
    max_update_norm: float | Decimal | None = None  # what the whole sum is clipped to, in gradient units

    def __post_init__(self) -> None:
        sampling_of(self.sample_rate)
        if not (self.max_grad_norm > 0 and math.isfinite(self.max_grad_norm)):
            raise TermsError("max_grad_norm", self.max_grad_norm, "give a positive number")
        if self.precision not in _DTYPES:
            raise TermsError("precision", self.precision, "give float64 or float32")
        if self.rows_per_unit < 1 or (self.rows_per_unit > 1 and self.sample_rate != 1):
            raise TermsError(
                "rows_per_unit",
                self.rows_per_unit,
                "give 1, or any count with sample_rate 1: coins are a row's own",
            )
        check_clip(self.max_grad_norm, rows_per_unit=self.rows_per_unit, precision=self.precision)
        if not 1 <= self.local_steps <= 100_000:
            raise TermsError("local_steps", self.local_steps, "give a whole number from 1 to 100000")
        if self.local_steps > 1:
            for field in ("local_learning_rate", "normaliser"):
                value = getattr(self, field)
                if value is None or not (value > 0 and math.isfinite(value)):
                    raise TermsError(field, value, "give a positive number when local_steps is above 1")
        pull = float(self.proximal) * float(self.local_learning_rate or 1)
        if not 0 <= pull <= 1:
            raise TermsError("proximal", self.proximal, "give 0 to 1 / local_learning_rate")
        if self.sharers < 0 or (self.sharers and self.local_steps > 1):
            raise TermsError("sharers", self.sharers, "give 0, or a count with local_steps 1")
        if self.max_update_norm is not None and not (
            self.max_update_norm > 0 and math.isfinite(self.max_update_norm) and self.local_steps == 1
        ):
            raise TermsError("max_update_norm", self.max_update_norm, "give a positive number, in one step")
        self.sigma_grid(1)

    @property
    def scale(self) -> float:
        """Grid units in one gradient unit."""
        return float(2**self.grid_bits) / float(self.max_grad_norm)

    def sensitivity_grid(self, dimension: int) -> int:
        """Return the bound, in grid units, on what one neighbouring change can move a step's sum."""
        return sensitivity_grid(
            grid_bits=self.grid_bits, dimension=dimension, relation=self.relation, precision=self.precision
        )

    def sigma_grid(self, dimension: int) -> int:
        """Return the noise parameter in grid units of one step for a model of this many parameters."""
        return sigma_grid(
            noise_multiplier=self.noise_multiplier, sensitivity=self.sensitivity_grid(dimension)
        )

    def share_grid(self, dimension: int) -> int:
        """Return the noise parameter of what this site draws itself: sigma_grid where it does not share."""
        sigma = self.sigma_grid(dimension)
        return share_grid(sigma, self.sharers) if self.sharers else sigma

    def site_sensitivity_grid(self, dimension: int) -> int:
        """Return the bound, in grid units, on the length of the whole sum; 0 where there is none."""
        if self.max_update_norm is None:
            return 0
        return site_sensitivity_grid(
            grid_bits=self.grid_bits,
            max_grad_norm=Decimal(str(self.max_grad_norm)),
            max_update_norm=Decimal(str(self.max_update_norm)),
            dimension=dimension,
            precision=self.precision,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What leaves the mechanism: the update and the whole numbers an accountant needs."""

    update: NDArray[np.int64]  # shape (dimension,), grid units
    sampling: Sampling
    sample_rate: float | Decimal
    steps: int
    sigma_grid: int
    sensitivity_grid: int
    dimension: int
    grid_bits: int
    max_grad_norm: float | Decimal
    relation: Relation
    share_grid: int
    site_sensitivity_grid: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What one release to come is made of; used once, by the process that drew the noise."""

    process: int
    inputs: Tensor
    targets: Tensor
    total: Tensor
    noise: NDArray[np.int64]


class Mechanism:
    """Noised releases of one model at one site.

    Args:
        model: the base model; copied, then set to each round's weights by `load`.
        terms: the charter's constants.
        loss: which loss the rows are scored by.
        random: the source of coins and noise; a fresh secure one by default.
        recorder: called with (name, value) for every quantity that enters or leaves. Names that begin with
            `inside.` never leave the site; all others are released or follow from the charter.

    Raises:
        TermsError, GridOverflowError, UnsupportedModelError: terms and model do not fit; data play no part.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: MechanismTerms,
        loss: Loss,
        *,
        random: SecureRandom | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.terms = terms
        self._dtype = _DTYPES[terms.precision]
        self._model = copy.deepcopy(model).to(self._dtype)
        row_norm = float(terms.max_grad_norm) / terms.rows_per_unit
        self._gradient = ClippedGradient(self._model, row_norm, loss)
        self._parameters = [value for value in self._model.parameters() if value.requires_grad]
        self.dimension = self._gradient.dimension
        self.sensitivity_grid = terms.sensitivity_grid(self.dimension)
        self.sigma_grid = terms.sigma_grid(self.dimension)
        self.share_grid = terms.share_grid(self.dimension)
        self.site_sensitivity_grid = terms.site_sensitivity_grid(self.dimension)
        self._limit = sum_limit(
            grid_bits=terms.grid_bits, sigma=self.share_grid, steps=1, sites=terms.summed_sites
        )
        random = SecureRandom() if random is None else random
        self._coins, self._noise = random.child("coins"), random.child("noise")
        self._recorder = recorder
        self._prepared: dict[int, _Prepared] = {}
        self._ahead: list[NDArray[np.int64]] = []  # noise for `prepare`, of the process `_ahead_in`
        self._ahead_in = 0
        self._prepares = False

    def load(self, weights: Tensor | NDArray[np.float64]) -> None:
        """Set the base model from a flat vector in `parameters()` order.

        Raises:
            ShapeError: it has another length than the model's trainable parameters.
        """
        flat = torch.as_tensor(weights).to(self._dtype)
        if flat.shape != (self.dimension,):
            raise ShapeError("weights", tuple(flat.shape), (self.dimension,))
        self._prepared.clear()
        self._set(flat)

    def prepare(self, sets: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Make the sums of clipped gradients of several releases from the loaded weights in one pass.

        `release` of the very same two tensors then takes its sum from here, once, with noise of its own that
        was drawn for it under a new key. Where rows are sampled, or stepped more than once, or the model or
        the rows do not allow it, nothing is prepared. A copy of this process takes nothing of it.
        """
        self._prepared.clear()
        if self.terms.sample_rate != 1 or self.terms.local_steps != 1:
            return
        converted = [(inputs.to(self._dtype), targets) for inputs, targets in sets]
        for (inputs, targets), total in zip(sets, self._gradient.of_many(converted), strict=True):
            if total is not None:
                self._prepares = True
                noise = self._fresh_noise()
                self._prepared[id(inputs)] = _Prepared(os.getpid(), inputs, targets, total, noise)

    def draw_ahead(self, releases: int) -> bool:
        """Draw the noise of one more release to come; say whether fewer than `releases` have theirs then.

        For a process that has nothing else to do: noise depends on no weights and no rows. Each is drawn
        under a new key, is taken by one release that `prepare` makes, and by no copy of this process.
        """
        wanted = min(releases, _MOST_AHEAD // max(1, self.dimension)) if self._prepares else 0
        if self._ahead_in != os.getpid():
            self._ahead, self._ahead_in = [], os.getpid()
        if len(self._ahead) < wanted:
            self._ahead.append(self._draw())
        return len(self._ahead) < wanted

    def _fresh_noise(self) -> NDArray[np.int64]:
        """Return noise that nobody has taken, drawn before by this process or now."""
        return self._ahead.pop() if self._ahead and self._ahead_in == os.getpid() else self._draw()

    def _draw(self) -> NDArray[np.int64]:
        self._noise.refresh()
        return self._noise.discrete_gaussian(self.share_grid, self.dimension)

    def check(self, row_shape: tuple[int, ...]) -> None:
        """Refuse a model that cannot be trained privately, before there is any data; or `release` does.

        Raises:
            UnsupportedModelError: see `bookkeeping`.
        """
        self._gradient.check(torch.empty((0, *row_shape), dtype=self._dtype))

    def release(self, inputs: Tensor, targets: Tensor) -> Release:
        """Return one noised release over these rows from the loaded weights; it always has its full cost.

        Args:
            inputs: shape (rows, ...); rows that cannot be used (NaN, unknown code) contribute zero. No
                rows is fine.
            targets: one for each row.

        Raises:
            ShapeError: shapes do not fit the model or each other.
            UnsupportedModelError: first call, see `bookkeeping`; data play no part.
        """
        terms = self.terms
        prepared = self._take_prepared(inputs, targets)
        if terms.sample_rate != 1:  # else no coin is tossed
            self._coins.refresh()
        if prepared is None:
            self._noise.refresh()
        inputs = inputs.to(self._dtype) if inputs.is_floating_point() else inputs
        self._record("terms", terms)
        self._record("row_shape", tuple(inputs.shape[1:]))
        if self._recorder is not None:
            self._record("base", self._weights())
        if terms.local_steps == 1:
            if prepared is None:
                update = self._noised(self._sum(inputs, targets))
            else:
                update = self._noised(prepared.total, prepared.noise)
        else:
            update = self._local_steps(inputs, targets, self._weights())
        release = Release(
            update=update,
            sampling=sampling_of(terms.sample_rate),
            sample_rate=terms.sample_rate,
            steps=terms.local_steps,
            sigma_grid=self.sigma_grid,
            sensitivity_grid=self.sensitivity_grid,
            dimension=self.dimension,
            grid_bits=terms.grid_bits,
            max_grad_norm=terms.max_grad_norm,
            relation=terms.relation,
            share_grid=self.share_grid,
            site_sensitivity_grid=self.site_sensitivity_grid,
        )
        self._record("release", release)
        return release

    def _take_prepared(self, inputs: Tensor, targets: Tensor) -> _Prepared | None:
        found = self._prepared.pop(id(inputs), None)
        is_of_these = found is not None and found.inputs is inputs and found.targets is targets
        return found if found is not None and is_of_these and found.process == os.getpid() else None

    def _sum(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return what `_bounded` bounds and noise then hides: the chosen rows' clipped gradients, summed."""
        chosen = sample_rows(self._coins, rows=len(inputs), sample_rate=self.terms.sample_rate)
        if chosen is not None:
            index = torch.from_numpy(chosen)
            inputs, targets = inputs[index], targets[index]
        return self._gradient(inputs, targets)

    def _noised(self, gradients: Tensor, noise: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        total = self._to_grid(self._bounded(gradients))
        self._record("inside.sum", total)
        if noise is None:
            noise = self._noise.discrete_gaussian(self.share_grid, self.dimension)
        self._record("inside.noise", noise)
        return total + noise

    def _local_steps(self, inputs: Tensor, targets: Tensor, base: Tensor) -> NDArray[np.int64]:
        terms = self.terms
        rate, normaliser = terms.local_learning_rate, terms.normaliser
        if rate is None or normaliser is None:
            raise TermsError(
                "local_learning_rate", rate, "give it and normaliser when local_steps is above 1"
            )
        factor = float(rate) / (float(normaliser) * terms.scale)
        pull = float(rate) * float(terms.proximal)
        weights = base.clone()
        try:
            for _ in range(terms.local_steps):
                noisy = torch.from_numpy(self._noised(self._sum(inputs, targets)))
                moved = factor * noisy.to(torch.float64)
                # the pull is a function of earlier noisy sums and of the base model: it reads no row
                weights -= moved + pull * (weights - base) if pull else moved
                self._set(weights)
        finally:
            self._set(base)
        return self._to_grid(weights - base)

    def _bounded(self, total: Tensor) -> Tensor:
        """Return the sum drawn back into the ball of max_update_norm.

        That is the nearest point of a convex set, so it brings neighbouring sums no further apart.
        """
        bound = self.terms.max_update_norm
        if bound is None:
            return total
        values = total.to(torch.float64)
        norm = float(torch.linalg.vector_norm(values))
        return values if norm <= float(bound) else values * (float(bound) / norm)

    def _to_grid(self, values: Tensor) -> NDArray[np.int64]:
        """Return values * scale, rounded to whole numbers and held within what int64 takes with noise."""
        scaled = values.to(torch.float64).numpy() * self.terms.scale
        np.rint(scaled, out=scaled)
        limit = float_below(self._limit)
        np.clip(scaled, -limit, limit, out=scaled)
        return scaled.astype(np.int64)

    def _weights(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([value.flatten() for value in self._parameters]).to(torch.float64)

    def _set(self, flat: Tensor) -> None:
        with torch.no_grad():
            start = 0
            for value in self._parameters:
                value.copy_(flat[start : start + value.numel()].view(value.shape))
                start += value.numel()

    def _record(self, name: str, value: object) -> None:
        if self._recorder is not None:
            self._recorder(name, value)
