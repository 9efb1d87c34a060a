"""How long `affidavit --help` takes to start: best of five, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

AIM_S = 0.3
COMMANDS = (["--help"], ["verify", "--help"])
RUNS = 5


def measure(arguments: list[str]) -> float:
    """Seconds of wall time for one run of `affidavit ARGUMENTS`."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "affidavit", *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def main() -> int:
    slow = False
    for arguments in COMMANDS:
        best = min(measure(arguments) for _ in range(RUNS))
        slow |= best >= AIM_S
        print(f"affidavit {' '.join(arguments):<16} best of {RUNS}: {best:.3f} s (aim: under {AIM_S} s)")
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
