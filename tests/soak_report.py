"""The figures of `make soak`: each test records its own, and the run's last step writes docs/results/log.md.

A run in which a test fails writes no page. What was not run is named in the page, so that a skipped part
cannot pass for a good one. Parts may be run one by one instead, each by pytest with the variable RESULTS
naming one file, and put together by
`python -m tests.soak_report PAGE --rows FILE CAUTION`.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

RESULTS: Final = "AFFIDAVIT_SOAK_RESULTS"  # the file of JSON lines that a run appends to
PARTS: Final = {
    "vectors": "Published vectors",
    "judge": "Go's checksum database as judge of an exported log",
    "kill": "kill -9 of a writer in the middle of an append",
    "crash": "The PostgreSQL server crashed under two writers",
    "share": "Two processes append at once",
    "torn": "The write-ahead log cut or zeroed anywhere",
    "syscalls": "A system call that writes fails, or the process is killed at it",
    "power": "Power cut: what was not synced is lost, or half of it",
    "flips": "One bit of the database flipped",
    "evidence": "One bit of an exported file flipped",
    "operator": "The operator forges history with the log's own key",
    "split": "Two histories shown to two parts of the witnesses",
    "races": "Concurrent add-checkpoint to one witness",
    "witness_kill": "kill -9 of a witness in the middle of a cosignature",
    "fuzz": "Parsers fed with hostile bytes",
    "kills": "kill -9 at random moments of ServerApp, SuperLink, SuperNode, agent and API",
    "clocks": "The clock jumps",
    "erasure": "After an erasure",
    "serving_kills": "kill -9 of a serving worker under load",
    "serving_swaps": "Versions swapped and rolled back under load",
    "serving_load": "Load on the serving workers",
}

_WHOSE: Final = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
Report = Callable[..., None]


def recorder(name: str) -> Report:
    """Return `report(part, size=..., result=...)` for one test; its seconds count from here."""
    began, spent = time.perf_counter(), _cpu_s()

    def report(part: str, *, size: str, result: str) -> None:
        if part not in PARTS:
            raise KeyError(f"{part!r} is no part of the page; add it to PARTS")
        place = os.environ.get(RESULTS)
        if not place:
            return
        seconds = round(time.perf_counter() - began, 1)
        row = {"part": part, "test": name, "size": size, "result": result, "seconds": seconds}
        row["cpu_seconds"] = round(_cpu_s() - spent, 1)
        with Path(place).open("a", encoding="utf-8") as file:  # one short write: workers do not mix lines
            file.write(json.dumps(row) + "\n")

    return report


def _cpu_s() -> float:
    """CPU time of this process and of those children that it has waited for."""
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in _WHOSE)


_WHOLE: Final = "A run in which anything fails writes nothing here."


def page(rows: Iterable[dict[str, Any]], *, where: str, caution: str = _WHOLE) -> str:
    """Return the page of these rows, in the order of `PARTS` and of the tests' names, each test once."""
    found = list({(row["test"], row["part"], row["size"]): row for row in rows}.values())
    lines = [
        "# Faults by the thousand",
        "",
        f"Written by `make soak` {where}. {caution}",
        "Seconds are of one test on a shared, busy machine; CPU seconds are those of the test and of the",
        "processes that it waited for, so a database server's are not among them.",
        "",
        "| what | size | result | seconds | CPU |",
        "|---|---|---|---|---|",
    ]
    for part, title in PARTS.items():
        own = sorted(
            (row for row in found if row["part"] == part), key=lambda row: (row["test"], row["size"])
        )
        lines += [
            f"| {title} | {row['size']} | {row['result']} | {row['seconds']:g} | {row['cpu_seconds']:g} |"
            for row in own
        ]
    wall, cpu = (sum(row[name] for row in found) for name in ("seconds", "cpu_seconds"))
    lines += ["", f"In all {wall:.0f} seconds of tests, {cpu:.0f} of CPU."]
    missing = [title for part, title in PARTS.items() if part not in {row["part"] for row in found}]
    if missing:
        lines += ["", "Not run here: " + "; ".join(missing) + "."]
    return "\n".join(lines) + "\n"


def _where() -> str:
    from tests.postgresql import server_version

    parts = [
        f"on {time.strftime('%Y-%m-%d', time.gmtime())}: {os.cpu_count()} shared {platform.machine()} cores",
        f"Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        server_version() or "no PostgreSQL",
        f"cryptography {version('cryptography')}",
    ]
    return ", ".join(parts)


def run(command: list[str], target: Path) -> int:
    """Run pytest with a fresh file of results, write the page if all passed, return pytest's status."""
    results = target.with_suffix(".jsonl.tmp")
    results.unlink(missing_ok=True)
    done = subprocess.run(command, env={**os.environ, RESULTS: str(results)}, check=False)
    try:
        if done.returncode == 0:
            rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
            target.write_text(page(rows, where=_where()), encoding="utf-8")
    finally:
        results.unlink(missing_ok=True)
    return done.returncode


def assemble(results: Path, target: Path, caution: str) -> None:
    """Write the page of parts that were run one by one with RESULTS naming one file.

    `caution` stands where a whole run says that it passed as one: which code it was, what was run again.
    """
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    target.write_text(page(rows, where=f"in parts {_where()}", caution=caution), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[2:3] == ["--rows"]:
        assemble(Path(sys.argv[3]), Path(sys.argv[1]), sys.argv[4])
        sys.exit(0)
    marks = "soak or reported"
    sys.exit(run([sys.executable, "-m", "pytest", "-m", marks, *sys.argv[2:]], Path(sys.argv[1])))
