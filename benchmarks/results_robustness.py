"""What lying sites do to a model, with and without each defence: docs/results/robustness.md.

Ten sites train as `results_utility` does: the code that runs at a site, whole noise at each site, the rules
that the verifier replays. The first f sites lie:

sign flip   the noised update times -1
scaling     a flipped update, as long as the charter's norm bound lets it be
too long    a flipped update times 1000
label flip  rows trained with the class K - 1 - y; the mechanism is honest
backdoor    half of the rows carry a mark (two inputs at their upper bound) and one class, the positive one
            of two or the first of several; the update is stretched to the norm bound

`success` of a backdoor is the share of marked test rows of other classes that the model calls that class.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from results_utility import (
    AVERAGE_LAST,
    DATA,
    DELTA,
    GRID_BITS,
    ROOT,
    ROUNDS,
    Array,
    Split,
    Task,
    breast,
    credit,
    digits,
    score_weights,
    split,
)

from audit.anomaly import SiteFacts, examine
from audit.models import initial_weights
from audit.robust import AggregationRule
from audit.update_bounds import UpdateTerms, is_too_long
from clients.dp.losses import Loss
from clients.dp.mechanism import Mechanism, MechanismTerms
from federation.accounting import calibrate_noise
from federation.families import logistic_regression
from federation.robust_rules import combine, left_to_right
from federation.torch_models import build_model

SITES = 10
ATTACKS = ("sign flip", "scaling", "too long", "label flip", "backdoor")
DEFENCES = ("mean", "mean, norm bound", "krum", "multi_krum", "median", "trimmed_mean")
MARK = 2  # inputs that a backdoor sets to their upper bound

HEADER = """# Robustness

`make results`, {date:%Y-%m-%d}. Means and standard deviations of {seeds} splits; ten equal sites, f lie.

Recipe R0 as in [utility](utility.md), the whole noise at each site, so a rule sees each site's **noised**
update. Every rule but the plain mean has the norm bound on. `multi_krum` averages 10 - f updates, and
`byzantine: f` is set to the true number of liars. Attacks are described in
`benchmarks/results_robustness.py`; they know the bound and the round's model, not the other sites' updates.
Nothing was tuned on these splits.
"""
FOOTER = """## What the officer sees

How often a site is marked as standing apart (`audit.anomaly`), over all rounds of the runs under a mean with
the norm bound, f = 2.

| data | attack | liars marked | honest sites marked |
|---|---|---|---|
{marks}

{reading}"""
READING = ROOT / "benchmarks" / "robustness_reading.md"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One task at one epsilon."""

    task: Task
    epsilon: float
    noise: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    accuracy: float
    area: float
    success: float
    liars_marked: float
    honest_marked: float


def rule_of(defence: str, liars: int) -> AggregationRule:
    name = defence.split(",")[0]
    keep = {"krum": 1, "multi_krum": SITES - liars}.get(name, 0)
    return AggregationRule(
        name=name, byzantine=0 if name == "mean" else liars, keep=keep, norm_bound=defence != "mean"
    )


def marked(inputs: Array) -> Array:
    """Return the rows with the backdoor's mark."""
    found = inputs.copy()
    found[:, :MARK] = 1.0
    return found


