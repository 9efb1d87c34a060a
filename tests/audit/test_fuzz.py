"""Parsers fed with hostile bytes: they take what is good, raise what they declare, and stay small."""

from __future__ import annotations

import importlib.util
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


def fuzz(target: Target, times: int) -> tuple[int, int]:
    """Feed mutants of the target's seeds. Return how many were taken and the most memory that one took."""
    draw, taken, most = random.Random(target.name), 0, 0
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


def measure(target: Target, data: bytes) -> int:
    """Feed once and return the peak of memory, which stays in proportion to the input."""
    tracemalloc.start()
    try:
        target.feed(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    allowed = MEMORY_FIXED + MEMORY_FACTOR * len(data)
    assert peak <= allowed, f"{target.name}: {peak} bytes for an input of {len(data)}: {data[:200]!r}"
    return peak


@pytest.mark.parametrize("name", NAMES)
def test_good_examples_are_taken(name: str) -> None:
    """Else the fuzzing would only see how everything is refused."""
    assert any(TARGETS[name].feed(seed) for seed in TARGETS[name].seeds)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_bytes_raise_the_declared_error_only(name: str) -> None:
    fuzz(TARGETS[name], 1500)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15)
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


def atheris_fuzz(target: Target, times: int, folder: Path) -> int:
    """Fuzz in a process of its own, led by coverage; return how many places of the code it reached."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(seed)
    command = [sys.executable, "-m", "tests.faults.atheris_run", target.name, str(times), str(corpus)]
    # libFuzzer bounds the most memory that its process ever had, and a child begins with what this one has:
    # the shell between them has little.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert f"Done {times} runs" in said, said[-2000:]
    return int(re.findall(r"DONE +cov: (\d+)", said)[-1])


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_a_million_hostile_inputs_raise_the_declared_error_only(
    name: str, tmp_path: Path, report: Report
) -> None:
    """As many again by atheris where it is installed (`pip install --group fuzz`)."""
    size, result = f"{name}: 1,000,000 of our own mutations", "0 undeclared errors"
    if importlib.util.find_spec("atheris") is not None:
        covered = atheris_fuzz(TARGETS[name], 1_000_000, tmp_path)
        size, result = size + ", 1,000,000 by atheris", f"{result}; atheris reached {covered} places"
    taken, most = fuzz(TARGETS[name], 1_000_000)
    report("fuzz", size=size, result=f"{result}; {taken:,} taken; memory at most {most >> 10} KiB")
