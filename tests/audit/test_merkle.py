from __future__ import annotations

import base64
import functools
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import AuditError, ConsistencyError, InclusionError, RootMismatchError, TreeRangeError
from audit.merkle import (
    EMPTY_ROOT,
    CompactRange,
    consistency_proof,
    consistency_proof_of,
    hash_leaf,
    hash_leaves,
    hash_node,
    inclusion_proof,
    inclusion_proof_of,
    inclusion_proofs_of,
    root_from,
    root_of,
    source_of,
    verify_consistency,
    verify_inclusion,
)
from tests.soak_report import Report

# RFC 6962 reference: the inputs of certificate-transparency's merkletree tests and the root after each.
REFERENCE_ENTRIES = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
REFERENCE_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [hash_leaf(b"%d" % i) for i in range(66)]


def reference_root(leaf_hashes: list[bytes]) -> bytes:
    """RFC 6962 section 2.1, word for word."""
    if not leaf_hashes:
        return hashlib.sha256(b"").digest()
    if len(leaf_hashes) == 1:
        return leaf_hashes[0]
    k = 1
    while k * 2 < len(leaf_hashes):
        k *= 2
    return hash_node(reference_root(leaf_hashes[:k]), reference_root(leaf_hashes[k:]))


@functools.cache
def roots() -> list[bytes]:
    return [reference_root(LEAVES[:n]) for n in range(len(LEAVES) + 1)]


def outcome(check: Callable[[], None]) -> str:
    try:
        check()
    except AuditError as error:
        return error.code
    return "ok"


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(folder.rglob("*.json"))]


def raw(text: str | None) -> bytes:
    return base64.b64decode(text or "")


@pytest.mark.reported
def test_inclusion_vectors_have_their_stated_outcome(shared_vectors: Path, report: Report) -> None:
    cases = load(shared_vectors / "merkle/inclusion")
    assert len(cases) == 98
    for case in cases:
        found = outcome(
            lambda case=case: verify_inclusion(  # type: ignore[misc]
                leaf_index=case["leafIdx"],
                tree_size=case["treeSize"],
                leaf_hash=raw(case["leafHash"]),
                root_hash=raw(case["root"]),
                proof=[raw(item) for item in case["proof"] or []],
            )
        )
        hostile = found in {"audit.inclusion", "audit.root_mismatch"}
        assert hostile if case["wantErr"] else found == "ok", case["desc"]
    report("vectors", size="98 inclusion proofs (transparency-dev)", result="98 as stated")


@pytest.mark.reported
def test_consistency_vectors_have_their_stated_outcome(shared_vectors: Path, report: Report) -> None:
    cases = load(shared_vectors / "merkle/consistency")
    assert len(cases) == 98
    for case in cases:
        found = outcome(
            lambda case=case: verify_consistency(  # type: ignore[misc]
                size1=case["size1"],
                size2=case["size2"],
                root1=raw(case["root1"]),
                root2=raw(case["root2"]),
                proof=[raw(item) for item in case["proof"] or []],
            )
        )
        hostile = found in {"audit.consistency", "audit.root_mismatch"}
        assert hostile if case["wantErr"] else found == "ok", case["desc"]
    report("vectors", size="98 consistency proofs (transparency-dev)", result="98 as stated")


@pytest.mark.reported
def test_eight_reference_roots_of_rfc6962(report: Report) -> None:
    hashes = [hash_leaf(bytes.fromhex(entry)) for entry in REFERENCE_ENTRIES]
    assert root_of([]) == EMPTY_ROOT
    assert [root_of(hashes[: n + 1]).hex() for n in range(8)] == REFERENCE_ROOTS
    report("vectors", size="8 reference roots (RFC 6962)", result="8 as stated")


