"""The part `rows` of `bench_serve.py`: many rows in one request, ours beside the others.

Ours answers each row with its own commitments, salts and path to the root that the request's one entry holds;
the others answer bare.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from serving_load import cpu_s, lua, milliseconds, request_body, tree, wrk

ROWS = (1, 10, 100, 1000)
ROWS_CONNECTIONS = 4
ROWS_HEADING = "## Many rows in one request"
ROWS_NAMES = ("ours", "fastapi", "mlserver", "kserve")

Cell = tuple[str, int]


def rows(asked: argparse.Namespace, start: Callable[[str, Path, ExitStack], Any]) -> dict[Cell, list[Any]]:
    """Return for each server and number of rows the turns' (rows a CPU-second, p50 in ms, errors)."""
    found: dict[Cell, list[Any]] = {}
    with tempfile.TemporaryDirectory() as base, ExitStack() as stack:
        servers = [start(name, Path(base), stack) for name in ROWS_NAMES]
        servers = [server for server in servers if not isinstance(server, str)]
        for repeat in range(asked.repeats):
            for server in servers if repeat % 2 == 0 else servers[::-1]:
                for count in ROWS:
                    found.setdefault((server.name, count), []).append(turn(server, count, asked.seconds))
    return found


def turn(server: Any, count: int, seconds: float) -> tuple[float, float, int]:
    script = lua(server.script.parent, server.path, request_body(count), server.headers)
    pids = tree(server.pid)
    before = cpu_s(pids)
    text = wrk(server.url, script, seconds, ROWS_CONNECTIONS)
    time.sleep(0.3)
    spent = cpu_s(pids) - before
    answered = int(re.search(r"([0-9]+) requests in", text).group(1))
    failed = re.search(r"Non-2xx or 3xx responses: ([0-9]+)", text)
    p50_ms = milliseconds(re.search(r"50% +(\S+)", text).group(1))
    return answered * count / spent, p50_ms, int(failed.group(1)) if failed else 0


def rows_page(found: dict[Cell, list[Any]], names: dict[str, str], asked: argparse.Namespace) -> str:
    lines = [
        ROWS_HEADING,
        "",
        (
            f"`make bench-serve`, part `rows`: rows a CPU-second (and p50 in ms), {ROWS_CONNECTIONS} "
            f"connections, {asked.seconds:g} s, {asked.repeats} turns; medians. Ours gives each row its own "
            "commitments, salts and path to the root in the request's entry; the others answer bare."
        ),
        "",
        f"| server | {' | '.join(f'{count:,} rows' if count > 1 else '1 row' for count in ROWS)} | errors |",
        "|---|" + "---|" * (len(ROWS) + 1),
    ]
    for name in ROWS_NAMES:
        if (name, ROWS[0]) not in found:
            continue
        cells = []
        for count in ROWS:
            turns = found[name, count]
            middle = [statistics.median(value[k] for value in turns) for k in (0, 1)]
            cells.append(f"{middle[0]:,.0f} ({middle[1]:.1f})")
        errors = sum(value[2] for count in ROWS for value in found[name, count])
        lines.append(f"| {names[name]} | {' | '.join(cells)} | {errors} |")
    return "\n".join(lines) + "\n"
