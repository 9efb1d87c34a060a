"""The operator holds the database, the log's key and the signer's state: judged by the witnesses alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.entries import columns_of, decode_entry, encode_entry
from audit.errors import WitnessConflictError, WitnessError, WitnessProofError, WitnessRequestError
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import NoteSigner
from audit.service import export_evidence
from audit.verify import Verdict, Word
from audit.witness import Witness
from tests.audit_verify.hospitals import NOW, ORIGIN
from tests.audit_verify.judging import CHECKPOINT
from tests.audit_verify.memory_log import MemoryLog
from tests.soak_report import Report

NOW_S = int(NOW.timestamp())
ALONE = ("log.created", "site.enrolled")  # entries whose evidence is the entry itself, and is quickly judged
Attack = Callable[[random.Random, list[bytes], int], list[bytes]]


def other(draw: random.Random, leaf: bytes) -> bytes:
    """The same entry, but for what the operator wants it to say."""
    entry = decode_entry(leaf)
    return encode_entry(replace(entry, actor=f"somebody-{draw.randrange(10**9)}"))


def rewrite(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    at = draw.randrange(1, seen)
    leaves[at] = other(draw, leaves[at])
    return leaves[: draw.randrange(seen, len(leaves) + 1)]


def delete(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    del leaves[draw.randrange(1, seen)]
    leaves.append(other(draw, leaves[-1]))
    return leaves[: draw.randrange(seen, len(leaves) + 1)]


def insert(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    leaves.insert(draw.randrange(1, seen), other(draw, draw.choice(leaves)))
    return leaves[: draw.randrange(seen, len(leaves) + 1)]


def swap(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    one, two = draw.randrange(1, seen), draw.randrange(1, len(leaves))
    while one == two:
        two = draw.randrange(1, len(leaves))
    leaves[one], leaves[two] = leaves[two], leaves[one]
    return leaves[: draw.randrange(max(seen, two + 1), len(leaves) + 1)]


def truncate(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    return leaves[: draw.randrange(1, seen)]


def restore_backup(draw: random.Random, leaves: list[bytes], seen: int) -> list[bytes]:
    """The log goes on from where an old backup ends, until it is as large as before, or larger."""
    kept = draw.randrange(1, seen)
    grown = [other(draw, draw.choice(leaves)) for _ in range(seen - kept + draw.randrange(4))]
    return leaves[:kept] + grown


ATTACKS: tuple[Attack, ...] = (rewrite, delete, insert, swap, truncate, restore_backup)


@dataclass(frozen=True)
class Scene:
    """Three witnesses that all cosigned the first `seen` entries, and the note that says so."""

    seen: int
    witnesses: tuple[Witness, ...]
    note: bytes


@pytest.fixture(scope="module")
def scenes(honest, tmp_path_factory) -> list[Scene]:
    leaves = honest.world.log.leaves
    return [scene(honest, leaves, seen, tmp_path_factory.mktemp("witnesses")) for seen in (20, 27, 32, 33)]


def scene(honest, leaves: list[bytes], seen: int, folder: Path) -> Scene:
    note = signed(honest, leaves[:seen])
    witnesses = []
    for hospital in honest.world.hospitals:
        place = folder / f"{hospital.name}.json"
        witnesses.append(Witness.create(place, hospital.note_signer, honest.world.log_signer.vkey))
        note = add_signatures(note, [witnesses[-1].cosign(note, 0, [], NOW_S - 60)])
    return Scene(seen, tuple(witnesses), note)


def signed(honest, leaves: list[bytes]) -> bytes:
    hashes = [hash_leaf(leaf) for leaf in leaves]
    return sign_checkpoint(Checkpoint(ORIGIN, len(hashes), root_of(hashes)), honest.world.log_signer)


def attack(honest, scenes: list[Scene], make: Attack, times: int) -> Counter[str]:
    """Forge, ask every witness, then show the verifier a file of the forged log."""
    draw, counted = random.Random(make.__name__), Counter[str]()
    for _ in range(times):
        scene = draw.choice(scenes)
        forged = make(draw, list(honest.world.log.leaves), scene.seen)
        note = signed(honest, forged)
        for witness in scene.witnesses:
            state = witness.path.read_bytes()
            for old, proof in requests(draw, forged, scene.seen):
                with pytest.raises(WitnessError) as caught:
                    witness.cosign(note, old, proof, NOW_S)
                assert type(caught.value) in (WitnessProofError, WitnessConflictError, WitnessRequestError)
                counted["refused"] += 1
            assert witness.path.read_bytes() == state
        report = show(honest, scene, draw, forged, note)
        assert report.verdict is not Verdict.VALID, report.text()
        assert report.step(CHECKPOINT).word in (Word.FAIL, Word.NO_EVIDENCE), report.text()
        counted["not accepted"] += 1
    return counted


def requests(draw: random.Random, forged: list[bytes], seen: int) -> list[tuple[int, list[bytes]]]:
    """Ways to ask: the forged tree's own proof from where the witness stands, none, and a lie about that."""
    hashes = [hash_leaf(leaf) for leaf in forged]
    if len(forged) < seen:
        return [(seen, []), (draw.randrange(len(forged) + 1), []), (0, [])]
    own = consistency_proof_of(hashes, seen)
    lower = draw.randrange(seen)
    return [(seen, own), (seen, list(reversed(own))[:-1]), (lower, consistency_proof_of(hashes, lower))]