def test_every_inclusion_proof_up_to_66_leaves_verifies() -> None:
    get = source_of(LEAVES)
    for size in range(1, 67):
        assert root_of(LEAVES[:size]) == root_from(get, size) == roots()[size]
        for index in range(size):
            proof = inclusion_proof(get, index, size)
            verify_inclusion(
                leaf_index=index,
                tree_size=size,
                leaf_hash=LEAVES[index],
                proof=proof,
                root_hash=roots()[size],
            )


def test_every_consistency_proof_up_to_66_leaves_verifies() -> None:
    get = source_of(LEAVES)
    for size2 in range(1, 67):
        for size1 in range(1, size2 + 1):
            proof = consistency_proof(get, size1, size2)
            verify_consistency(
                size1=size1, size2=size2, root1=roots()[size1], root2=roots()[size2], proof=proof
            )


@given(st.data())
def test_mutated_inclusion_proof_is_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 66))
    index = data.draw(st.integers(0, size - 1))
    proof = inclusion_proof_of(LEAVES[:size], index)
    kind = data.draw(st.sampled_from(["flip", "drop", "add", "swap", "index", "size", "leaf"]))
    changed, other_index, other_size, leaf = list(proof), index, size, LEAVES[index]
    if kind == "flip" and proof:
        at, bit = data.draw(st.integers(0, len(proof) - 1)), data.draw(st.integers(0, 255))
        changed[at] = (int.from_bytes(proof[at], "big") ^ 1 << bit).to_bytes(32, "big")
    elif kind == "drop" and proof:
        changed.pop(data.draw(st.integers(0, len(proof) - 1)))
    elif kind == "add":
        changed.insert(data.draw(st.integers(0, len(proof))), data.draw(st.sampled_from(LEAVES)))
    elif kind == "swap" and len(proof) > 1:
        changed.reverse()
    elif kind == "index":
        other_index = data.draw(st.integers(-1, 70).filter(lambda i: i != index))
    elif kind == "leaf":
        leaf = hash_leaf(b"another")
    else:
        other_size = data.draw(st.integers(0, 140).filter(lambda s: s.bit_length() != size.bit_length()))
    with pytest.raises((InclusionError, RootMismatchError)):
        verify_inclusion(
            leaf_index=other_index,
            tree_size=other_size,
            leaf_hash=leaf,
            proof=changed,
            root_hash=roots()[size],
        )


@given(st.data())
def test_mutated_consistency_proof_is_refused(data: st.DataObject) -> None:
    size2 = data.draw(st.integers(2, 66))
    size1 = data.draw(st.integers(1, size2 - 1))
    proof = consistency_proof_of(LEAVES[:size2], size1)
    changed = list(proof)
    kind = data.draw(st.sampled_from(["flip", "drop", "add", "empty"]))
    at = data.draw(st.integers(0, len(proof) - 1))
    if kind == "flip":
        changed[at] = (int.from_bytes(proof[at], "big") ^ 1 << data.draw(st.integers(0, 255))).to_bytes(
            32, "big"
        )
    elif kind == "drop":
        changed.pop(at)
    elif kind == "add":
        changed.insert(at, data.draw(st.sampled_from(LEAVES)))
    else:
        changed = []
    with pytest.raises((ConsistencyError, RootMismatchError)):
        verify_consistency(
            size1=size1, size2=size2, root1=roots()[size1], root2=roots()[size2], proof=changed
        )


def test_linear_fake_of_two_histories_is_refused() -> None:
    """The proof's middle is bound to both roots: an altered early leaf never passes (CVE-2022-36111)."""
    chooser = random.Random(7)
    for _ in range(200):
        size2 = chooser.randrange(2, 67)
        size1 = chooser.randrange(1, size2)
        forged = list(LEAVES[:size2])
        forged[chooser.randrange(size1)] = hash_leaf(b"rewritten")
        with pytest.raises(RootMismatchError):
            verify_consistency(
                size1=size1,
                size2=size2,
                root1=roots()[size1],
                root2=root_of(forged),
                proof=consistency_proof_of(forged, size1),
            )


