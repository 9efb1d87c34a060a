"""How well the default recipe predicts, at epsilon 1, 3, 8 and without privacy: docs/results/utility.md.

Every private figure comes from the code that runs at a site (`clients.dp`) and from the aggregation that
the verifier replays (`audit.replay`): clipped sums on the integer grid, discrete Gaussian noise of full
size at each site from the operating system's entropy, calibrated with the accountant. The log, the keys
and Flower are left out because they change no number. Nothing is selected on the test rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from audit.encoding import RowEncoder
from audit.models import initial_weights
from audit.replay import AggregationPlan, Aggregator, SiteUpdate, average
from clients.demo_data import features
from clients.dp.bookkeeping import ClippedGradient
from clients.dp.losses import Loss
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.accounting import calibrate_noise
from federation.families import logistic_regression
from federation.torch_models import build_model, set_weights

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
DELTA, ROUNDS, AVERAGE_LAST, GRID_BITS = 1e-5, 30, 15, 20

HEADER = """# Utility

`make results`, {date:%Y-%m-%d}. Means and standard deviations of {splits} splits.

Recipe R0: one linear layer, every row in every round, 30 rounds, clipping norm 1, learning rate 6 unless
said, the last 15 rounds averaged. The whole noise is added **at each site** (no secure aggregation), drawn
anew for every figure. Unit of privacy: one row. Neighbouring relation: add/remove. Delta 1e-5. Accountant:
PLD. Epsilon is each site's own, over the whole run. The number of rows of a site is a declared constant.
"""
FOOTER = """AUC of digits is one class against the rest, averaged over classes. Local-only models see one
site's rows and have no privacy at all: where they score as high, joining a private federation bought that
site protection from those who read the model, and not accuracy.
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One data set, encoded by declared bounds, and how its rows are dealt."""

    name: str
    inputs: Array  # shape (rows, inputs), each in [-1, 1]
    labels: Labels
    shares: tuple[float, ...]  # of the training rows, a site each
    test_share: float
    learning_rate: float
    note: str

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def outputs(self) -> int:
        return 1 if self.classes == 2 else self.classes


@dataclass(frozen=True, kw_only=True)
class Split:
    sites: list[NDArray[np.int64]]
    train: NDArray[np.int64]
    test: NDArray[np.int64]


def breast() -> Task:
    bunch = load_breast_cancer()
    declared = [
        {"name": f.name, "type": "number", "lower": f.lower, "upper": f.upper, "transform": "log"}
        for f in features()
    ]
    encoder = RowEncoder(declared)
    names = [feature.name for feature in features()]
    rows = [encoder.encode(dict(zip(names, map(float, values), strict=True))) for values in bunch.data]
    return Task(
        name="breast cancer, 4 sites",
        inputs=np.array(rows),
        labels=(bunch.target == 0).astype(np.int64),
        shares=(0.12, 0.20, 0.28, 0.40),
        test_share=0.2,
        learning_rate=6.0,
        note="569 rows, 30 features, declared bounds with declared log transform, sites of 12/20/28/40 %",
    )


def digits() -> Task:
    bunch = load_digits()
    return Task(
        name="digits, 10 sites",
        inputs=bunch.data / 8.0 - 1.0,
        labels=bunch.target.astype(np.int64),
        shares=(0.1,) * 10,
        test_share=0.2,
        learning_rate=6.0,
        note="1797 rows, 64 pixels with bounds 0 to 16, ten equal sites of about 144 rows",
    )


def credit() -> Task:
    rows: list[list[float]] = []
    for part in ("guest", "host_1", "host_2", "test"):
        with (DATA / f"default_credit_homo_{part}.csv").open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader)
            rows += [[float(value) for value in row[1:]] for row in reader]
    table = np.array(rows)
    label = header.index("y") - 1
    inputs = np.delete(table, label, axis=1)
    return Task(
        name="credit default, 3 sites",
        inputs=np.clip(inputs, -6.0, 6.0) / 6.0,
        labels=table[:, label].astype(np.int64),
        shares=(1 / 3,) * 3,
        test_share=0.2,
        learning_rate=12.0,
        note="30000 rows, 23 standardised features with bounds -6 to 6, 22 % positive, learning rate 12",
    )


def split(task: Task, seed: int) -> Split:
    """Deal rows to a stratified test set and to the sites; the seed deals and does nothing else."""
    order = np.random.default_rng(seed)
    test, train = [], []
    for label in range(task.classes):
        rows = order.permutation(np.flatnonzero(task.labels == label))
        cut = round(len(rows) * task.test_share)
        test.append(rows[:cut])
        train.append(rows[cut:])
    pool = order.permutation(np.concatenate(train))
    cuts = np.cumsum([round(share * len(pool)) for share in task.shares[:-1]])
    return Split(sites=np.split(pool, cuts), train=pool, test=np.concatenate(test))


def train(task: Task, rows: Sequence[NDArray[np.int64]], noise: float | None) -> Array:
    """Return averaged weights of a linear model; `noise` None means neither clipping nor noise."""
    layers = logistic_regression(task.inputs.shape[1], task.outputs)
    loss: Loss = "binary_cross_entropy" if task.outputs == 1 else "cross_entropy"
    model = build_model(layers)
    terms = MechanismTerms(
        max_grad_norm=1.0,
        noise_multiplier=noise or 1.0,
        sample_rate=1.0,
        relation="add_remove",
        grid_bits=GRID_BITS,
    )
    tensors = [(torch.from_numpy(task.inputs[r]), torch.from_numpy(task.labels[r])) for r in rows]
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
    mechanisms = [Mechanism(model, terms, loss) for _ in rows]
    gradient = ClippedGradient(model, 1e9, loss)
    weights = initial_weights(layers, "0" * 64)
    outputs: list[list[float]] = []
    aggregator = Aggregator(plan)
    for server_round in range(1, ROUNDS + 1):
        updates = []
        for site, (mechanism, (x, y)) in enumerate(zip(mechanisms, tensors, strict=True)):
            if noise is None:
                set_weights(model, weights)
                values = (gradient(x, y).double() * terms.scale).round().long().tolist()
            else:
                mechanism.load(np.array(weights))
                values = mechanism.release(x, y).update.tolist()
            updates.append(
                SiteUpdate(site=f"{site:02}", nominal_rows=len(y), weight=float(len(y)), values=values)
            )
        weights = aggregator.step(server_round, weights, updates)
        outputs.append(weights)
    return np.array(average(outputs[-AVERAGE_LAST:]))


def score_weights(task: Task, flat: Array, test: NDArray[np.int64]) -> tuple[float, float]:
    width = task.inputs.shape[1]
    matrix = flat[: task.outputs * width].reshape(task.outputs, width)
    return score(task, task.inputs[test] @ matrix.T + flat[task.outputs * width :], test)


def score(task: Task, logits: Array, test: NDArray[np.int64]) -> tuple[float, float]:
    """Return accuracy and AUC (one against the rest, mean over classes)."""
    labels = task.labels[test]
    if task.outputs == 1:
        return float(((logits[:, 0] > 0) == labels).mean()), float(roc_auc_score(labels, logits[:, 0]))
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances = exp / exp.sum(axis=1, keepdims=True)
    area = roc_auc_score(labels, chances, multi_class="ovr")
    return float((logits.argmax(axis=1) == labels).mean()), float(area)


def regression(task: Task, rows: NDArray[np.int64], test: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy and AUC of scikit-learn's logistic regression on these rows, without privacy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = LogisticRegression(C=10.0, max_iter=300).fit(task.inputs[rows], task.labels[rows])
    logits = fitted.decision_function(task.inputs[test])
    if task.outputs == 1:
        return score(task, logits.reshape(-1, 1), test)
    full = np.full((len(test), task.classes), -1e3)
    full[:, fitted.classes_] = logits
    return score(task, full, test)


def trivial(task: Task, test: NDArray[np.int64]) -> tuple[float, float]:
    return float(np.bincount(task.labels[test]).max() / len(test)), 0.5


def measure(task: Task, splits: int) -> list[tuple[str, list[tuple[float, float]]]]:
    dealt = [split(task, 1000 + seed) for seed in range(splits)]
    dimension = task.outputs * (task.inputs.shape[1] + 1)
    rows: list[tuple[str, Callable[[Split], tuple[float, float]]]] = [
        ("trivial baseline (majority class)", lambda s: trivial(task, s.test)),
        (
            "local only, not private (the smallest site)",
            lambda s: regression(task, min(s.sites, key=len), s.test),
        ),
        (
            "local only, not private (mean over sites)",
            lambda s: _mean([regression(task, site, s.test) for site in s.sites]),
        ),
    ]
    for epsilon in (1, 3, 8):
        noise = float(
            calibrate_noise(
                epsilon=epsilon, delta=DELTA, rounds=ROUNDS, dimension=dimension, grid_bits=GRID_BITS
            )
        )
        rows.append(
            (
                f"**Affidavit, epsilon {epsilon}** (noise multiplier {noise:g})",
                lambda s, z=noise: score_weights(task, train(task, s.sites, z), s.test),
            )
        )
    rows.append(
        ("same recipe, not private", lambda s: score_weights(task, train(task, s.sites, None), s.test))
    )
    rows.append(("centralised, not private", lambda s: regression(task, s.train, s.test)))
    found = []
    for name, run in rows:
        found.append((name, [run(each) for each in dealt]))
        accuracy, area = _mean(found[-1][1])
        print(f"{task.name}: {name}: accuracy {accuracy:.4f}, AUC {area:.4f}", flush=True)
    return found


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(p[0] for p in pairs), statistics.fmean(p[1] for p in pairs)


def _cell(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "utility.md")
    arguments = parser.parse_args()
    tasks = [breast(), digits()]
    if (DATA / "default_credit_homo_test.csv").exists():
        tasks.append(credit())
    else:
        print(f"credit default: skipped, {DATA.name}/ with the published files is not beside the project")
    lines = [HEADER.format(date=datetime.now(UTC), splits=arguments.splits)]
    for task in tasks:
        lines += [f"## {task.name}", "", task.note + ".", "", "| | accuracy | AUC |", "|---|---|---|"]
        for name, pairs in measure(task, arguments.splits):
            lines.append(f"| {name} | {_cell([p[0] for p in pairs])} | {_cell([p[1] for p in pairs])} |")
        lines.append("")
    lines.append(FOOTER)
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {arguments.out.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
