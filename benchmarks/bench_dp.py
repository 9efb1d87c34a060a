"""What privacy costs a training step on one CPU thread, beside the usual ways, and what a whole site costs.

Every method is timed in the same run, in turns: in each round each method runs for about the same time, its
CPU time is divided by the non-private time of that round, and the table shows medians of those ratios. All
methods are float32 unless the row says otherwise; each takes one full step: gradients, clipping, noise and
update. For the comparison our first rows draw noise where the others do, from torch; the rows that say
"cryptographic" are what a site really runs.

    python benchmarks/bench_dp.py [--quick] [--output docs/results/dp_speed.md]
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from clients.dp.bookkeeping import ClippedGradient
from clients.dp.mechanism import Mechanism, MechanismTerms

NORM, NOISE, RATE = 1.0, 1.0, 1e-3
Step = Callable[[], object]


class Encoder(nn.Module):
    """One transformer layer whose attention is made of Linear layers, so that every method can read it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (self._split(layer(h)) for layer in (self.query, self.key, self.value))
        mixed = torch.softmax(q @ k.mT * (q.shape[-1] ** -0.5), dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TabularTransformer(nn.Module):
    """Every number becomes a token of width 32; two encoder layers; the mean token is classified."""

    def __init__(self, features: int = 16, width: int = 32) -> None:
        super().__init__()
        self.token, self.place = nn.Linear(1, width), nn.Embedding(features, width)
        self.layers = nn.Sequential(Encoder(width, 4), Encoder(width, 4))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1]).repeat(x.shape[0], 1)
        return self.head(self.layers(self.token(x.unsqueeze(-1)) + self.place(places)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


@dataclass(frozen=True)
class Workload:
    name: str
    make: Callable[[], nn.Module]
    row_shape: tuple[int, ...]
    classes: int
    batch: int


WORKLOADS = (
    Workload("MLP 30-64-64-2, batch 64", mlp, (30,), 2, 64),
    Workload("MLP 30-64-64-2, batch 256", mlp, (30,), 2, 256),
    Workload("MLP 30-64-64-2, batch 1024", mlp, (30,), 2, 1024),
    Workload("CNN on 8x8, batch 256", cnn, (1, 8, 8), 10, 256),
    Workload("tabular transformer, batch 256", TabularTransformer, (16,), 2, 256),
)


def build(workload: Workload, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return workload.make().to(dtype)


def rows_of(workload: Workload, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn((workload.batch, *workload.row_shape), generator=generator).to(dtype)
    return inputs, torch.randint(0, workload.classes, (workload.batch,), generator=generator)


def plain_step(workload: Workload) -> Step:
    model, (inputs, targets) = build(workload), rows_of(workload)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def opacus_hooks_step(workload: Workload) -> Step:
    model, (inputs, targets) = GradSampleModule(build(workload)), rows_of(workload)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        expected_batch_size=workload.batch,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def opacus_ghost_step(workload: Workload) -> Step:
    model = GradSampleModuleFastGradientClipping(build(workload), max_grad_norm=NORM, use_ghost_clipping=True)
    inputs, targets = rows_of(workload)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(model.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        expected_batch_size=workload.batch,
    )
    criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss(), loss_reduction="mean")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step


def vmap_sum(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the clipped sum by torch.func, the oracle of the exactness column."""
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    per_row = vmap(grad(loss), in_dims=(None, 0, 0))

    def total(inputs: Tensor, targets: Tensor) -> Tensor:
        rows = per_row(weights, inputs, targets)
        square_norms = torch.stack([value.flatten(1).square().sum(1) for value in rows.values()]).sum(0)
        factors = (NORM * square_norms.rsqrt()).clamp(max=1)
        return torch.cat([factors @ value.flatten(1) for value in rows.values()])

    return total


def update_step(
    model: nn.Module, total: Callable[[Tensor, Tensor], Tensor], rows: tuple[Tensor, Tensor]
) -> Step:
    """Return noise from torch and plain descent around a clipped sum."""
    parameters = [value.detach() for value in model.parameters()]
    batch = len(rows[0])

    def step() -> None:
        flat = total(*rows)
        flat.add_(torch.randn_like(flat), alpha=NOISE * NORM)
        start = 0
        for value in parameters:
            value.add_(flat[start : start + value.numel()].view(value.shape), alpha=-RATE / batch)
            start += value.numel()

    return step


def vmap_step(workload: Workload) -> Step:
    model = build(workload)
    return update_step(model, vmap_sum(model), rows_of(workload))


def our_step(workload: Workload, dtype: torch.dtype) -> Step:
    model = build(workload, dtype)
    return update_step(model, ClippedGradient(model, NORM, "cross_entropy"), rows_of(workload, dtype))


def our_release(workload: Workload, precision: str) -> Step:
    terms = MechanismTerms(
        max_grad_norm=NORM,
        noise_multiplier=NOISE,
        sample_rate=1.0,
        relation="add_remove",
        precision=precision,
    )
    dtype = torch.float32 if precision == "float32" else torch.float64
    mechanism = Mechanism(build(workload, dtype), terms, "cross_entropy")
    rows = rows_of(workload, dtype)
    return lambda: mechanism.release(*rows)


STEPS: dict[str, Callable[[Workload], Step]] = {
    "torch, no privacy": plain_step,
    "Opacus, hooks": opacus_hooks_step,
    "Opacus, ghost": opacus_ghost_step,
    "vmap(grad)": vmap_step,
    "ours": lambda workload: our_step(workload, torch.float32),
    "ours, float64": lambda workload: our_step(workload, torch.float64),
    "ours, grid and cryptographic noise": lambda workload: our_release(workload, "float32"),
    "ours, the same in float64": lambda workload: our_release(workload, "float64"),
}

SITE_ROWS, SITE_BATCH, SITE_STEPS = 142, 32, 200
SITE = Workload("site", mlp, (30,), 2, SITE_ROWS)


def plain_site() -> Step:
    model, (inputs, targets) = build(SITE), rows_of(SITE)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def run() -> None:
        for _ in range(SITE_STEPS):
            chosen = torch.randint(SITE_ROWS, (SITE_BATCH,))
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()

    return run


def opacus_site(mode: str) -> Step:
    model, (inputs, targets) = build(SITE), rows_of(SITE)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=SITE_BATCH
    )
    made = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        data_loader=loader,
        noise_multiplier=NOISE,
        max_grad_norm=NORM,
        grad_sample_mode=mode,
        criterion=nn.CrossEntropyLoss(),
    )
    private, optimizer, *criterion, batches = made
    score = criterion[0] if criterion else functional.cross_entropy

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches

    def run() -> None:
        source = endless()
        for _ in range(SITE_STEPS):
            some, labels = next(source)
            optimizer.zero_grad(set_to_none=True)
            score(private(some), labels).backward()
            optimizer.step()

    return run


def our_site(precision: str) -> Step:
    terms = MechanismTerms(
        max_grad_norm=NORM,
        noise_multiplier=NOISE,
        sample_rate=SITE_BATCH / SITE_ROWS,
        relation="add_remove",
        precision=precision,
        local_steps=SITE_STEPS,
        local_learning_rate=RATE,
        normaliser=SITE_BATCH,
    )
    dtype = torch.float32 if precision == "float32" else torch.float64
    mechanism = Mechanism(build(SITE, dtype), terms, "cross_entropy")
    rows = rows_of(SITE, dtype)
    return lambda: mechanism.release(*rows)


SITES: dict[str, Callable[[], Step]] = {
    "torch, no privacy, random batches": plain_site,
    "Opacus, hooks": lambda: opacus_site("hooks"),
    "Opacus, ghost": lambda: opacus_site("ghost"),
    "ours: Poisson, grid, cryptographic sampling and noise": lambda: our_site("float32"),
    "ours, the same in float64 (the default)": lambda: our_site("float64"),
}


@dataclass(frozen=True)
class Timing:
    milliseconds: float
    ratio: float


def interleave(steps: dict[str, Step], *, slice_s: float, rounds: int) -> dict[str, Timing]:
    """Time the steps in turns, each for about `slice_s` of CPU time a round; the first is the unit."""
    repeats = {}
    for name, step in steps.items():
        step()
        started = time.process_time()
        step()
        step()
        repeats[name] = max(1, round(slice_s / max((time.process_time() - started) / 2, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.process_time()
            for _ in range(repeats[name]):
                step()
            taken[name].append((time.process_time() - started) / repeats[name] * 1e3)
    unit = taken[next(iter(steps))]
    return {
        name: Timing(
            statistics.median(times), statistics.median(t / u for t, u in zip(times, unit, strict=True))
        )
        for name, times in taken.items()
    }


def exactness(workload: Workload) -> float:
    """Return the relative L2 error of our float32 sum against vmap's float64 one, at the same weights."""
    model = build(workload)
    inputs, targets = rows_of(workload)
    found = ClippedGradient(model, NORM, "cross_entropy")(inputs, targets).double()
    expected = vmap_sum(model.double())(inputs.double(), targets)
    return float((found - expected).norm() / expected.norm())


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


HEADER = """\
Written by `make bench-dp` on {date}: one thread of a shared {machine} CPU, Python {python}, {libraries}.
CPU time in milliseconds a step; in brackets the median of the per-round ratios to non-private torch. All
methods take turns in one run; float32 unless the row says otherwise."""

NOTE = """\
The first six rows take their noise from torch's generator, so that like is compared with like; a site never
does: the two cryptographic rows are what it runs. Opacus's data loader is timed only in the next table.
float64 is the default of a charter: it doubles the arithmetic, and convolutions have no fast path for it."""


def report(steps: dict[str, dict[str, Timing]], errors: dict[str, float], site: dict[str, Timing]) -> str:
    names = [workload.name for workload in WORKLOADS]
    rows = [
        (
            method,
            *(f"{steps[name][method].milliseconds:.3g} ({steps[name][method].ratio:.2f})" for name in names),
        )
        for method in STEPS
    ]
    rows.append(("error of ours against vmap", *(f"{errors[name]:.1e}" for name in names)))
    hooks = {name: steps[name]["Opacus, hooks"].ratio for name in names}
    gains = {name: hooks[name] / steps[name]["ours"].ratio for name in names}
    rows.append(("Opacus hooks / ours", *(f"{gain:.1f}x" for gain in gains.values())))
    whole = [(name, f"{timing.milliseconds:.1f}", f"{timing.ratio:.2f}") for name, timing in site.items()]
    slow = max(steps[name]["ours"].ratio for name in names)
    ours = site["ours: Poisson, grid, cryptographic sampling and noise"].ratio
    aims = [
        ("a step, at most 1.5 times no privacy", f"worst {slow:.2f}", "met" if slow <= 1.5 else "missed"),
        ("a whole site, at most 2.6 times", f"{ours:.2f}", "met" if ours <= 2.6 else "missed"),
        (
            "at least 5 times faster than Opacus hooks",
            f"{min(gains.values()):.1f} to {max(gains.values()):.1f}",
            _gain_verdict(hooks, gains),
        ),
        (
            "exact to 1e-5 against vmap",
            f"worst {max(errors.values()):.1e}",
            "met" if max(errors.values()) <= 1e-5 else "missed",
        ),
    ]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "opacus", "numpy", "cryptography"))
    parts = [
        "# Speed of the private step",
        HEADER.format(
            date=datetime.date.today().isoformat(),
            machine=platform.machine(),
            python=platform.python_version(),
            libraries=libraries,
        ),
        "## One step",
        table(("method", *names), rows),
        NOTE,
        f"## A whole site: MLP, {SITE_ROWS} rows, {SITE_STEPS} steps, {SITE_BATCH} rows a step expected",
        table(("method", "ms", "ratio"), whole),
        "## Aims",
        table(("aim", "found", ""), aims),
    ]
    return "\n\n".join(parts) + "\n"


def _gain_verdict(hooks: dict[str, float], gains: dict[str, float]) -> str:
    missed = []
    for name, gain in gains.items():
        if gain < 5:
            reason = f", where hooks cost {hooks[name]:.1f} times no privacy" if hooks[name] < 5 else ""
            missed.append(f"{name}: {gain:.1f}x{reason}")
    return "met" if not missed else f"missed on {len(missed)} of {len(gains)} ({'; '.join(missed)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--output", type=Path, default=Path("docs/results/dp_speed.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # opacus and torch warn about hooks on every step
    slice_s, rounds = (0.02, 3) if arguments.quick else (0.06, 15)
    steps, errors = {}, {}
    for workload in WORKLOADS:
        errors[workload.name] = exactness(workload)
        steps[workload.name] = interleave(
            {name: make(workload) for name, make in STEPS.items()}, slice_s=slice_s, rounds=rounds
        )
    site = interleave(
        {name: make() for name, make in SITES.items()}, slice_s=0.01, rounds=3 if arguments.quick else 11
    )
    text = report(steps, errors, site)
    print(text)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)


if __name__ == "__main__":
    main()