def test_consistency_from_size_zero_is_refused() -> None:
    with pytest.raises(ConsistencyError):
        verify_consistency(size1=0, size2=5, root1=EMPTY_ROOT, root2=roots()[5], proof=[])


def test_root_mismatch_carries_both_roots() -> None:
    with pytest.raises(RootMismatchError) as caught:
        verify_inclusion(leaf_index=0, tree_size=1, leaf_hash=LEAVES[0], proof=[], root_hash=LEAVES[1])
    assert (caught.value.expected, caught.value.computed) == (LEAVES[1], LEAVES[0])


def test_stored_edge_resumes_where_it_stopped() -> None:
    edge = CompactRange()
    for size, leaf in enumerate(LEAVES):
        edge = CompactRange(edge.size, edge.hashes)
        assert edge.append(leaf) == size
        assert edge.root() == roots()[size + 1]


@pytest.mark.parametrize(
    ("size", "hashes"),
    [(1, []), (2, [LEAVES[0]] * 2), (3, [LEAVES[0]]), (-1, []), (2**63, [LEAVES[0]]), (1, [b"x"])],
)
def test_edge_that_does_not_fit_its_size_is_refused(size: int, hashes: list[bytes]) -> None:
    with pytest.raises(TreeRangeError):
        CompactRange(size, hashes)


def test_completed_subtrees_are_reported_with_their_hash() -> None:
    seen: dict[tuple[int, int], bytes] = {}
    edge = CompactRange()
    for leaf in LEAVES:
        edge.append(leaf, lambda level, index, node: seen.__setitem__((level, index), node))
    get = source_of(LEAVES)
    assert len(seen) == 66 - len(edge.hashes)
    assert all(get(level, index) == node for (level, index), node in seen.items())


@pytest.mark.parametrize(("index", "size"), [(-1, 5), (5, 5), (0, 0)])
def test_proof_of_a_leaf_outside_the_tree_is_refused(index: int, size: int) -> None:
    with pytest.raises(TreeRangeError):
        inclusion_proof(source_of(LEAVES), index, size)


@pytest.mark.parametrize(("size1", "size2"), [(-1, 5), (6, 5)])
def test_proof_between_impossible_sizes_is_refused(size1: int, size2: int) -> None:
    with pytest.raises(TreeRangeError):
        consistency_proof(source_of(LEAVES), size1, size2)


@given(st.lists(st.lists(st.binary(max_size=4), max_size=70), max_size=8))
def test_extending_closes_the_same_subtrees_as_appending_one_by_one(batches: list[list[bytes]]) -> None:
    one, many = CompactRange(), CompactRange()
    singly: set[tuple[int, int, bytes]] = set()
    together: set[tuple[int, int, bytes]] = set()
    for batch in batches:
        hashes = hash_leaves(batch)
        assert hashes == [hash_leaf(entry) for entry in batch]
        first = one.size
        for leaf_hash in hashes:
            one.append(leaf_hash, lambda *node: singly.add(node))
        assert first == many.extend(
            hashes, lambda level, at, row: together.update((level, at + i, n) for i, n in enumerate(row))
        )
        assert (many.size, many.hashes, many.root()) == (one.size, one.hashes, one.root())
        assert singly == together


def test_extending_by_something_else_than_hashes_changes_nothing() -> None:
    edge = CompactRange()
    edge.extend([hash_leaf(b"a")] * 3)
    before = edge.hashes
    with pytest.raises(TreeRangeError):
        edge.extend([hash_leaf(b"b"), b"short"])
    assert (edge.size, edge.hashes) == (3, before)


def test_all_proofs_at_once_are_the_definitions() -> None:
    for size in range(1, 67):
        leaves = [hash_leaf(bytes([number])) for number in range(size)]
        root, proofs = inclusion_proofs_of(leaves)
        assert root == root_of(leaves)
        assert proofs == [inclusion_proof_of(leaves, number) for number in range(size)]