def run(setting: Setting, dealt: Split, attack: str, defence: str, liars: int) -> Outcome:
    task = setting.task
    layers = logistic_regression(task.inputs.shape[1], task.outputs)
    loss: Loss = "binary_cross_entropy" if task.outputs == 1 else "cross_entropy"
    model = build_model(layers)
    terms = MechanismTerms(
        max_grad_norm=1.0,
        noise_multiplier=setting.noise,
        sample_rate=1.0,
        relation="add_remove",
        grid_bits=GRID_BITS,
    )
    lies = liars if attack != "none" else 0
    mechanisms, rows, bounds = [], [], []
    for place, chosen in enumerate(dealt.sites):
        mechanisms.append(Mechanism(model, terms, loss))
        inputs, labels = task.inputs[chosen], task.labels[chosen]
        if place < lies and attack == "label flip":
            labels = task.classes - 1 - labels
        if place < lies and attack == "backdoor":
            half = len(chosen) // 2
            inputs = np.concatenate([marked(inputs[:half]), inputs[half:]])
            labels = np.concatenate([np.full(half, target(task)), labels[half:]])
        rows.append((torch.from_numpy(inputs), torch.from_numpy(labels)))
        bounds.append(
            UpdateTerms(
                nominal_rows=len(chosen),
                sample_rate=Fraction(1),
                rows_per_unit=1,
                grid_bits=GRID_BITS,
                precision="float64",
                sigma_grid=mechanisms[-1].sigma_grid,
                dimension=mechanisms[-1].dimension,
                released=mechanisms[-1].dimension,
                local_steps=1,
                local_learning_rate=Fraction(1, 10),
            )
        )
    rule = rule_of(defence, liars)
    weights = np.array(initial_weights(layers, "0" * 64))
    outputs: list[Array] = []
    liars_marked = honest_marked = 0
    for server_round in range(1, ROUNDS + 1):
        updates: list[NDArray[np.int64]] = []
        for place, (mechanism, (x, y), bound) in enumerate(zip(mechanisms, rows, bounds, strict=True)):
            mechanism.load(weights)
            values = mechanism.release(x, y).update
            updates.append(told(values, attack, bound) if place < lies else values)
        kept = [
            k for k in range(SITES) if not (rule.norm_bound and is_too_long(bounds[k], updates[k].tolist()))
        ]
        vectors = [updates[k] / (terms.scale * bounds[k].nominal_rows) for k in kept]
        fitted = replace(rule, keep=min(rule.keep, max(1, len(kept) - liars))) if rule.keep > 1 else rule
        d = combine(fitted, vectors, [float(bounds[k].nominal_rows) for k in kept])
        weights = weights - task.learning_rate * d
        outputs.append(weights)
        apart = view(server_round, updates, bounds, terms.scale)
        liars_marked += sum(int(site) < lies for site in apart)
        honest_marked += sum(int(site) >= lies for site in apart)
    final = np.mean(outputs[-AVERAGE_LAST:], axis=0)
    accuracy, area = score_weights(task, final, dealt.test)
    return Outcome(
        accuracy=accuracy,
        area=area,
        success=backdoor_success(task, final, dealt.test),
        liars_marked=liars_marked / (ROUNDS * max(1, lies)),
        honest_marked=honest_marked / (ROUNDS * (SITES - lies)),
    )


def told(values: NDArray[np.int64], attack: str, bound: UpdateTerms) -> NDArray[np.int64]:
    """Return what a liar sends in place of its honest release."""
    if attack in ("scaling", "backdoor"):
        longest = 0.999 * bound.norm_bound / float(np.linalg.norm(values.astype(np.float64)))
        return np.rint((longest if attack == "backdoor" else -longest) * values).astype(np.int64)
    return {"sign flip": -1, "too long": -1000}.get(attack, 1) * values


def view(
    server_round: int, updates: Sequence[NDArray[np.int64]], bounds: Sequence[UpdateTerms], scale: float
) -> list[str]:
    divisors = [scale * bound.nominal_rows for bound in bounds]
    facts = [
        SiteFacts(site=str(k), bound=bound.norm_bound / divisor, noise=bound.noise_std / divisor)
        for k, (bound, divisor) in enumerate(zip(bounds, divisors, strict=True))
    ]
    vectors = [values / divisor for values, divisor in zip(updates, divisors, strict=True)]
    document = examine(server_round, facts, vectors, len(vectors[0]), lambda a, b: left_to_right(a * b))
    found: list[str] = document["apart"]
    return found


def backdoor_success(task: Task, flat: Array, test: NDArray[np.int64]) -> float:
    others = test[task.labels[test] != target(task)]
    width = task.inputs.shape[1]
    matrix = flat[: task.outputs * width].reshape(task.outputs, width)
    logits = marked(task.inputs[others]) @ matrix.T + flat[task.outputs * width :]
    called = logits.argmax(axis=1) if task.outputs > 1 else (logits[:, 0] > 0).astype(np.int64)
    return float((called == target(task)).mean())


