"""How well a model predicts where the unit of privacy is a whole site: docs/results/site_unit_utility.md.

The mechanism that runs at a site (`clients.dp.site_update`), calibrated by the accountant; releases are added
up in whole numbers, as masks do, and aggregated as the verifier replays it. Bound and steps were chosen on
splits 0 to 2, the figures are of others.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from results_utility import ROOT, Array, Task, digits, score_weights
from results_utility import _cell as cell

from audit.models import initial_weights
from audit.replay import AggregationPlan, Aggregator, SiteUpdate, average
from clients.dp.mechanism import MechanismTerms
from clients.dp.site_update import LocalTraining, SiteMechanism
from federation.accounting import calibrate_noise
from federation.families import logistic_regression
from federation.torch_models import build_model

DELTA, ROUNDS, AVERAGE_LAST, GRID_BITS, TOLERATED = 1e-3, 12, 6, 20, 1
BOUND, TRAINING = 1.0, LocalTraining(steps=5, learning_rate=1.0)
SITES = (5, 10, 30, 100)

HEADER = """# Utility where a whole site is the unit

`benchmarks/results_site_unit.py`, {date:%Y-%m-%d}. Means and standard deviations of {splits} splits.

Digits: 1797 rows, a fifth of them for testing, the rest dealt evenly to the sites; a linear layer of
{dimension} parameters. Twelve rounds, five local steps at rate 1 without clipping or noise of rows, each
site's whole update clipped to 1, the mean of the last six rounds. `secure_aggregation: {{tolerated: 1}}`:
the sites share the noise. Unit: **one site**. Neighbouring relation: replace one. q = 1. Delta 1e-3. A row
has its site's protection and none of its own. "Noise" is its length on a round's mean, in lengths of the
longest update, as `affidavit charter check` prints it.

| sites | epsilon | noise multiplier | noise | accuracy | AUC |
|---|---|---|---|---|---|
"""
FOOTER = """
All sites are dealt from one set and are alike, in one process, without log and keys, which change no number.
With five or ten sites little is learnt at any epsilon worth the name: there `unit: row` with `site_level`
beside it is what serves. `charter check` warns where the noise is more than 3 times the longest update.
"""


def deal(task: Task, sites: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(task.labels))
    cut = len(order) // 5
    return np.array_split(order[cut:], sites), order[:cut]


def train(task: Task, dealt: list[np.ndarray], noise: float, *, silent: bool = False) -> Array:
    """Return averaged weights; `silent` leaves the noise out, which is NOT PRIVATE."""
    layers = logistic_regression(task.inputs.shape[1], task.outputs)
    terms = MechanismTerms(
        max_grad_norm=BOUND,
        noise_multiplier=noise,
        sample_rate=1.0,
        relation="replace_one",
        grid_bits=GRID_BITS,
        sharers=len(dealt) - TOLERATED,
        summed_sites=len(dealt),
    )
    plan = AggregationPlan(
        strategy="fedavg",
        is_gradient=False,
        learning_rate=1.0,
        beta1=0.9,
        beta2=0.99,
        tau=0.001,
        scale=terms.scale,
        sample_rate=1.0,
        average_last=AVERAGE_LAST,
        by_site=True,
    )
    kept: dict[str, object] = {}
    mechanism = SiteMechanism(
        build_model(layers), terms, "cross_entropy", TRAINING, recorder=kept.__setitem__
    )
    tensors = [(torch.from_numpy(task.inputs[r]), torch.from_numpy(task.labels[r])) for r in dealt]
    weights, outputs, aggregator = initial_weights(layers, "0" * 64), [], Aggregator(plan)
    for server_round in range(1, ROUNDS + 1):
        mechanism.load(np.array(weights))
        total = np.zeros(len(weights), dtype=np.int64)
        for x, y in tensors:
            release = mechanism.release(x, y)
            total += kept["inside.sum"] if silent else release.update
        update = SiteUpdate(site="sum", nominal_rows=len(dealt), weight=1.0, values=total.tolist())
        weights = aggregator.step(server_round, weights, [update])
        outputs.append(weights)
    return np.array(average(outputs[-AVERAGE_LAST:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--first", type=int, default=1000, help="seed of the first split")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "site_unit_utility.md")
    arguments = parser.parse_args()
    task = digits()
    dimension = task.outputs * (task.inputs.shape[1] + 1)
    seeds = range(arguments.first, arguments.first + arguments.splits)
    lines = []
    for sites in SITES:
        for epsilon in (3, 8, None):
            noise = 1.0
            if epsilon is not None:
                noise = float(
                    calibrate_noise(
                        epsilon=epsilon, delta=DELTA, rounds=ROUNDS, relation="replace_one",
                        dimension=dimension, grid_bits=GRID_BITS,
                    )
                )  # fmt: skip
            scores = []
            for seed in seeds:
                dealt, test = deal(task, sites, seed)
                scores.append(score_weights(task, train(task, dealt, noise, silent=epsilon is None), test))
            length = 2 * noise * np.sqrt(dimension * sites / (sites - TOLERATED)) / sites
            shown = f"{epsilon} | {noise:g} | {length:.1f}"
            if epsilon is None:
                shown = "none (NOT PRIVATE) | - | 0"
            accuracy, area = cell([a for a, _ in scores]), cell([b for _, b in scores])
            lines.append(f"| {sites} | {shown} | {accuracy} | {area} |")
            print(lines[-1], flush=True)
    header = HEADER.format(date=datetime.now(UTC), splits=arguments.splits, dimension=dimension)
    arguments.out.write_text(header + "\n".join(lines) + "\n" + FOOTER, encoding="utf-8")


if __name__ == "__main__":
    main()
