"""What each hospital gains where hospitals differ: docs/results/personal.md.

Sites differ on purpose. Every private figure comes from the code that runs at a site; each site is judged on
held-out rows of its own. `local only` is a site's logistic regression on its own rows, without privacy, for
it publishes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from results_utility import DELTA, GRID_BITS, ROOT, Array, Task, breast, digits

from audit.layers import shared_spans
from clients.dp.losses import Loss
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.accounting import calibrate_noise
from federation.families import logistic_regression
from federation.torch_models import build_model

READING = ROOT / "benchmarks" / "personal_reading.md"

HEADER = """# What each hospital gains

`make results`, {date:%Y-%m-%d}. Means and standard deviations of {seeds} seeds. Each site is judged on
held-out rows of its own population. The whole noise is added at each site; delta 1e-5, one row,
add/remove, PLD.

Methods: `global` is recipe R0 (30 rounds, one step, learning rate 6). `intercept` adds one for each site,
`shared` in the model or `local` (a layer that stays at the site, step 6). `5 steps` are 12 rounds of five
local steps of learning rate 2, averaged; `FedProx` pulls them back with mu 0.1, `SCAFFOLD` corrects them by
control variates made from the released updates; `FedAdam` and `FedYogi` are one step a round with the
server's learning rate 0.1. `local only` is a logistic regression on a site's own rows, not private.
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    name: str
    rounds: int = 30
    steps: int = 1
    rate: float = 2.0  # of local steps
    server: str = "fedavg"
    server_rate: float = 6.0
    proximal: float = 0.0
    scaffold: bool = False
    intercept: str = ""  # "", "shared" or "local"