def target(task: Task) -> int:
    """Return the class that a backdoor is to give: positive of two, the first of several."""
    return 1 if task.outputs == 1 else 0


def settings(names: Sequence[str]) -> list[Setting]:
    found = []
    makers = {"digits": (digits, 8.0), "breast": (breast, 8.0), "credit": (credit, 1.0)}
    for name in names:
        maker, epsilon = makers[name]
        if name == "credit" and not (DATA / "default_credit_homo_test.csv").exists():
            print(f"credit default: skipped, {DATA.name}/ with the published files is not beside the project")
            continue
        task = maker()
        title = f"{task.name.split(',')[0]}, epsilon {epsilon:g}"
        task = replace(task, shares=(1 / SITES,) * SITES, name=title)
        dimension = task.outputs * (task.inputs.shape[1] + 1)
        noise = calibrate_noise(
            epsilon=epsilon, delta=DELTA, rounds=ROUNDS, dimension=dimension, grid_bits=GRID_BITS
        )
        found.append(Setting(task=task, epsilon=epsilon, noise=float(noise)))
    return found


def cell(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {spread:.3f}"


def table(setting: Setting, splits: Sequence[Split]) -> tuple[list[str], list[str]]:
    """Return the lines of one task's tables, and of the officer's."""
    lines, marks = [], []
    task = setting.task
    score = "area" if task.name.startswith("credit") else "accuracy"
    calm = {defence: [run(setting, each, "none", defence, 2) for each in splits] for defence in DEFENCES}
    lines += [f"## {task.name}: {'AUC' if score == 'area' else 'accuracy'}", ""]
    lines += [f"About {len(splits[0].sites[0])} rows a site; noise multiplier {setting.noise:g}.", ""]
    lines += ["| attack | f | " + " | ".join(DEFENCES) + " |", "|---|---" + "|---" * len(DEFENCES) + "|"]
    lines.append(
        "| none | 0 | " + " | ".join(cell([getattr(o, score) for o in calm[d]]) for d in DEFENCES) + " |"
    )
    backdoor = ["| none | 0 | " + " | ".join(cell([o.success for o in calm[d]]) for d in DEFENCES) + " |"]
    for attack in ATTACKS:
        for liars in (1, 2):
            outcomes = {d: [run(setting, each, attack, d, liars) for each in splits] for d in DEFENCES}
            cells = " | ".join(cell([getattr(o, score) for o in outcomes[d]]) for d in DEFENCES)
            lines.append(f"| {attack} | {liars} | {cells} |")
            print(f"{task.name}: {lines[-1]}", flush=True)
            if attack == "backdoor":
                cells = " | ".join(cell([o.success for o in outcomes[d]]) for d in DEFENCES)
                backdoor.append(f"| backdoor | {liars} | {cells} |")
            if liars == 2:
                seen = outcomes["mean, norm bound"]
                marks.append(
                    f"| {task.name} | {attack} | {statistics.fmean(o.liars_marked for o in seen):.2f} | "
                    f"{statistics.fmean(o.honest_marked for o in seen):.3f} |"
                )
    lines += ["", "Success of the backdoor (and of its mark, without one):", ""]
    lines += ["| attack | f | " + " | ".join(DEFENCES) + " |", "|---|---" + "|---" * len(DEFENCES) + "|"]
    return [*lines, *backdoor, ""], marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=["digits", "breast", "credit"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "robustness.md")
    arguments = parser.parse_args()
    lines, marks = [HEADER.format(date=datetime.now(UTC), seeds=arguments.seeds)], []
    for setting in settings(arguments.tasks):
        splits = [split(setting.task, 3000 + seed) for seed in range(arguments.seeds)]
        found, seen = table(setting, splits)
        lines += found
        marks += seen
    lines.append(FOOTER.format(reading=READING.read_text(encoding="utf-8"), marks="\n".join(marks)))
    arguments.out.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
