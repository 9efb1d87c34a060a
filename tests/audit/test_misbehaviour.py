"""Proofs of misbehaviour: what convicts a log, and what must never convict an honest one."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import canonical_bytes
from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.errors import AuditError
from audit.keys import SigningKey
from audit.merkle import (
    consistency_proof_of,
    hash_leaf,
    prefix_proof,
    root_of,
    roots_from_prefix_proof,
    source_of,
)
from audit.misbehaviour import (
    InconclusiveError,
    Misbehaviour,
    MisbehaviourError,
    NoMisbehaviourError,
    prove_broken_promise,
    prove_fork,
    prove_two_leaves,
)
from audit.notes import KeyType, NoteSigner
from audit.receipts import issue_receipts
from audit.verify.cli import main
from audit.verify.misbehaviour import CONTRADICTION, verify_misbehaviour
from audit.verify.report import Verdict, Word

ORIGIN = "hospital.example/fork"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
THIEF = NoteSigner(ORIGIN, SigningKey.generate())
WITNESSES = [NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE) for name in ("east", "west")]
TRUE = [hash_leaf(b"%d" % i) for i in range(80)]
FALSE = [*TRUE[:3], hash_leaf(b"edited"), *TRUE[4:]]
POLICY = f"log {LOG.vkey}\nquorum none\n"
WITNESSED = "\n".join(
    [
        f"log {LOG.vkey}",
        *(f"witness {w.name} {w.vkey}" for w in WITNESSES),
        "group g all east west",
        "quorum g",
    ]
)


def note(leaves: list[bytes], signer: NoteSigner = LOG) -> bytes:
    return sign_checkpoint(Checkpoint(ORIGIN, len(leaves), root_of(leaves)), signer)


def verdict(found: Misbehaviour | bytes, policy: str | None = POLICY) -> Verdict:
    data = found if isinstance(found, bytes) else found.encode()
    return verify_misbehaviour(data, policy_text=policy).verdict


def test_every_prefix_proof_gives_both_roots() -> None:
    for size2 in range(2, 40):
        source = source_of(TRUE[:size2])
        for size1 in range(1, size2):
            roots = roots_from_prefix_proof(size1, size2, prefix_proof(source, size1, size2))
            assert roots == (root_of(TRUE[:size1]), root_of(TRUE[:size2]))


def test_two_roots_of_one_size_convict() -> None:
    found = prove_fork(note(TRUE[:20]), note(FALSE[:20]))
    assert found.kind == "split"
    assert verdict(found) is Verdict.VALID


@pytest.mark.parametrize("size1", [4, 5, 7, 8, 16, 31, 32, 33, 63, 64])
def test_rewritten_history_convicts_at_any_pair_of_sizes(size1: int) -> None:
    for size2 in (size1 + 1, 80):
        found = prove_fork(note(FALSE[:size2]), note(TRUE[:size1]), larger=source_of(FALSE[:size2]))
        assert found.kind == "rewrite"
        assert verdict(found) is Verdict.VALID


def test_lying_consistency_proof_convicts_by_itself_when_it_holds_the_larger_tree() -> None:
    offered = consistency_proof_of(FALSE[:40], 21)
    found = prove_fork(note(TRUE[:21]), note(FALSE[:40]), offered=offered)
    assert (found.kind, verdict(found)) == ("rewrite", Verdict.VALID)


@pytest.mark.parametrize("larger", [FALSE[:40], TRUE[:40]], ids=["rewritten", "honest"])
@pytest.mark.parametrize("offered", [[], [b"x" * 32], consistency_proof_of(FALSE[:40], 15)])
def test_failing_proof_alone_convicts_nobody(larger: list[bytes], offered: list[bytes]) -> None:
    """Any accuser can invent a proof that fails, also between two honest checkpoints."""
    found = prove_fork(note(TRUE[:16]), note(larger), offered=offered)
    assert found.kind == "unproved"
    report = verify_misbehaviour(found.encode(), policy_text=POLICY)
    assert report.verdict is Verdict.INCOMPLETE
    assert report.step(CONTRADICTION).word is Word.NO_EVIDENCE
    with pytest.raises(InconclusiveError):
        found.contradiction()


def test_honest_growth_is_never_a_fork() -> None:
    for size1, size2 in ((1, 2), (5, 9), (8, 80), (64, 80)):
        for proof in (
            {"larger": source_of(TRUE[:size2])},
            {"offered": consistency_proof_of(TRUE[:size2], size1)},
        ):
            with pytest.raises(NoMisbehaviourError):
                prove_fork(note(TRUE[:size1]), note(TRUE[:size2]), **proof)
    with pytest.raises(NoMisbehaviourError):
        prove_fork(note(TRUE[:5]), note(TRUE[:5]))
    with pytest.raises(NoMisbehaviourError):
        prove_fork(note([]), note(TRUE[:5]), offered=[])


def test_honest_log_cannot_be_framed_with_its_own_notes() -> None:
    honest = [note(TRUE[:5]).decode(), note(TRUE[:9]).decode()]
    path = [item.hex() for item in prefix_proof(source_of(TRUE[:9]), 5, 9)]
    blank = {"format": "affidavit-misbehaviour/1", "leaf_index": -1, "leaf_hashes": [], "receipt": {}}
    frames = [
        {**blank, "kind": "split", "notes": honest, "paths": []},
        {**blank, "kind": "rewrite", "notes": honest, "paths": [path]},
        {**blank, "kind": "rewrite", "notes": honest, "paths": [["11" * 32, *path[1:]]]},
        {**blank, "kind": "rewrite", "notes": honest, "paths": [[]]},
        {**blank, "kind": "unproved", "notes": honest,
         "paths": [[item.hex() for item in consistency_proof_of(TRUE[:9], 5)]]},
        {**blank, "kind": "split", "notes": honest[::-1], "paths": []},
    ]  # fmt: skip
    for frame in frames:
        assert verdict(canonical_bytes(frame)) is Verdict.INVALID


def test_signature_by_another_key_convicts_nobody() -> None:
    assert verdict(prove_fork(note(TRUE[:20]), note(FALSE[:20], THIEF))) is Verdict.INVALID
    assert verdict(prove_fork(note(TRUE[:20], THIEF), note(FALSE[:20], THIEF))) is Verdict.INVALID


def test_without_a_policy_it_is_only_consistent_with_itself() -> None:
    assert verdict(prove_fork(note(TRUE[:20]), note(FALSE[:20])), None) is Verdict.SELF_CONSISTENT_ONLY


def test_two_leaves_at_one_index_convict() -> None:
    found = prove_two_leaves(
        note(TRUE[:20]), note(FALSE[:40]), 3, source_of(TRUE[:20]), source_of(FALSE[:40])
    )
    assert verdict(found) is Verdict.VALID
    with pytest.raises(NoMisbehaviourError):
        prove_two_leaves(note(TRUE[:20]), note(FALSE[:40]), 4, source_of(TRUE[:20]), source_of(FALSE[:40]))


def test_receipt_for_a_leaf_that_was_swapped_convicts() -> None:
    (receipt,) = issue_receipts(
        LOG.key, ORIGIN, [(3, TRUE[3])], time="2026-01-01T00:00:00Z", merge_deadline="2026-01-01T01:00:00Z"
    )
    assert verdict(prove_broken_promise(receipt, note(FALSE[:20]), source_of(FALSE[:20]))) is Verdict.VALID
    with pytest.raises(NoMisbehaviourError):
        prove_broken_promise(receipt, note(TRUE[:20]), source_of(TRUE[:20]))
    with pytest.raises(MisbehaviourError):
        prove_broken_promise(receipt, note(TRUE[:20]))


@pytest.mark.parametrize(
    ("hours", "who", "expected"),
    [(2, 2, Verdict.VALID), (0, 2, Verdict.UNWITNESSED), (2, 1, Verdict.UNWITNESSED)],
)
def test_promise_is_broken_when_a_quorum_saw_the_small_tree_after_the_deadline(hours, who, expected) -> None:
    (receipt,) = issue_receipts(
        LOG.key, ORIGIN, [(30, TRUE[30])], time="2026-01-01T00:00:00Z", merge_deadline="2026-01-01T01:00:00Z"
    )
    at = int(datetime(2026, 1, 1, hours, 0, 1, tzinfo=UTC).timestamp())
    small = note(TRUE[:20])
    small = add_signatures(small, [cosign(small, w, at) for w in WITNESSES[:who]])
    assert verdict(prove_broken_promise(receipt, small), WITNESSED) is expected


def test_logs_of_different_names_do_not_contradict() -> None:
    other = NoteSigner("other.example/log", SigningKey.generate())
    elsewhere = sign_checkpoint(Checkpoint(other.name, 20, root_of(FALSE[:20])), other)
    with pytest.raises(MisbehaviourError):
        prove_fork(note(TRUE[:20]), elsewhere)


def test_no_single_bit_of_a_file_is_free() -> None:
    found = prove_fork(note(TRUE[:21]), note(FALSE[:40]), larger=source_of(FALSE[:40]))
    data = found.encode()
    for position in random.Random(5).sample(range(len(data) * 8), 400):
        altered = bytearray(data)
        altered[position // 8] ^= 1 << position % 8
        assert verdict(bytes(altered)) is Verdict.INVALID


@given(st.binary(max_size=400))
def test_any_bytes_parse_or_are_refused(data: bytes) -> None:
    with pytest.raises(MisbehaviourError):
        Misbehaviour.parse(data)
    assert verdict(data) is Verdict.INVALID


GOOD = json.loads(prove_fork(note(TRUE[:21]), note(FALSE[:40]), larger=source_of(FALSE[:40])).encode())
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(GOOD)), ANY_JSON)
def test_any_value_in_any_field_is_refused_with_a_named_error(field: str, value: object) -> None:
    try:
        data = canonical_bytes({**GOOD, field: value})
    except AuditError:
        return
    assert verdict(data) is (Verdict.VALID if value == GOOD[field] else Verdict.INVALID)


def test_command_says_what_the_file_proves(tmp_path, capsys) -> None:
    fork, policy = tmp_path / "fork.json", tmp_path / "policy.txt"
    fork.write_bytes(prove_fork(note(TRUE[:20]), note(FALSE[:20])).encode())
    policy.write_text(POLICY)
    assert main([str(fork), "--policy", str(policy)]) == 0
    assert "VALID: the accusation holds" in capsys.readouterr().out
    assert main([str(fork)]) == 3
    fork.write_bytes(fork.read_bytes()[:-1])
    assert main([str(fork), "--policy", str(policy)]) == 1