METHODS = (
    Method(name="global"),
    Method(name="global, shared intercept", intercept="shared"),
    Method(name="global, local intercept", intercept="local"),
    Method(name="5 steps", rounds=12, steps=5, server_rate=1.0),
    Method(name="5 steps, FedProx", rounds=12, steps=5, server_rate=1.0, proximal=0.1),
    Method(name="5 steps, SCAFFOLD", rounds=12, steps=5, server_rate=1.0, scaffold=True),
    Method(name="FedAdam", server="fedadam", server_rate=0.1),
    Method(name="FedYogi", server="fedyogi", server_rate=0.1),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """One task, dealt to sites that differ."""

    task: Task  # inputs as each row's own site sees them
    train: list[NDArray[np.int64]]
    test: list[NDArray[np.int64]]


def breast_hospitals(seed: int) -> World:
    """Four hospitals: other shares of ill patients, and devices with an offset of their own."""
    order, task = np.random.default_rng(seed), breast()
    ill = order.permutation(np.flatnonzero(task.labels == 1))
    well = order.permutation(np.flatnonzero(task.labels == 0))
    sizes, shares = (80, 110, 150, 180), (0.15, 0.30, 0.45, 0.55)
    inputs, train, test = task.inputs.copy(), [], []
    for size, share in zip(sizes, shares, strict=True):
        sick = min(round(size * share), len(ill))
        rows = order.permutation(np.concatenate([ill[:sick], well[: size - sick]]))
        ill, well = ill[sick:], well[size - sick :]
        inputs[rows] = np.clip(inputs[rows] + order.uniform(-0.25, 0.25, size=inputs.shape[1]), -1, 1)
        cut = round(len(rows) * 0.3)
        test.append(rows[:cut])
        train.append(rows[cut:])
    return World(task=replace(task, inputs=inputs), train=train, test=test)


def digit_writers(seed: int) -> World:
    """Six sites that each see mostly some of the digits: Dirichlet(0.5) shares of every class."""
    order, task = np.random.default_rng(seed), digits()
    sites: list[list[int]] = [[] for _ in range(6)]
    for label in range(10):
        rows = order.permutation(np.flatnonzero(task.labels == label))
        cuts = np.cumsum(order.dirichlet([0.5] * 6))[:-1] * len(rows)
        for site, part in zip(sites, np.split(rows, cuts.astype(int)), strict=True):
            site.extend(part.tolist())
    train, test = [], []
    for given in sites:
        mixed = order.permutation(np.array(given, dtype=np.int64))
        cut = max(10, round(len(mixed) * 0.3))
        test.append(mixed[:cut])
        train.append(mixed[cut:])
    return World(task=task, train=train, test=test)


def train(world: World, method: Method, noise: float | None) -> list[Array]:
    """Return each site's own model, flat; `noise` None leaves it out (and the clipping stays)."""
    task, count = world.task, len(world.train)
    layers = logistic_regression(task.inputs.shape[1], task.outputs, sites=count if method.intercept else 0)
    spans = shared_spans(layers, [1]) if method.intercept == "local" else shared_spans(layers, [])
    shared = np.concatenate([np.arange(start, stop) for start, stop in spans])
    loss: Loss = "binary_cross_entropy" if task.outputs == 1 else "cross_entropy"
    terms = MechanismTerms(
        max_grad_norm=1.0,
        noise_multiplier=noise or 1e-4,
        sample_rate=1.0,
        relation="add_remove",
        grid_bits=GRID_BITS,
    )
    mechanisms = [
        Mechanism(build_model(layers, site=place if method.intercept else None), terms, loss)
        for place in range(count)
    ]
    size = mechanisms[0].dimension
    data = [(torch.from_numpy(task.inputs[r]), torch.from_numpy(task.labels[r])) for r in world.train]
    total = sum(len(r) for r in world.train)
    weights, kept = np.zeros(size), np.zeros((count, size))
    m, v = np.zeros(size), np.zeros(size)
    c, c_of = np.zeros(size), np.zeros((count, size))
    outputs, locals_ = [], []
    for server_round in range(1, method.rounds + 1):
        d = np.zeros(size)
        for place, (mechanism, (x, y)) in enumerate(zip(mechanisms, data, strict=True)):
            base = kept[place].copy()
            base[shared] = weights[shared]
            theta = base.copy()
            for _ in range(method.steps):
                mechanism.load(theta)
                gradient = mechanism.release(x, y).update / (terms.scale * len(y))
                if method.scaffold:
                    gradient = gradient + c - c_of[place]
                rate = method.rate if method.steps > 1 else method.server_rate
                theta = theta - rate * (gradient + method.proximal * (theta - base))
            if method.scaffold:
                c_of[place] += (base - theta) / (method.steps * method.rate) - c
            kept[place] = theta
            moved = theta - base if method.steps > 1 else (theta - base) / method.server_rate
            d[shared] += len(y) / total * moved[shared]
        c = c_of.mean(axis=0)
        weights, m, v = server_step(method, server_round, weights, d, m, v)
        outputs.append(weights)
        locals_.append(kept.copy())
    half = method.rounds // 2
    final, own = np.mean(outputs[-half:], axis=0), np.mean(locals_[-half:], axis=0)
    models = []
    for place in range(count):
        flat = own[place].copy()
        flat[shared] = final[shared]
        models.append(flat)
    return models


def server_step(
    method: Method, number: int, weights: Array, d: Array, m: Array, v: Array
) -> tuple[Array, Array, Array]:
    if method.server == "fedavg":
        return weights + method.server_rate * d, m, v
    m = 0.9 * m + 0.1 * d
    if method.server == "fedadam":
        v = 0.99 * v + 0.01 * d * d
        eta = method.server_rate * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
    else:
        v = v - 0.01 * d * d * np.sign(v - d * d)
        eta = method.server_rate
    return weights + eta * m / (np.sqrt(v) + 0.001), m, v


def accuracy(world: World, method: Method, place: int, flat: Array) -> float:
    task, rows = world.task, world.test[place]
    width, outputs = task.inputs.shape[1], task.outputs
    logits = task.inputs[rows] @ flat[: outputs * width].reshape(outputs, width).T
    logits = logits + flat[outputs * width : outputs * (width + 1)]
    if method.intercept:
        logits = logits + flat[outputs * (width + 1) :].reshape(-1, outputs)[place]
    called = logits.argmax(axis=1) if outputs > 1 else (logits[:, 0] > 0).astype(np.int64)
    return float((called == task.labels[rows]).mean())


def cell(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def section(title: str, maker: object, epsilon: float, seeds: int) -> list[str]:
    assert callable(maker)
    worlds: list[World] = [maker(4000 + seed) for seed in range(seeds)]
    task = worlds[0].task
    sites = range(len(worlds[0].train))
    local = [own(world) for world in worlds]
    rows: list[tuple[str, list[list[float]]]] = [("local only, not private", local)]
    for method in METHODS:
        dimension = task.outputs * (task.inputs.shape[1] + 1 + (len(sites) if method.intercept else 0))
        noise = calibrate_noise(
            epsilon=epsilon,
            delta=DELTA,
            rounds=method.rounds * method.steps,
            dimension=dimension,
            grid_bits=GRID_BITS,
        )
        found = []
        for world in worlds:
            models = train(world, method, float(noise))
            found.append([accuracy(world, method, s, models[s]) for s in sites])
        rows.append((f"{method.name}, epsilon {epsilon:g}", found))
        print(f"{title}: {method.name}: {statistics.fmean(map(statistics.fmean, found)):.4f}", flush=True)
    lines = [
        f"## {title}",
        "",
        "| | mean of sites | worst site | " + " | ".join(f"site {s + 1}" for s in sites),
    ]
    lines[-1] += " |"
    lines.append("|---" * (3 + len(sites)) + "|")
    for name, found in rows:
        means, worst = [statistics.fmean(one) for one in found], [min(one) for one in found]
        own_cells = " | ".join(f"{statistics.fmean(one[s] for one in found):.3f}" for s in sites)
        lines.append(f"| {name} | {cell(means)} | {cell(worst)} | {own_cells} |")
    return [*lines, ""]


def own(world: World) -> list[float]:
    """Return the accuracy of each hospital's regression on its own rows."""
    from sklearn.linear_model import LogisticRegression

    found = []
    for rows, test in zip(world.train, world.test, strict=True):
        fitted = LogisticRegression(C=10.0, max_iter=300)
        fitted.fit(world.task.inputs[rows], world.task.labels[rows])
        found.append(float(fitted.score(world.task.inputs[test], world.task.labels[test])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "personal.md")
    arguments = parser.parse_args()
    lines = [HEADER.format(date=datetime.now(UTC), seeds=arguments.seeds)]
    lines += section(
        "breast cancer, four unlike hospitals, epsilon 3", breast_hospitals, 3.0, arguments.seeds
    )
    lines += section("digits, six sites of unlike digits, epsilon 8", digit_writers, 8.0, arguments.seeds)
    lines.append(READING.read_text(encoding="utf-8"))
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
