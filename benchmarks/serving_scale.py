"""The part `scale` of `bench_serve.py`: one worker and two, over SQLite and over PostgreSQL.

Beside the server's CPU the database's and the load generator's are counted: on two cores all of them share
what two workers would need for themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving_load import cpu_s, free_port, lua, milliseconds, ours, request_body, running, tree, wait_for, wrk

ROOT = Path(__file__).resolve().parent.parent
SCALE_CONNECTIONS = 256  # enough that both workers have whole crowds
SCALE_HEADING = "## One worker and two"


@dataclass
class Scaled:
    """One database with so many workers: a CPU-second is one of any process, a second one of the clock."""

    database: str
    workers: int
    per_s: list[float] = field(default_factory=list)
    per_cpu_s: list[float] = field(default_factory=list)  # of the workers' CPU
    busy: list[tuple[float, ...]] = field(default_factory=list)  # cores: each worker's, database's, load's
    p99_ms: list[float] = field(default_factory=list)
    errors: int = 0


def scale(asked: argparse.Namespace) -> list[Scaled] | str:
    """Return what one and two workers do over each database; a text where something cannot run."""
    found: list[Scaled] = []
    with tempfile.TemporaryDirectory() as base, postgresql() as server:
        for database in ("SQLite", "PostgreSQL") if server else ("SQLite",):
            url = server.new_database() if server and database == "PostgreSQL" else None
            pair = [Scaled(database, workers) for workers in (1, 2)]
            for repeat in range(asked.repeats):
                for each in pair if repeat % 2 == 0 else pair[::-1]:
                    problem = scaled(each, Path(base) / database, url, server, asked)
                    if problem:
                        return f"{database}, {each.workers} workers: {problem}"
            found += pair
    return found


@contextmanager
def postgresql() -> Iterator[Any]:
    """A server of our own where its binaries are installed, as the tests start one, else None."""
    spec = importlib.util.spec_from_file_location("bench_postgresql", ROOT / "tests" / "postgresql.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.why_not():
        yield None
        return
    with module.running_server() as server:
        yield server


def scaled(each: Scaled, folder: Path, url: str | None, server: Any, asked: argparse.Namespace) -> str:
    folder.mkdir(exist_ok=True)
    command, headers, environ, path = ours(folder, each.workers, url)
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    body = request_body()
    with running([port if part == "PORT" else part for part in command], folder, environ) as process:
        problem = wait_for(address + path, body, headers, process)
        if problem:
            return problem
        script = lua(folder, path, body, headers)
        wrk(address, script, 4, SCALE_CONNECTIONS)  # until both workers are up and warm
        own = [process.pid] if each.workers == 1 else workers_of(process.pid)
        postmaster = int((server.folder / "data" / "postmaster.pid").read_text().split()[0]) if url else 0
        before = [cpu_s([pid]) for pid in own], cpu_s(tree(postmaster)) if url else 0.0
        children = os.times()
        text = wrk(address, script, asked.seconds, SCALE_CONNECTIONS)
        after = os.times()
        load = after.children_user + after.children_system - children.children_user - children.children_system
        spent = [cpu_s([pid]) - begun for pid, begun in zip(own, before[0], strict=True)]
        of_database = (cpu_s(tree(postmaster)) if url else 0.0) - before[1]
    count = int(re.search(r"([0-9]+) requests in", text).group(1))
    failed = re.search(r"Non-2xx or 3xx responses: ([0-9]+)", text)
    each.errors += int(failed.group(1)) if failed else 0
    each.per_s.append(count / asked.seconds)
    each.per_cpu_s.append(count / sum(spent))
    each.busy.append(tuple(value / asked.seconds for value in (*spent, of_database, load)))
    each.p99_ms.append(milliseconds(re.search(r"99% +(\S+)", text).group(1)))
    return ""


def workers_of(supervisor: int) -> list[int]:
    """The processes that answer: of a supervisor's children those that serve, not multiprocessing's own."""
    found = []
    for pid in tree(supervisor)[1:]:
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def scale_page(found: list[Scaled] | str, asked: argparse.Namespace) -> str:
    if isinstance(found, str):
        return f"{SCALE_HEADING}\n\nNot measured: {found}\n"
    lines = [
        SCALE_HEADING,
        "",
        (
            f"`make bench-serve`, part `scale`: {SCALE_CONNECTIONS} connections, {asked.seconds:g} s, "
            f"{asked.repeats} repeats in turns; medians. {os.cpu_count()} cores, which workers, database and "
            f"load generator share; load average at the end: {os.getloadavg()[0]:.1f}."
        ),
        "",
        (
            "| log in | workers | requests a second | a CPU-second of the workers | cores of each worker | "
            "of the database | of the load | p99 ms | errors |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        middle = sorted(each.busy, key=lambda busy: busy[:-2])[len(each.busy) // 2]
        cores = " + ".join(f"{value:.2f}" for value in middle[:-2])
        lines.append(
            f"| {each.database} | {each.workers} | {statistics.median(each.per_s):.0f} | "
            f"{statistics.median(each.per_cpu_s):.0f} | {cores} | {middle[-2]:.2f} | {middle[-1]:.2f} | "
            f"{statistics.median(each.p99_ms):.1f} | {each.errors} |"
        )
    lines.append("")
    for one_worker, two in zip(found[::2], found[1::2], strict=True):
        seen = statistics.median(two.per_s) / statistics.median(one_worker.per_s)
        kept = statistics.median(two.per_cpu_s) / statistics.median(one_worker.per_cpu_s)
        lines.append(
            f"* {one_worker.database}: two workers gave {seen:.2f} times the requests of one here. "
            f"A CPU-second of two gave {kept:.2f} times what one's gives: two free cores would give "
            f"at most {2 * kept:.2f} times (aim 1.7)."
        )
    return "\n".join(lines) + "\n"
