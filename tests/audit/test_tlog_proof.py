from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.errors import (
    AuditError,
    InclusionError,
    MalformedProofError,
    NoKnownSignatureError,
    RootMismatchError,
)
from audit.keys import SigningKey
from audit.merkle import hash_leaf, inclusion_proof_of, root_of
from audit.notes import KeyType, NoteSigner
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof, verify_tlog_proof

LEAVES = [hash_leaf(b"%d" % i) for i in range(11)]
LOG = NoteSigner("hospital.example/log", SigningKey.generate())
SITE = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
NOTE = sign_checkpoint(Checkpoint(LOG.name, 11, root_of(LEAVES)), LOG)
NOTE = add_signatures(NOTE, [cosign(NOTE, SITE, 100)])
POLICY = Policy.parse(f"log {LOG.vkey}\nwitness a {SITE.vkey}\nquorum a\n")
PROOF = TlogProof(leaf_index=4, hashes=tuple(inclusion_proof_of(LEAVES, 4)), checkpoint_note=NOTE)
DATA = PROOF.format()


def test_proof_has_the_c2sp_form_and_reads_back() -> None:
    assert DATA.startswith(b"c2sp.org/tlog-proof@v1\nindex 4\n")
    assert DATA.endswith(b"\n\n" + NOTE)
    assert TlogProof.parse(DATA) == PROOF
    extra = TlogProof(leaf_index=0, hashes=(), checkpoint_note=NOTE, extra=b"\n\n")
    assert TlogProof.parse(extra.format()) == extra


def test_honest_proof_verifies_with_its_quorum() -> None:
    accepted = verify_tlog_proof(TlogProof.parse(DATA), leaf_hash=LEAVES[4], policy=POLICY, now=100)
    assert accepted.quorum.satisfied
    assert accepted.opened.checkpoint.tree_size == 11


def test_single_leaf_tree_needs_no_hashes() -> None:
    note = sign_checkpoint(Checkpoint(LOG.name, 1, LEAVES[0]), LOG)
    proof = TlogProof(leaf_index=0, hashes=(), checkpoint_note=note)
    accepted = verify_tlog_proof(TlogProof.parse(proof.format()), leaf_hash=LEAVES[0], policy=POLICY, now=0)
    assert not accepted.quorum.satisfied


@pytest.mark.parametrize(
    ("index", "leaf"), [(3, LEAVES[4]), (4, LEAVES[3]), (5, LEAVES[4])], ids=["before", "other", "after"]
)
def test_proof_of_another_leaf_or_place_is_refused(index: int, leaf: bytes) -> None:
    proof = TlogProof(leaf_index=index, hashes=PROOF.hashes, checkpoint_note=NOTE)
    with pytest.raises(RootMismatchError):
        verify_tlog_proof(proof, leaf_hash=leaf, policy=POLICY, now=100)


def test_index_outside_the_tree_is_refused() -> None:
    proof = TlogProof(leaf_index=11, hashes=PROOF.hashes, checkpoint_note=NOTE)
    with pytest.raises(InclusionError):
        verify_tlog_proof(proof, leaf_hash=LEAVES[4], policy=POLICY, now=100)


def test_proof_under_an_unknown_log_key_is_refused() -> None:
    thief = NoteSigner(LOG.name, SigningKey.generate())
    note = sign_checkpoint(Checkpoint(LOG.name, 11, root_of(LEAVES)), thief)
    proof = TlogProof(leaf_index=4, hashes=PROOF.hashes, checkpoint_note=note)
    with pytest.raises(NoKnownSignatureError):
        verify_tlog_proof(proof, leaf_hash=LEAVES[4], policy=POLICY, now=100)


HASH = base64.b64encode(LEAVES[0])


MALFORMED = [
    b"",
    b"c2sp.org/tlog-proof@v1\n",
    DATA.replace(b"@v1", b"@v2"),
    DATA.replace(b"@v1\n", b"@v1\r\n"),
    b" " + DATA,
    DATA.replace(b"index 4\n", b""),
    DATA.replace(b"index 4\n", b"index 04\n"),
    DATA.replace(b"index 4\n", b"index +4\n"),
    DATA.replace(b"index 4\n", b"index -4\n"),
    DATA.replace(b"index 4\n", b"index 4 \n"),
    DATA.replace(b"index 4\n", b"Index 4\n"),
    DATA.replace(b"index 4\n", b"index 99999999999999999999\n"),
    DATA.replace(b"index 4\n", b"index 9223372036854775807\n"),
    DATA.replace(b"index 4\n", b"index 4\nextra AAAA\n"),
    DATA.replace(b"index 4\n", b"extra \nindex 4\n"),
    DATA.replace(b"index 4\n", b"extra AAA\nindex 4\n"),
    DATA.replace(b"index 4\n", b"extra AAAA\nextra AAAA\nindex 4\n"),
    DATA.replace(b"index 4\n", b"index 4\nAAAA\n"),
    DATA.replace(b"index 4\n", b"index 4\n" + HASH[:-2] + b"\n"),
    DATA.replace(b"index 4\n", b"index 4\n" + (HASH + b"\n") * 60),
    DATA.replace(b"\n\n", b"\n"),
    DATA.replace(b"\n\n", b"\n\n\n", 1),
    DATA[: -len(NOTE)],
    DATA[:-1],
    DATA[: -len(NOTE)] + b"hello\n\n" + NOTE.split(b"\n\n")[1],
    "c2sp.org/tlog-proof@v1\nindex \u0664\n\n".encode() + NOTE,
]


@pytest.mark.parametrize("data", MALFORMED, ids=[str(i) for i in range(len(MALFORMED))])
def test_malformed_proof_is_refused(data: bytes) -> None:
    assert data != DATA
    with pytest.raises(MalformedProofError):
        TlogProof.parse(data)


def test_every_flipped_bit_of_a_proof_is_refused_or_costs_the_quorum() -> None:
    for at in range(len(DATA)):
        flipped = DATA[:at] + bytes([DATA[at] ^ 1 << (at % 8)]) + DATA[at + 1 :]
        try:
            accepted = verify_tlog_proof(
                TlogProof.parse(flipped), leaf_hash=LEAVES[4], policy=POLICY, now=100
            )
        except AuditError:
            continue
        assert not accepted.quorum.satisfied


@given(st.integers(0, len(DATA)), st.integers(0, len(DATA)), st.binary(max_size=30))
def test_fuzzed_proof_raises_the_declared_error_only(start: int, stop: int, middle: bytes) -> None:
    try:
        proof = TlogProof.parse(DATA[:start] + middle + DATA[stop:])
    except MalformedProofError:
        return
    assert TlogProof.parse(proof.format()) == proof
