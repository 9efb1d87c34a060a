"""Load for `bench_log.py`: entries of the commonest kind, submitters, and a table that prints and is kept."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audit.entries import Prediction, RowCommitment, encode_entry, index_columns, new_entry
from audit.ledger import Ledger

ORIGIN = "bench.example/log"
SUBMITTERS = 512
Made = tuple[bytes, str, Any]


def prediction(number: int) -> Made:
    """One entry on its whole way: body, envelope, canonical bytes, columns."""
    body = Prediction(
        request_id=f"{number:032x}", model="toy", version="a" * 64, charter="b" * 64, transition="c" * 64,
        purpose="triage", principal="p-" + "d" * 32, role="consumer", site="",
        policies=("consumers-may-predict",),
        policy_set="e" * 64, rows=(RowCommitment(input="f" * 64, output="0" * 64),),
    )  # fmt: skip
    entry = new_entry(body, actor="api", time="2026-11-23T22:23:12Z")
    return encode_entry(entry), entry.event_id, index_columns(entry)


def made(count: int) -> list[Made]:
    return list(map(prediction, range(count)))


def submit(ledger: Ledger, entries: Iterable[Made], seconds: float) -> tuple[int, float, float]:
    """512 submitters, each waiting until its entry is durable before it sends the next.

    Returns:
        (entries appended, seconds of wall time, seconds of this process's CPU).
    """
    source, done = iter(entries), 0
    stop = time.perf_counter() + seconds

    async def one() -> None:
        nonlocal done
        for data, event_id, columns in source:
            await ledger.append_from_loop(data, event_id=event_id, index_columns=columns)
            done += 1
            if time.perf_counter() >= stop:
                return

    async def all_of_them() -> None:
        await asyncio.gather(*(one() for _ in range(SUBMITTERS)))

    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(all_of_them())
    return done, time.perf_counter() - wall, time.process_time() - cpu


def fill(ledger: Ledger, count: int) -> float:
    """Append `count` entries in bulk; return the CPU seconds of the appends alone."""
    spent, left = 0.0, count
    while left:
        batch = made(min(2_000, left))
        begun = time.process_time()
        futures = [
            ledger.append(data, event_id=event, index_columns=columns) for data, event, columns in batch
        ]
        for future in futures:
            future.result(120)
        spent += time.process_time() - begun
        left -= len(batch)
    return spent


def rate(act: Callable[[int], object], numbers: list[int]) -> float:
    """Return calls a second of CPU."""
    begun = time.process_time()
    for number in numbers:
        act(number)
    return len(numbers) / (time.process_time() - begun)


def yardstick_us() -> float:
    """CPU microseconds of one SHA-256 of 1 KiB: tells a busy or slow machine from slow code."""
    block = bytes(1024)
    return 1e6 / rate(lambda _: hashlib.sha256(block).digest(), list(range(50_000)))


def peak_mib() -> float:
    """This program's own peak; `getrusage` would count what its parent used before it started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


class Table:
    """Rows that are printed as they come, and kept as Markdown."""

    def __init__(self) -> None:
        self.text: list[str] = []

    def head(self, title: str, *columns: str) -> None:
        print(f"\n{title}")
        self.text += ["", f"## {title}", ""]
        if columns:
            self._print("", *columns)
            self.text += [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]

    def row(self, name: str, *cells: str) -> None:
        self._print(name, *cells)
        self.text.append(f"| {name} | {' | '.join(cells)} |")

    def say(self, line: str) -> None:
        print(f"  {line}")
        self.text += ["", line]

    def _print(self, name: str, *cells: str) -> None:
        print(f"  {name:<52}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
