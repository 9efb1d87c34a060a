"""The page of `make bench-federation`, from the figures that its parts left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

SITES: Final = 100
ROWS: Final = 40  # at each


def aim(value: float, least: float) -> str:
    return f"aim {least:g}: {'met' if value >= least else '**missed**'}"


def page(figures: dict[str, Any]) -> str:
    """Return the whole page; a part that was not run is named as missing."""
    lines = [
        "# What a federation's round costs",
        "",
        "Made by `make bench-federation`; one part alone by",
        "`benchmarks/bench_federation.py --part NAME --write`. Medians of the rounds after the first.",
        "CPU-seconds are of every process that belongs to the row, between two rounds' ends. Each part",
        "names the load average when it began: where others load the machine too, seconds are upper",
        "bounds, and CPU-seconds compare better.",
        "",
    ]
    for name, section in _SECTIONS.items():
        found = figures.get(name)
        if found is None:
            lines += [f"Not run: `--part {name}`.", ""]
            continue
        where = found["where"]
        origin = (
            f"{where['date']}, {where['machine']}, Python {where['python']}, load {where['load']} at the "
            f"start; the part took {found['took_s']} s."
        )
        lines += [*section(found), "", origin, ""]
    return "\n".join(lines)


def _network(found: dict[str, Any]) -> list[str]:
    ours, masked, plain = found["ours"], found["masked"], found["plain"]
    lines = [
        "## A DP round over four real SuperNodes",
        "",
        "Ours with TLS, authentication, agents, ledgers, statements, log and witnesses; masked, each site is",
        "sent three messages a round, and the coordinator reads the sum alone.",
        "",
        "| | s a round | CPU-s a round | faster than plain Flower | with less CPU |",
        "|---|---|---|---|---|",
    ]
    for name, row in (("ours, everything on but masks", ours), ("ours, with masked updates", masked)):
        ratio, work = plain["wall"] / row["wall"], plain["cpu"] / row["cpu"]
        faster = f"{ratio:.1f} times ({aim(ratio, 4)})"
        lines.append(f"| {name} | {row['wall']} | {row['cpu']} | {faster} | {work:.1f} times |")
    lines.append(
        f"| plain Flower and Opacus at their defaults, no TLS | {plain['wall']} | {plain['cpu']} | | |"
    )
    return [*lines, "", f"Without masks. {_parts(ours)}", "", f"Masked. {_parts(masked)}"]


def _parts(ours: dict[str, Any]) -> str:
    rounds = ", ".join(str(item) for item in ours["rounds"])
    return (
        f"Of our round, {ours['asking']} s pass until all sites are asked, {ours['answers']} s until the "
        f"last answer, {ours['closing']} s until the round is aggregated, logged, signed and cosigned. "
        f"Rounds: {rounds} s."
    )


def _pieces(found: dict[str, Any]) -> list[str]:
    peaks = found["peak_mib"]
    text = (
        f"{found['parameters']:,} parameters, two sites: {found['wall']} s and {found['cpu']} CPU-s a round. "
        f"Peak memory: agent {peaks['agent']} MiB, SuperNode {peaks['supernode']} MiB, SuperLink "
        f"{peaks['superlink']} MiB."
    )
    return ["## Ten million parameters through real SuperNodes, in pieces", "", text]


def _simulate(found: dict[str, Any]) -> list[str]:
    ours, ray, idle, loop = (found[name] for name in ("ours", "ray", "ray_idle", "loop"))
    same, bare, plain = (row["wall"] / ours["wall"] for row in (ray, idle, loop))
    return [
        f"## {SITES} virtual sites, {ours['parameters']:,} parameters, {ROWS} rows each",
        "",
        "| | s a round | CPU-s a round | ours is faster by |",
        "|---|---|---|---|",
        f"| ours: statements, odometers, log and witnesses on | {ours['wall']} | {ours['cpu']} | |",
        f"| Ray, Opacus's step at each site | {ray['wall']} | {ray['cpu']} | {same:.1f} ({aim(same, 8)}) |",
        f"| Ray, clients that only answer | {idle['wall']} | {idle['cpu']} | {bare:.2f} ({aim(bare, 8)}) |",
        f"| a plain loop of Opacus's step | {loop['wall']} | {loop['cpu']} | {plain:.2f} |",
        *(["", _spent(ours, ray)] if "asking" in ours else []),
    ]


def _spent(ours: dict[str, Any], ray: dict[str, Any]) -> str:
    sites = ours["cpu"] - ours["coordinator_cpu"]
    return (
        f"Of our round {ours['asking']} s pass until the sites are asked, {ours['answers']} s until the last "
        f"answer is proved, {ours['closing']} s until the round is aggregated, logged, signed and cosigned. "
        f"Of its CPU-seconds {ours['coordinator_cpu']} are the coordinator's, {sites:.3f} the sites': "
        f"{1000 * sites / SITES:.1f} ms each, of which some 0.04 ms is its signature; to verify one costs "
        f"the coordinator some 0.13 ms. Ray's round takes {ray['cpu'] / ours['cpu']:.1f} times "
        "our CPU-seconds."
    )


def _thousand(found: dict[str, Any]) -> list[str]:
    ours = found["ours"]
    rate = 60 / ours["wall"]
    text = (
        f"{rate:.1f} rounds a minute ({aim(rate, 3)}), {ours['cpu']} CPU-s a round, {ours['setup']} s before "
        f"the first, peak {ours['peak_mib']} MiB in all processes, {ours['parameters']:,} parameters, "
        "everything on."
    )
    return ["## 1,000 virtual sites", "", text]


def _memory(found: dict[str, Any]) -> list[str]:
    growth = (found["300"] - found["100"]) / 200 * 1024
    return [
        "## Memory against the number of rounds (5 virtual sites)",
        "",
        "The most that is held at a round's end. What planning leaves in the allocator (the certificate of",
        "the whole plan) is in it, and is larger for a longer plan.",
        "",
        "| rounds | MiB |",
        "|---|---|",
        *[f"| {rounds} | {found[rounds]} |" for rounds in ("10", "100", "300")],
        "",
        f"From 100 rounds to 300, {growth:.0f} KiB a round (aim: flat).",
    ]


def _large(found: dict[str, Any]) -> list[str]:
    text = (
        f"{found['wall']} s and {found['cpu']} CPU-s a round, {found['setup']} s before the first, peak "
        f"{found['peak_mib']} MiB."
    )
    return [f"## {found['parameters']:,} parameters (2 virtual sites, one at a time)", "", text]


_SECTIONS: Final[dict[str, Callable[[dict[str, Any]], list[str]]]] = {
    "network": _network,
    "pieces": _pieces,
    "simulate": _simulate,
    "thousand": _thousand,
    "memory": _memory,
    "large": _large,
    "huge": _large,
}
