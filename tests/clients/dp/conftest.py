"""Model zoo, slow definitions and noise detectors shared by the tests of the private step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from clients.dp.randomness import UnsafeSeededRandom


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(7)


@pytest.fixture
def seeded() -> Callable[[int], UnsafeSeededRandom]:
    return lambda number: UnsafeSeededRandom(bytes([number]) * 32)


@dataclass(frozen=True)
class NoiseAlarms:
    """What is wrong with releases that should be pure noise of a declared sigma, at 1e-6 a test."""

    chi_square: bool
    correlation: bool
    silence: bool

    @property
    def any(self) -> bool:
        return self.chi_square or self.correlation or self.silence


@pytest.fixture
def noise_alarms() -> Callable[[NDArray[np.int64], float], NoiseAlarms]:
    def judge(releases: NDArray[np.int64], sigma: float) -> NoiseAlarms:
        """releases: shape (steps, dimension)."""
        z = releases / sigma
        steps, dimension = z.shape
        low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], z.size)
        total = float((z**2).sum())
        gram = z @ z.T / np.sqrt(dimension)
        largest = np.abs(gram[np.triu_indices(steps, 1)]).max()
        pairs = steps * (steps - 1) / 2
        quietest = (z**2).sum(axis=1).min()
        return NoiseAlarms(
            chi_square=not low <= total <= high,
            correlation=bool(largest > stats.norm.isf(5e-7 / pairs)),
            silence=bool(quietest < stats.chi2.ppf(1e-6 / steps, dimension)),
        )

    return judge


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Codes(nn.Module):
    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5, padding_idx=padding)
        self.norm, self.mid, self.out = nn.LayerNorm(5), nn.Linear(5, 24), nn.Linear(24, 3)

    def forward(self, codes: Tensor) -> Tensor:
        return self.out(torch.relu(self.mid(self.norm(self.table(codes)))).mean(1))


class SiteIntercept(nn.Module):
    """The duck that `layers` knows by name: a row of `weight` for each site, added to the input."""

    def __init__(self, sites: int, outputs: int, site: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(sites, outputs))
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.weight.mean(0) if self.site is None else self.weight[self.site])


class Attention(nn.Module):
    """Single-head attention made of Linear layers, with a residual and a normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        score = self.query(h) @ self.key(h).mT / h.shape[-1] ** 0.5
        return x + torch.softmax(score, dim=-1) @ self.value(h)


class MeanOverTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 3)
    )


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 3)), nn.Identity()
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding="same", bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 40, 2, stride=2, dilation=1),
        nn.Flatten(),
        nn.Linear(160, 3),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 6)),
        nn.Conv1d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv1d(4, 3, 2, dilation=2),
        nn.Flatten(),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 6, 6)), nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )


def transformer() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (4, 8)), Attention(8), Attention(8), MeanOverTokens(), nn.Linear(8, 3)
    )


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(6, 3), (6,), False),
    "mlp": (mlp, (6,), False),
    "nested": (nested, (6,), False),
    "cnn": (cnn, (64,), False),
    "conv1d": (conv1d, (12,), False),
    "grouped convolution (hooks)": (grouped, (72,), False),
    "a layer used twice": (Twice, (6,), False),
    "embedding, layer norm": (Codes, (9,), True),
    "embedding with padding": (lambda: Codes(0), (9,), True),
    "transformer of linears": (transformer, (32,), False),
    "site intercept": (lambda: nn.Sequential(nn.Linear(6, 3), SiteIntercept(4, 3, 2)), (6,), False),
    "site intercept, no site": (
        lambda: nn.Sequential(nn.Linear(6, 3), SiteIntercept(4, 3, None)),
        (6,),
        False,
    ),
}


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor


@pytest.fixture(params=list(ZOO))
def case_of(request, rng) -> Callable[[torch.dtype], Case]:
    """Build the named model with random weights, 23 rows and their classes, in a dtype."""

    def build(dtype: torch.dtype) -> Case:
        make, shape, codes = ZOO[request.param]
        model = make()
        with torch.no_grad():
            for value in model.parameters():
                value.copy_(torch.randn(value.shape, generator=rng) * 0.4)
        if codes:
            inputs = torch.randint(0, 7, (23, *shape), generator=rng)
        else:
            inputs = torch.randn((23, *shape), generator=rng).to(dtype)
        return Case(request.param, model.to(dtype), inputs, torch.randint(0, 3, (23,), generator=rng))

    return build


@pytest.fixture
def vmap_gradients() -> Callable[..., Tensor]:
    """Per-example gradients by torch.func, shape (B, dimension): shares no code with ours."""

    def compute(
        model: nn.Module, inputs: Tensor, targets: Tensor, row_loss: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        weights = {name: value.detach() for name, value in model.named_parameters()}

        def loss(weights, x, y):
            return row_loss(torch.func.functional_call(model, weights, (x[None],)), y[None])

        rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, inputs, targets)
        return torch.cat([value.flatten(1) for value in rows.values()], dim=1)

    return compute


@pytest.fixture
def clip_and_sum() -> Callable[[Tensor, float], Tensor]:
    def compute(rows: Tensor, max_grad_norm: float) -> Tensor:
        norms = rows.norm(dim=1).clamp(min=1e-300)
        return (rows * (max_grad_norm / norms).clamp(max=1)[:, None]).sum(0)

    return compute


@pytest.fixture
def zoo() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]]:
    return ZOO
