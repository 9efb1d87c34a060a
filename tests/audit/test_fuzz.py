"""Parsers fed with hostile bytes: they take what is good, raise what they declare, and stay small."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.mutation import NUMBERS, TOKENS, mutants
from tests.faults.targets import TARGETS, Target
from tests.soak_report import Report

NAMES = list(TARGETS)
MEMORY_EVERY = 2000
MEMORY_FIXED = 192 << 10  # the parser's own: compiled patterns, messages, a traceback
MEMORY_FACTOR = 24  # a list of short texts, or JSON's objects, against the bytes that say them


def fuzz(target: Target, times: int) -> tuple[int, float]:
    """Feed mutants of the target's seeds. Return how many were taken and the most memory, in bytes a byte."""
    draw, taken, most = random.Random(target.name), 0, 0.0
    for number, data in zip(range(times), mutants(draw, target.seeds), strict=False):
        if number % MEMORY_EVERY == 0:
            most = max(most, measure(target, data))
            continue
        try:
            taken += target.feed(data)
        except BaseException as error:
            error.add_note(f"{target.name}: input {data!r}")
            raise
    return taken, most


def measure(target: Target, data: bytes) -> float:
    """Feed once and return peak memory beyond a fixed part, as a multiple of the input."""
    tracemalloc.start()
    try:
        target.feed(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    factor = max(0, peak - MEMORY_FIXED) / max(1, len(data))
    assert factor <= MEMORY_FACTOR, f"{target.name}: {peak} bytes for an input of {len(data)}: {data[:200]!r}"
    return factor


@pytest.mark.parametrize("name", NAMES)
def test_good_examples_are_taken(name: str) -> None:
    """Else the fuzzing would only see how everything is refused."""
    assert any(TARGETS[name].feed(seed) for seed in TARGETS[name].seeds)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_raise_the_declared_error_only(name: str) -> None:
    fuzz(TARGETS[name], 3000)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25)
def test_any_bytes_between_good_ones_raise_the_declared_error_only(name: str, data: st.DataObject) -> None:
    target = TARGETS[name]
    seed = data.draw(st.sampled_from(list(target.seeds)))
    start = data.draw(st.integers(0, len(seed)))
    stop = data.draw(st.integers(start, len(seed)))
    middle = data.draw(st.binary(max_size=80) | st.text(max_size=30).map(str.encode))
    target.feed(seed[:start] + middle + seed[stop:])


@pytest.mark.parametrize("name", NAMES)
def test_huge_input_costs_memory_and_time_in_proportion(name: str) -> None:
    """Up to and beyond each cap: the good example's parts, many times over, and runs of one token."""
    target = TARGETS[name]
    seed = max(target.seeds, key=len)
    half, lines = seed[: len(seed) // 2], seed.split(b"\n")
    size = 300_000
    huge = [
        piece * (size // max(1, len(piece))) for piece in (seed, half, lines[-1] or b"x", *TOKENS, *NUMBERS)
    ]
    huge += [
        half + piece * (size // len(piece)) + seed[len(half) :] for piece in (b"\n", b"[", b"0", b"A", b" ")
    ]
    began = time.process_time()
    for data in huge:
        measure(target, data)
    assert (time.process_time() - began) / len(huge) < 0.25


def atheris_fuzz(target: Target, times: int, folder: Path) -> str:
    """Fuzz in a process of its own, led by coverage; return what it covered."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    command = [sys.executable, "-m", "tests.faults.atheris_run", target.name, str(times), str(corpus)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "HOME": str(folder)},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.findall(r"DONE +cov: (\d+)", done.stderr)
    assert re.search(rf"Done {times} ", done.stderr), done.stderr[-2000:]
    return found[-1] if found else "?"


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_million_hostile_inputs_raise_the_declared_error_only(
    name: str, tmp_path: Path, report: Report
) -> None:
    """By atheris where it is installed (`pip install --group fuzz`), else by our own mutations."""
    if importlib.util.find_spec("atheris") is not None:
        covered = atheris_fuzz(TARGETS[name], 1_000_000, tmp_path)
        taken, most = fuzz(TARGETS[name], 100_000)
        size = f"{name}: 1,000,000 inputs by atheris, 100,000 by our own mutations"
        how = f"{covered} places covered; "
    else:
        taken, most = fuzz(TARGETS[name], 1_000_000)
        size, how = f"{name}: 1,000,000 inputs by our own mutations", ""
    report(
        "fuzz",
        size=size,
        result=f"0 undeclared errors; {how}{taken:,} of our own taken; memory at most {most:.1f} bytes a byte",
    )
