"""Many at once ask one witness, some with another history; and it is killed in the middle."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, open_checkpoint, sign_checkpoint
from audit.errors import WitnessConflictError, WitnessProofError, WitnessRequestError
from audit.keys import SigningKey
from audit.merkle import consistency_proof, hash_leaf, root_of, source_of
from audit.notes import KeyType, NoteSigner
from audit.witness import Witness
from audit.witness_request import AddCheckpoint
from tests.soak_report import Report

ORIGIN = "hospital.example/raced"
NOW = 1_700_000_000
LOG = NoteSigner(ORIGIN, SigningKey.generate())
KEY = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
SIZE = 100
FORK = 40  # where the second history departs from the first
HISTORIES = [
    [hash_leaf(b"%d" % n) for n in range(SIZE)],
    [hash_leaf(b"%d" % (n if n < FORK else -n)) for n in range(SIZE)],
]
SOURCES = [source_of(history) for history in HISTORIES]
NOTES = [
    [sign_checkpoint(Checkpoint(ORIGIN, n, root_of(history[:n])), LOG) for n in range(SIZE + 1)]
    for history in HISTORIES
]


def request(history: int, old: int, size: int) -> bytes:
    proof = consistency_proof(SOURCES[history], old, size) if 0 < old <= size else []
    return AddCheckpoint(old_size=old, proof=tuple(proof), note=NOTES[history][size]).format()


def race(folder: Path, seed: int, *, requests: int, threads: int) -> Counter[str]:
    """One round: requests in random order, from threads that each open the state for themselves."""
    draw = random.Random(seed)
    path = folder / f"{seed}.json"
    Witness.create(path, KEY, LOG.vkey)
    sizes = [1 + n * SIZE // requests for n in range(requests)]
    draw.shuffle(sizes)
    wanted = [(draw.random() < 0.3, size, draw.random() < 0.15) for size in sizes]
    lock, outcomes = threading.Lock(), Counter[str]()
    given: list[tuple[int, int, bytes]] = []
    start = threading.Barrier(threads)

    def ask(part: list[tuple[bool, int, bool]]) -> None:
        witness = Witness(path, KEY, LOG.vkey)
        start.wait()
        for forked, size, stale in part:
            old = 0 if stale else witness.tree_size
            asked = AddCheckpoint.parse(request(forked, old, size))
            try:
                line = witness.cosign(asked.note, asked.old_size, asked.proof, NOW)
            except (WitnessConflictError, WitnessProofError, WitnessRequestError) as error:
                with lock:
                    outcomes[error.code] += 1
                continue
            with lock:
                recorded = witness.tree_size
                assert recorded >= size, "a cosignature for more than is recorded"
                assert recorded >= max((other for _, other, _ in given), default=0), "the recorded size fell"
                given.append((forked, size, line))
                outcomes["cosigned"] += 1

    runners = [
        threading.Thread(target=guarded, args=(ask, wanted[n::threads], outcomes)) for n in range(threads)
    ]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not outcomes["broken"], "a request broke what must hold"
    assert Witness(path, KEY, LOG.vkey).tree_size == max(size for _, size, _ in given)
    for forked, size, line in given:
        note = add_signatures(NOTES[forked][size], [line])
        assert open_checkpoint(note, log=LOG.verifier, witnesses=[KEY.verifier], now=NOW).cosignatures
    assert len({forked for forked, size, _ in given if size > FORK}) <= 1, "two histories were cosigned"
    return outcomes


def guarded(ask: object, part: object, outcomes: Counter[str]) -> None:
    try:
        ask(part)  # type: ignore[operator]
    except BaseException:
        outcomes["broken"] += 1
        raise


def test_concurrent_requests_leave_one_growing_history(tmp_path: Path) -> None:
    outcomes = race(tmp_path, 1, requests=60, threads=20)
    assert outcomes.total() == 60
    assert outcomes["cosigned"] >= 1


@pytest.mark.soak
def test_two_hundred_requests_at_once_for_fifty_rounds_leave_one_growing_history(
    tmp_path: Path, report: Report
) -> None:
    outcomes = Counter[str]()
    for seed in range(50):
        outcomes += race(tmp_path, seed, requests=200, threads=200)
    assert outcomes.total() == 10_000
    report(
        "races",
        size="50 rounds of 200 at once, in random order, 3 in 10 of another history",
        result=f"{outcomes['cosigned']:,} cosigned, {outcomes.total() - outcomes['cosigned']:,} refused; "
        "the recorded size never fell, no two histories",
    )
