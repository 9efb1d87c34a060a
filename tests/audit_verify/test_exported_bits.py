"""Every single bit of what leaves the machine: flipped, a file is refused, or it says the very same.

One thing alone may go: a witness whose name or key id is spoilt is a stranger, and strangers are ignored, so
the file stands with one cosignature fewer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from audit.canonical import canonical_bytes
from audit.checkpoints import Checkpoint, add_signatures, cosign, open_checkpoint, sign_checkpoint
from audit.errors import AuditError
from audit.evidence import EvidenceError, build_zip, read_evidence, read_zip
from audit.keys import SigningKey
from audit.merkle import hash_leaf, inclusion_proof_of, root_of
from audit.misbehaviour import Misbehaviour
from audit.notes import KeyType, NoteSigner
from audit.receipts import Receipt, issue_receipts, verify_receipt
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof, verify_tlog_proof
from audit.verify import Verdict
from audit.verify.misbehaviour import verify_misbehaviour
from tests.audit_verify.hospitals import NOW as NOW_OF_WORLD
from tests.soak_report import Report

ORIGIN = "hospital.example/bits"
NOW = 1_800_000_000
LOG = NoteSigner(ORIGIN, SigningKey.generate())
SITES = [NoteSigner(n, SigningKey.generate(), KeyType.COSIGNATURE) for n in ("east", "north", "west")]
STRANGER = NoteSigner("stranger", SigningKey.generate(), KeyType.COSIGNATURE)
POLICY = "\n".join(
    [
        f"log {LOG.vkey}",
        *(f"witness {site.name} {site.vkey}" for site in SITES),
        "group sites 2 east north west",
        "quorum sites",
    ]
)
LEAVES = [hash_leaf(b"%d" % n) for n in range(21)]
Judge = Callable[[bytes], tuple[object, frozenset[object]]]  # what the file says, and who else vouches


def flips(data: bytes, step: int) -> Iterator[tuple[int, bytes]]:
    flipped = bytearray(data)
    for bit in range(0, len(data) * 8, step):
        flipped[bit // 8] ^= 1 << bit % 8
        yield bit, bytes(flipped)
        flipped[bit // 8] ^= 1 << bit % 8


def signed(leaves: list[bytes], *cosigners: NoteSigner) -> bytes:
    note = sign_checkpoint(Checkpoint(ORIGIN, len(leaves), root_of(leaves)), LOG)
    return add_signatures(note, [cosign(note, site, NOW) for site in cosigners])


def checkpoint() -> tuple[bytes, Judge, bytes]:
    note = signed(LEAVES, *SITES, STRANGER)

    def judge(data: bytes) -> tuple[object, frozenset[object]]:
        opened = open_checkpoint(data, log=LOG.verifier, witnesses=[s.verifier for s in SITES], now=NOW)
        return opened.checkpoint, frozenset(opened.cosignatures)

    return note, judge, note[note.index(b"\xe2\x80\x94 stranger") :]


def tlog_proof() -> tuple[bytes, Judge, bytes]:
    proof = TlogProof(
        leaf_index=6,
        hashes=tuple(inclusion_proof_of(LEAVES, 6)),
        checkpoint_note=signed(LEAVES, *SITES),
        extra=b"read by nobody",
    )
    policy = Policy.parse(POLICY)

    def judge(data: bytes) -> tuple[object, frozenset[object]]:
        found = TlogProof.parse(data)
        accepted = verify_tlog_proof(found, leaf_hash=LEAVES[6], policy=policy, now=NOW)
        return (found.leaf_index, accepted.opened.checkpoint), frozenset(accepted.witnesses)

    return proof.format(), judge, proof.format().split(b"\n")[1]


def receipt() -> tuple[bytes, Judge, bytes]:
    made = issue_receipts(
        LOG.key, ORIGIN, list(enumerate(LEAVES)), time="2026-11-23T22:00:00Z",
        merge_deadline="2026-11-24T22:00:00Z",
    )[5]  # fmt: skip

    def judge(data: bytes) -> tuple[object, frozenset[object]]:
        found = Receipt.parse(data)
        verify_receipt(found, LOG.verifier)
        return found, frozenset()

    return made.encode(), judge, b""


def accusation() -> tuple[bytes, Judge, bytes]:
    forged = [*LEAVES[:4], hash_leaf(b"edited"), *LEAVES[5:]]
    made = Misbehaviour(kind="split", notes=(signed(LEAVES), signed(forged))).encode()

    def judge(data: bytes) -> tuple[object, frozenset[object]]:
        report = verify_misbehaviour(data, policy_text=POLICY, now=datetime.fromtimestamp(NOW, UTC))
        if report.verdict is not Verdict.VALID:
            raise AuditError(report.text())
        return report.text(), frozenset()

    return made, judge, b""


SMALL_FILES = [checkpoint, tlog_proof, receipt, accusation]


def examine(make: Callable[[], tuple[bytes, Judge, bytes]], step: int) -> tuple[int, int, int]:
    """Flip every `step`th bit; return how many were refused, made a witness a stranger, or mean nothing."""
    data, judge, idle = make()
    (honest, vouching), start = judge(data), data.index(idle)
    refused = meaningless = weaker = 0
    for bit, flipped in flips(data, step):
        try:
            said, still_vouching = judge(flipped)
        except AuditError:
            refused += 1
            continue
        assert said == honest, f"bit {bit} changes what the file says"
        if still_vouching == vouching:
            assert idle, f"bit {bit} is not refused"
            assert start <= bit // 8 < start + len(idle), f"bit {bit} is not refused"
            meaningless += 1
        else:
            assert still_vouching < vouching
            assert len(still_vouching) == len(vouching) - 1
            weaker += 1
    assert bool(meaningless) == bool(idle)
    return refused, weaker, meaningless


@pytest.mark.parametrize("make", SMALL_FILES)
def test_flipped_bit_of_a_small_file_changes_nothing_that_it_says(
    make: Callable[[], tuple[bytes, Judge, bytes]],
) -> None:
    refused, weaker, meaningless = examine(make, 17)
    assert refused > weaker + meaningless


@pytest.mark.soak
@pytest.mark.parametrize("make", SMALL_FILES)
def test_no_bit_of_a_small_file_changes_what_it_says(
    make: Callable[[], tuple[bytes, Judge, bytes]], report: Report
) -> None:
    refused, weaker, meaningless = examine(make, 1)
    said = f"{refused:,} refused"
    if weaker:
        said += f"; {weaker:,} make a witness a stranger, nothing else changes"
    if meaningless:
        said += f"; {meaningless:,} in a line that nobody signs or reads"
    bits = refused + weaker + meaningless
    report("evidence", size=f"{make.__name__.replace('_', ' ')}, all {bits:,} bits", result=said)


def refuse_all(data: bytes, first: int, last: int) -> None:
    flipped = bytearray(data)
    for bit in range(first, last):
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EvidenceError):
            read_evidence(bytes(flipped))
        flipped[bit // 8] ^= 1 << bit % 8


@pytest.mark.soak
@pytest.mark.parametrize("part", range(4))
def test_every_bit_of_an_evidence_file_is_refused(honest, report, part):
    bits = len(honest.data) * 8
    first, last = bits * part // 4, bits * (part + 1) // 4
    refuse_all(honest.data, first, last)
    report("evidence", size=f"evidence of a prediction, bits {first:,} to {last - 1:,}", result="all refused")


def test_bits_of_an_evidence_file_are_refused(honest):
    bits = len(honest.data) * 8
    for first in range(3, bits, bits // 400):
        refuse_all(honest.data, first, first + 1)


def packed_again(files: dict[str, bytes]) -> bytes:
    """What somebody writes who changes a member and then makes every digest right."""
    try:
        manifest = json.loads(files["manifest.json"])
        manifest["files"] = {
            name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "manifest.json"
        }
        files = {**files, "manifest.json": canonical_bytes(manifest)}
    except (ValueError, AuditError):
        pass  # the flip spoiled the manifest itself: it stays as it is
    return build_zip(files)


def forge(honest, data: bytes, places: list[tuple[str, int]]) -> Counter[str]:
    """Flip single bits of members, make all digests right, verify. Return how many passed, by member.

    What passes in the checkpoint is a witness turned stranger: the quorum holds without it.
    """
    files, policy, now = read_zip(data), Policy.parse(honest.world.policy), int(NOW_OF_WORLD.timestamp())
    before = policy.open(files["checkpoint"], now=now)
    passed: Counter[str] = Counter()
    for name, bit in places:
        member = bytearray(files[name])
        member[bit // 8] ^= 1 << bit % 8
        forged = packed_again({**files, name: bytes(member)})
        if forged == data:  # a digest in the manifest, which was put right again
            continue
        report = honest.world.report(forged)
        if report.verdict is Verdict.VALID:
            passed[name] += 1
            if name == "checkpoint":
                after = policy.open(bytes(member), now=now)
                assert after.opened.checkpoint == before.opened.checkpoint
                assert set(after.witnesses) < set(before.witnesses)
    return passed


def all_bits(data: bytes) -> list[tuple[str, int]]:
    return [(name, bit) for name, member in read_zip(data).items() for bit in range(len(member) * 8)]


def test_flipped_bit_under_right_digests_proves_nothing(honest):
    draw = random.Random(4)
    small = honest.world.evidence(0)
    assert forge(honest, small, draw.sample(all_bits(small), 300)).keys() <= {"checkpoint"}


def test_salt_in_capitals_is_no_other_text_of_the_same_salt(honest):
    """Flipping one bit of a hex digit makes it a capital, which a lenient parser reads as the same digit."""
    opened = read_zip(honest.data)["opened.json"]
    place = opened.index(b'_salt":"') + len(b'_salt":"')
    letter = next(at for at in range(place, place + 64) if opened[at : at + 1].isalpha())
    assert not forge(honest, honest.data, [("opened.json", letter * 8 + 5)])


@pytest.mark.soak
def test_no_flipped_bit_of_an_entrys_evidence_passes_under_right_digests(honest, report):
    small = honest.world.evidence(0)
    passed = forge(honest, small, all_bits(small))
    assert passed.keys() <= {"checkpoint"}
    report(
        "evidence",
        size=f"evidence of an entry, all {len(all_bits(small)):,} bits of its members, digests made right",
        result=f"none VALID but {passed['checkpoint']} that make a witness a stranger",
    )


@pytest.mark.soak
def test_no_flipped_bit_of_a_predictions_evidence_passes_under_right_digests(honest, report):
    """A few thousand of them: each verification replays the training run."""
    bits = all_bits(honest.data)
    passed = forge(honest, honest.data, random.Random(5).sample(bits, 3000))
    assert passed.keys() <= {"checkpoint"}
    report(
        "evidence",
        size=f"evidence of a prediction, 3,000 of {len(bits):,} bits, digests made right",
        result=f"none VALID but {passed['checkpoint']} that make a witness a stranger",
    )
