"""The page of `make bench-federation`, from the figures that its parts left."""

from __future__ import annotations

from typing import Any, Final

SITES: Final = 100
ROWS: Final = 40  # at each


def aim(value: float, least: float) -> str:
    return "met" if value >= least else "missed"


def page(figures: dict[str, Any]) -> str:
    where = figures["where"]
    lines = [
        "# What a federation's round costs",
        "",
        f"Made by `make bench-federation` on {where['date']}: {where['machine']}, Python {where['python']},",
        f"load average {where['load']}.",
        "Each part's rows were timed in one sitting; medians of the rounds after the first. CPU-seconds are",
        "of every process that belongs to the row, between two rounds' ends. On a machine that others load",
        "too (see the load average) CPU-seconds compare better than seconds.",
        "",
    ]
    if "network" in figures:
        ours, plain = figures["network"]["ours"], figures["network"]["plain"]
        ratio, work = plain["wall"] / ours["wall"], plain["cpu"] / ours["cpu"]
        lines += [
            "## A DP round over four real SuperNodes",
            "",
            "| | s a round | CPU-s a round |",
            "|---|---|---|",
            (
                "| ours: TLS, authentication, agents, ledgers, statements, witnesses "
                f"| {ours['wall']} | {ours['cpu']} |"
            ),
            f"| plain Flower and Opacus at their defaults, no TLS | {plain['wall']} | {plain['cpu']} |",
            f"| ratio | {ratio:.1f} (aim 4: {aim(ratio, 4)}) | {work:.1f} |",
            "",
        ]
    if "simulate" in figures:
        found = figures["simulate"]
        ours, ray, idle, loop = (found[name] for name in ("ours", "ray", "ray_idle", "loop"))
        same, bare = ray["wall"] / ours["wall"], idle["wall"] / ours["wall"]
        lines += [
            f"## {SITES} virtual sites, {ours['parameters']:,} parameters, {ROWS} rows each",
            "",
            "| | s a round | CPU-s a round | ours is faster by |",
            "|---|---|---|---|",
            f"| ours: statements, odometers, log and witnesses on | {ours['wall']} | {ours['cpu']} | |",
            (
                f"| Flower's Ray simulation, Opacus's step at each site | {ray['wall']} | {ray['cpu']} | "
                f"{same:.1f} (aim 8: {aim(same, 8)}) |"
            ),
            (
                f"| Flower's Ray simulation, clients that only answer | {idle['wall']} | {idle['cpu']} | "
                f"{bare:.2f} (aim 8: {aim(bare, 8)}) |"
            ),
            (
                f"| a plain loop of Opacus's step | {loop['wall']} | {loop['cpu']} | "
                f"{loop['wall'] / ours['wall']:.1f} |"
            ),
            "",
        ]
    if "thousand" in figures:
        ours = figures["thousand"]["ours"]
        rate = 60 / ours["wall"]
        lines += [
            "## 1,000 virtual sites",
            "",
            (
                f"{rate:.1f} rounds a minute (aim 3: {aim(rate, 3)}), {ours['cpu']} CPU-s a round, "
                f"{ours['setup']} s before the first round, peak {ours['peak_mib']} MiB, "
                f"{ours['parameters']:,} parameters, everything on."
            ),
            "",
        ]
    if "memory" in figures:
        cells = figures["memory"]
        lines += [
            "## Memory against the number of rounds (5 virtual sites)",
            "",
            "| rounds | peak MiB |",
            "|---|---|",
            *[f"| {rounds} | {cells[rounds]} |" for rounds in ("10", "100", "300")],
            "",
        ]
    if "large" in figures:
        lines += [
            "## Large models (2 virtual sites, one at a time)",
            "",
            "| parameters | s a round | CPU-s a round | peak MiB |",
            "|---|---|---|---|",
            *[
                f"| {row['parameters']:,} | {row['wall']} | {row['cpu']} | {row['peak_mib']} |"
                for row in figures["large"].values()
            ],
            "",
        ]
    return "\n".join(lines)