def show(honest, scene: Scene, draw: random.Random, forged: list[bytes], note: bytes):
    """Let the verifier judge the forged log, with the lines that the operator can put under its note."""
    stolen: NoteSigner = draw.choice(honest.world.hospitals).note_signer
    old_lines = [line + b"\n" for line in scene.note.split(b"\n") if line.startswith("— ".encode())][1:]
    lines = {
        "none": [],
        "of the honest checkpoint": old_lines,
        "of one witness whose key was stolen": [cosign(note, stolen, NOW_S)],
        "of one witness, many times": [cosign(note, stolen, NOW_S + n) for n in range(3)],
    }[draw.choice(("none", "of the honest checkpoint", "of one witness whose key was stolen",
                   "of one witness, many times"))]  # fmt: skip
    log = MemoryLog()
    log.leaves = forged
    alone = [index for index, leaf in enumerate(forged) if columns_of(leaf).type in ALONE]
    data = export_evidence(
        log, honest.world.blobs.get, leaf_index=draw.choice(alone), checkpoint=add_signatures(note, lines)
    )
    return honest.world.report(data)


@pytest.mark.parametrize("make", ATTACKS)
def test_no_witness_cosigns_a_forged_history_and_no_verifier_accepts_it(honest, scenes, make):
    assert attack(honest, scenes, make, 25) == {"refused": 25 * 9, "not accepted": 25}


@pytest.mark.soak
@pytest.mark.parametrize("make", ATTACKS)
def test_a_thousand_forged_histories_are_all_refused(honest, scenes, make, report: Report):
    counted = attack(honest, scenes, make, 1000)
    assert counted == {"refused": 9000, "not accepted": 1000}
    report(
        "operator",
        size=f"1,000 x {make.__name__.replace('_', ' ')}",
        result="9,000 requests to 3 witnesses, 0 cosigned; 1,000 files under 2 of 3, 0 VALID",
    )


def test_honest_growth_is_cosigned_and_accepted(honest, tmp_path):
    """Else the refusals above would mean nothing."""
    leaves = honest.world.log.leaves
    stage = scene(honest, leaves, 20, tmp_path)
    note = signed(honest, leaves)
    proof = consistency_proof_of([hash_leaf(leaf) for leaf in leaves], 20)
    lines = [witness.cosign(note, 20, proof, NOW_S - 60) for witness in stage.witnesses[:2]]
    log = MemoryLog()
    log.leaves = leaves
    data = export_evidence(log, honest.world.blobs.get, leaf_index=1, checkpoint=add_signatures(note, lines))
    assert honest.world.report(data).verdict is Verdict.VALID
