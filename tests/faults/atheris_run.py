"""Run atheris on one parser: `python -m tests.faults.atheris_run TARGET RUNS CORPUS`."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["audit"]):
    from tests.faults.targets import TARGETS


def main(name: str, runs: str, corpus: str) -> None:
    target = TARGETS[name]
    atheris.Setup(
        [name, f"-runs={runs}", "-seed=1", "-max_len=8192", "-rss_limit_mb=1024", corpus], target.feed
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
