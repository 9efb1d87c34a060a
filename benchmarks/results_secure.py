"""How well the default recipe predicts where sites share the noise: docs/results/secure_utility.md.

As `results_utility.py`, and beside it: the same splits, the same recipe, the mechanism that runs at a site,
calibrated by the accountant. The sites draw shares of the noise for t = 1 and their releases are added up in
whole numbers before anything else sees them. Masks are left out because they cancel exactly, which
`tests/clients/test_masked_rounds.py` shows on the real protocol, as it does that its sum is the sum of what
the same mechanism releases.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from results_utility import (
    AVERAGE_LAST,
    DELTA,
    GRID_BITS,
    ROOT,
    ROUNDS,
    Array,
    Split,
    Task,
    breast,
    digits,
    score_weights,
    split,
)
from results_utility import (
    _cell as cell,
)
from results_utility import (
    train as train_alone,
)

from audit.models import initial_weights
from audit.replay import AggregationPlan, Aggregator, SiteUpdate, average
from clients.dp.losses import Loss
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.accounting import calibrate_noise
from federation.families import logistic_regression
from federation.torch_models import build_model

TOLERATED = 1
ORIENTATIONS = 8

HEADER = """# Utility with secure aggregation

`make results`, {date:%Y-%m-%d}. Means and standard deviations of {splits} splits.

Recipe R0 of [utility.md](utility.md) on the same splits, with `secure_aggregation: {{tolerated: 1}}`: each of
k sites draws 1/sqrt(k - 1) of the noise, and only the sum of a round's updates is read. Every epsilon holds
against the coordinator and all who read the model, while k - 1 of the sites in a round are honest: with all
of them there, one may collude; with one gone, none may. Unit of privacy: one row. Neighbouring relation:
add/remove. Delta 1e-5. "One site gone" leaves another random site out of every round.

"Alone" is the same epsilon with the whole noise at each site, as in [utility.md](utility.md).
"""
FEATURES = """Oriented gradients are a fixed formula of one row and no data: differences of neighbouring
pixels, their length dealt to the two nearest of 8 directions, summed in cells of 2 by 2 pixels, each block of
2 by 2 cells divided by its length. The 128 numbers stand beside the 64 pixels, a quarter as long, as declared
features with bounds -1 to 1; the quarter was chosen on other splits than these.
"""


def oriented_gradients() -> Task:
    """The digits with fixed features beside the pixels."""
    plain = digits()
    images = ((plain.inputs + 1.0) / 2.0).reshape(-1, 8, 8)
    features = np.concatenate([plain.inputs / 4.0, gradient_features(images)], axis=1)
    return replace(
        plain,
        name="digits with fixed oriented-gradient features, 10 sites",
        inputs=features,
        note="1797 rows, 64 pixels and 128 fixed features, ten equal sites of about 144 rows",
    )


def gradient_features(images: Array) -> Array:
    """Return 128 oriented-gradient features of each 8 by 8 image, each within [0, 1]; a formula, no data."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    across = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    length = np.hypot(across, down)
    turn = (np.arctan2(down, across) / (2 * np.pi) * ORIENTATIONS) % ORIENTATIONS
    low = np.floor(turn).astype(np.int64) % ORIENTATIONS
    part = turn - np.floor(turn)
    bins = np.zeros((*images.shape, ORIENTATIONS))
    np.put_along_axis(bins, low[..., None], (length * (1 - part))[..., None], axis=-1)
    high = (low + 1) % ORIENTATIONS
    bins += (
        np.take_along_axis(np.eye(ORIENTATIONS), high.reshape(-1, 1), axis=0).reshape(bins.shape)
        * (length * part)[..., None]
    )
    cells = bins.reshape(-1, 4, 2, 4, 2, ORIENTATIONS).sum(axis=(2, 4))
    blocks = cells.reshape(-1, 2, 2, 2, 2, ORIENTATIONS).transpose(0, 1, 3, 2, 4, 5)
    norm = np.sqrt((blocks**2).sum(axis=(3, 4, 5), keepdims=True)) + 0.1
    flat: Array = (blocks / norm).reshape(len(images), -1)
    return flat


def train_shared(task: Task, dealt: Split, noise: float, *, gone: bool = False) -> Array:
    """Return averaged weights where the sites share the noise and the sum alone is used."""
    layers = logistic_regression(task.inputs.shape[1], task.outputs)
    loss: Loss = "binary_cross_entropy" if task.outputs == 1 else "cross_entropy"
    sites = len(dealt.sites)
    terms = MechanismTerms(
        max_grad_norm=1.0,
        noise_multiplier=noise,
        sample_rate=1.0,
        relation="add_remove",
        grid_bits=GRID_BITS,
        sharers=sites - TOLERATED,
        summed_sites=sites,
    )
    plan = AggregationPlan(
        strategy="fedavg",
        is_gradient=True,
        learning_rate=task.learning_rate,
        beta1=0.9,
        beta2=0.99,
        tau=0.001,
        scale=terms.scale,
        sample_rate=1.0,
        average_last=AVERAGE_LAST,
    )
    mechanism = Mechanism(build_model(layers), terms, loss)  # fresh noise in every release
    tensors = [(torch.from_numpy(task.inputs[r]), torch.from_numpy(task.labels[r])) for r in dealt.sites]
    weights, outputs = initial_weights(layers, "0" * 64), []
    aggregator, absent = Aggregator(plan), np.random.default_rng()
    for server_round in range(1, ROUNDS + 1):
        left_out = int(absent.integers(sites)) if gone else -1
        total, rows = np.zeros(len(weights), dtype=np.int64), 0
        mechanism.load(np.array(weights))
        for site, (x, y) in enumerate(tensors):
            if site != left_out:
                total += mechanism.release(x, y).update
                rows += len(y)
        update = SiteUpdate(site="sum", nominal_rows=rows, weight=float(rows), values=total.tolist())
        weights = aggregator.step(server_round, weights, [update])
        outputs.append(weights)
    return np.array(average(outputs[-AVERAGE_LAST:]))


def measure(task: Task, splits: int) -> list[str]:
    dealt = [split(task, 1000 + seed) for seed in range(splits)]
    dimension = task.outputs * (task.inputs.shape[1] + 1)
    lines = ["| | accuracy | AUC |", "|---|---|---|"]
    for epsilon in (1, 3, 8):
        noise = float(
            calibrate_noise(
                epsilon=epsilon, delta=DELTA, rounds=ROUNDS, dimension=dimension, grid_bits=GRID_BITS
            )
        )
        ways = {
            f"**shared noise, epsilon {epsilon}** (noise multiplier {noise:g})": lambda s, z=noise: (
                train_shared(task, s, z)
            ),
            f"alone, epsilon {epsilon}": lambda s, z=noise: train_alone(task, s.sites, z),
        }
        if epsilon == 1:
            ways["shared noise, epsilon 1, one site gone"] = lambda s, z=noise: train_shared(
                task, s, z, gone=True
            )
        for name, way in ways.items():
            scores = [score_weights(task, way(each), each.test) for each in dealt]
            lines.append(f"| {name} | {cell([a for a, _ in scores])} | {cell([b for _, b in scores])} |")
            print(f"{task.name}: {lines[-1]}", flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "secure_utility.md")
    arguments = parser.parse_args()
    lines = [HEADER.format(date=datetime.now(UTC), splits=arguments.splits)]
    for task in (breast(), digits(), oriented_gradients()):
        lines += [f"## {task.name}", "", task.note + ".", "", *measure(task, arguments.splits), ""]
    lines.append(FEATURES)
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {arguments.out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
