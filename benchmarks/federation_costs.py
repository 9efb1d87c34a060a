"""What a benchmark of a federation counts: the clock, the processors' time of all processes, memory."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

OFFLINE: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def tree_cpu_s(root: int | None = None) -> float:
    """CPU-seconds of this process and all that descend from it, those that ended and were waited for too."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        spent[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    root = root or os.getpid()
    total = 0.0
    for process in spent:
        above = process
        while above not in (0, root) and above in parents:
            above = parents[above]
        total += spent[process] if above == root else 0.0
    return total


def peak_mib() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def resident_mib() -> int:
    """What this process holds now."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def children_mib() -> int:
    """What this process's own children hold now; a page that several share is divided among them."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except OSError:
            continue
    return total >> 10


def median_laps(marks: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Median (seconds, CPU-seconds) from one mark to the next; the first mark ends the warm-up."""
    pairs = list(pairwise(marks))
    wall = statistics.median(b[0] - a[0] for a, b in pairs)
    return round(wall, 3), round(statistics.median(b[1] - a[1] for a, b in pairs), 3)


class Laps:
    """When each round ended, by the clock and by the processors."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []
        self._spent = [0.0, 0.0]  # on counting itself, which looks at every process of the machine

    def mark(self) -> None:
        moment, own = time.time(), time.process_time()
        cpu = tree_cpu_s()
        self._marks.append((moment - self._spent[0], cpu - self._spent[1]))
        self._spent[0] += time.time() - moment
        self._spent[1] += time.process_time() - own

    def medians(self) -> tuple[float, float]:
        """Median (seconds, CPU-seconds) from one round's end to the next; the first round is a warm-up."""
        return median_laps(self._marks)


class Phases:
    """How a simulated round's seconds are shared out, by the events of its run."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}
        self._found: dict[str, list[float]] = {"asking": [], "answers": [], "closing": []}

    def mark(self, kind: str) -> None:
        """Note an event; "counted" ends what a benchmark itself did at a round's end."""
        now = time.time()
        if kind == "round" and "counted" in self._at:
            at = self._at
            self._found["asking"].append(at["asked"] - at["counted"])
            self._found["answers"].append(at["answered"] - at["asked"])
            self._found["closing"].append(now - at["answered"])
        self._at[kind] = now

    def medians(self) -> dict[str, float]:
        """Seconds until the sites are asked, from there to the last answer, from there to the round's end."""
        return {name: round(statistics.median(times), 3) for name, times in self._found.items()}
