"""The RFC 6962 / RFC 9162 Merkle tree over SHA-256: roots, proofs and their verification.

Writers append leaf hashes to a `CompactRange`. Provers hand `inclusion_proof` and `consistency_proof` a
node source: `get(level, index)` is the hash of the perfect subtree over leaves
[index << level, (index + 1) << level). Verifiers use the iterative algorithms of RFC 9162 sections 2.1.3.2
and 2.1.4.2, which also pin a proof's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from itertools import islice

from audit.errors import ConsistencyError, InclusionError, RootMismatchError, TreeRangeError

HASH_SIZE = 32
MAX_TREE_SIZE = 2**63 - 1
EMPTY_ROOT = sha256(b"").digest()

NodeSource = Callable[[int, int], bytes]
NodeSink = Callable[[int, int, bytes], None]
RowSink = Callable[[int, int, list[bytes]], None]

_LEAF = sha256(b"\x00")  # begun; a copy costs less than a beginning
_NODE = sha256(b"\x01")
_AT_ONCE = 4096  # leaves; what streams through a tree is bounded by it


def hash_leaf(entry: bytes) -> bytes:
    """Return SHA-256(0x00 || entry), RFC 6962 section 2.1."""
    return sha256(b"\x00" + entry).digest()


def hash_leaves(entries: Iterable[bytes]) -> list[bytes]:
    """`hash_leaf` of each entry, a tenth faster."""
    hashes: list[bytes] = []
    for entry in entries:
        begun = _LEAF.copy()
        begun.update(entry)
        hashes.append(begun.digest())
    return hashes


def hash_node(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 || left || right), RFC 6962 section 2.1."""
    return sha256(b"\x01" + left + right).digest()


def root_of(leaf_hashes: Iterable[bytes]) -> bytes:
    """Return the root of the tree over `leaf_hashes`, each 32 bytes."""
    edge, waiting = CompactRange(), iter(leaf_hashes)
    while some := list(islice(waiting, _AT_ONCE)):
        edge.extend(some)
    return edge.root()


class CompactRange:
    """The right edge of a growing tree: one perfect subtree hash per set bit of its size, largest first."""

    __slots__ = ("_hashes", "_size")

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """Resume an edge that was stored.

        Raises:
            TreeRangeError: the number or length of the hashes does not fit the size.
        """
        if not 0 <= size <= MAX_TREE_SIZE or len(hashes) != size.bit_count():
            raise TreeRangeError(f"a tree of {size} leaves has not {len(hashes)} edge hashes")
        if any(len(item) != HASH_SIZE for item in hashes):
            raise TreeRangeError("an edge hash is not 32 bytes")
        self._size, self._hashes = size, list(hashes)

    @property
    def size(self) -> int:
        return self._size

    @property
    def hashes(self) -> tuple[bytes, ...]:
        return tuple(self._hashes)

    def copy(self) -> CompactRange:
        return CompactRange(self._size, self._hashes)

    def append(self, leaf_hash: bytes, completed: NodeSink | None = None) -> int:
        """Add a leaf and return its index; `completed(level, index, hash)` sees every subtree it closes."""
        if len(leaf_hash) != HASH_SIZE:
            raise TreeRangeError("a leaf hash is not 32 bytes")
        leaf_index = self._size
        node, level, remaining = leaf_hash, 0, leaf_index
        while remaining & 1:
            node = hash_node(self._hashes.pop(), node)
            level += 1
            remaining >>= 1
            if completed is not None:
                completed(level, remaining, node)
        self._hashes.append(node)
        self._size += 1
        return leaf_index

    def extend(self, leaf_hashes: Sequence[bytes], completed: RowSink | None = None) -> int:
        """Add leaves, all of a level at once, and return the first one's index.

        `completed(level, index, hashes)` sees every subtree that is closed, neighbours together, low first.
        """
        if any(len(item) != HASH_SIZE for item in leaf_hashes):
            raise TreeRangeError("a leaf hash is not 32 bytes")
        first, row = self._size, list(leaf_hashes)
        index, level = first, 0
        loose = dict(zip(_levels(first), self._hashes, strict=True))
        while row:
            if index & 1:
                row = [loose.pop(level), *row]
                index -= 1
            if len(row) & 1:
                loose[level] = row.pop()
            parents: list[bytes] = []
            for left, right in zip(row[::2], row[1::2], strict=True):
                begun = _NODE.copy()
                begun.update(left + right)
                parents.append(begun.digest())
            row = parents
            index >>= 1
            level += 1
            if completed is not None and row:
                completed(level, index, row)
        self._size += len(leaf_hashes)
        self._hashes = [loose[level] for level in _levels(self._size)]
        return first

    def root(self) -> bytes:
        if not self._hashes:
            return EMPTY_ROOT
        root = self._hashes[-1]
        for left in reversed(self._hashes[:-1]):
            root = hash_node(left, root)
        return root


def edge_hashes(get: NodeSource, tree_size: int) -> list[bytes]:
    """Return the perfect subtree hashes whose `CompactRange` is the tree of the first `tree_size` leaves."""
    return [get(level, index) for level, index in _perfect_cover(0, tree_size)]


def root_from(get: NodeSource, tree_size: int) -> bytes:
    return CompactRange(tree_size, edge_hashes(get, tree_size)).root()


def inclusion_proof(get: NodeSource, leaf_index: int, tree_size: int) -> list[bytes]:
    """Return PATH(leaf_index, D[tree_size]) of RFC 9162 section 2.1.3.1, leaf's sibling first.

    Raises:
        TreeRangeError: unless 0 <= leaf_index < tree_size.
    """
    if not 0 <= leaf_index < tree_size <= MAX_TREE_SIZE:
        raise TreeRangeError(f"leaf {leaf_index} is not in a tree of {tree_size}")
    proof: list[bytes] = []
    node, last, level = leaf_index, tree_size - 1, 0
    while last:
        if node & 1:
            proof.append(get(level, node - 1))
        elif node < last - 1 or (node + 2) << level <= tree_size:
            proof.append(get(level, node + 1))
        elif node < last:  # the last sibling of a level need not be a perfect subtree
            proof.append(_range_root(get, (node + 1) << level, tree_size))
        node, last, level = node >> 1, last >> 1, level + 1
    return proof


def consistency_proof(get: NodeSource, size1: int, size2: int) -> list[bytes]:
    """Return PROOF(size1, D[size2]) of RFC 9162 section 2.1.4.1; empty for equal sizes and for size1 0.

    Raises:
        TreeRangeError: unless 0 <= size1 <= size2.
    """
    if not 0 <= size1 <= size2 <= MAX_TREE_SIZE:
        raise TreeRangeError(f"no consistency proof from size {size1} to {size2}")
    if size1 in (0, size2):
        return []
    begin, end, path, whole = 0, size2, [], True
    while end != size1:
        middle = begin + _split(end - begin)
        if size1 <= middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((begin, middle))
            begin, whole = middle, False
    if not whole:
        path.append((begin, end))
    return [_range_root(get, *part) for part in reversed(path)]


def source_of(leaf_hashes: Sequence[bytes]) -> NodeSource:
    """Return a node source over leaf hashes held in memory."""
    cache: dict[tuple[int, int], bytes] = {}

    def get(level: int, index: int) -> bytes:
        if not 0 <= index << level < (index + 1) << level <= len(leaf_hashes):
            raise TreeRangeError(f"node {index} of level {level} is not in a tree of {len(leaf_hashes)}")
        if level == 0:
            return leaf_hashes[index]
        if (level, index) not in cache:
            cache[level, index] = hash_node(get(level - 1, 2 * index), get(level - 1, 2 * index + 1))
        return cache[level, index]

    return get


def inclusion_proof_of(leaf_hashes: Sequence[bytes], leaf_index: int) -> list[bytes]:
    return inclusion_proof(source_of(leaf_hashes), leaf_index, len(leaf_hashes))


def inclusion_proofs_of(leaf_hashes: Sequence[bytes]) -> tuple[bytes, list[list[bytes]]]:
    """Return the root over these leaves, of which there is at least one, and every leaf's inclusion proof."""
    row, places = list(leaf_hashes), list(range(len(leaf_hashes)))
    proofs: list[list[bytes]] = [[] for _ in leaf_hashes]
    while (size := len(row)) > 1:
        for proof, place in zip(proofs, places, strict=True):
            if place ^ 1 < size:  # a last node without a sibling goes up as it is
                proof.append(row[place ^ 1])
        places = [place >> 1 for place in places]
        parents = [hash_node(left, right) for left, right in zip(row[::2], row[1::2], strict=False)]
        row = parents + row[2 * len(parents) :]
    return row[0], proofs


def consistency_proof_of(leaf_hashes: Sequence[bytes], size1: int) -> list[bytes]:
    return consistency_proof(source_of(leaf_hashes), size1, len(leaf_hashes))


def verify_inclusion(
    *, leaf_index: int, tree_size: int, leaf_hash: bytes, proof: Sequence[bytes], root_hash: bytes
) -> None:
    """Prove that `leaf_hash` is leaf `leaf_index` of the tree (RFC 9162 section 2.1.3.2).

    Raises:
        InclusionError: the index is outside the tree, a hash is not 32 bytes, or the proof's length is wrong.
        RootMismatchError: the proof leads to another root.
    """
    computed = root_from_inclusion_proof(leaf_index, tree_size, leaf_hash, proof)
    if computed != root_hash:
        raise RootMismatchError(expected=root_hash, computed=computed)


def root_from_inclusion_proof(
    leaf_index: int, tree_size: int, leaf_hash: bytes, proof: Sequence[bytes]
) -> bytes:
    """Return the only root under which `proof` shows `leaf_hash` at `leaf_index`.

    Raises:
        InclusionError: the index is outside the tree, a hash is not 32 bytes, or the proof's length is wrong.
    """
    if not 0 <= leaf_index < tree_size <= MAX_TREE_SIZE:
        raise InclusionError(f"leaf {leaf_index} is not in a tree of {tree_size}")
    _check_hashes(InclusionError, leaf_hash, *proof)
    node, last, computed = leaf_index, tree_size - 1, leaf_hash
    for sibling in proof:
        if last == 0:
            raise InclusionError(f"the proof of {len(proof)} hashes is too long for a tree of {tree_size}")
        if node & 1 or node == last:
            computed = hash_node(sibling, computed)
            while node & 1 == 0 and node:
                node >>= 1
                last >>= 1
        else:
            computed = hash_node(computed, sibling)
        node >>= 1
        last >>= 1
    if last:
        raise InclusionError(f"the proof of {len(proof)} hashes is too short for a tree of {tree_size}")
    return computed


def verify_consistency(*, size1: int, size2: int, root1: bytes, root2: bytes, proof: Sequence[bytes]) -> None:
    """Prove that the tree of `size2` extends the tree of `size1` (RFC 9162 section 2.1.4.2).

    Raises:
        ConsistencyError: size1 is 0 (everything extends nothing) or above size2, a hash is not 32 bytes, or
            the proof has another length.
        RootMismatchError: the proof leads to another old or new root.
    """
    if not 0 < size1 <= size2 <= MAX_TREE_SIZE:
        raise ConsistencyError(f"no tree of {size2} can be shown to extend a tree of {size1}")
    if size1 == size2:
        if proof:
            raise ConsistencyError("equal sizes take an empty proof")
        if root1 != root2:
            raise RootMismatchError(expected=root1, computed=root2)
        return
    _check_hashes(ConsistencyError, root1, root2, *proof)
    if not proof:
        raise ConsistencyError("the proof is empty")
    whole = size1 & (size1 - 1) == 0
    old, new = roots_from_prefix_proof(size1, size2, [root1, *proof] if whole else proof)
    if old != root1:
        raise RootMismatchError(expected=root1, computed=old)
    if new != root2:
        raise RootMismatchError(expected=root2, computed=new)


def prefix_proof(get: NodeSource, size1: int, size2: int) -> list[bytes]:
    """Return the consistency proof with the hash that RFC 9162 leaves out when size1 is a power of two.

    With it both roots follow from the proof alone: the tree of `size2` itself says which root its first
    `size1` leaves have.

    Raises:
        TreeRangeError: unless 0 < size1 < size2.
    """
    if not 0 < size1 < size2:
        raise TreeRangeError(f"no proof of the first {size1} leaves of a tree of {size2}")
    proof = consistency_proof(get, size1, size2)
    return [_range_root(get, 0, size1), *proof] if size1 & (size1 - 1) == 0 else proof


def roots_from_prefix_proof(size1: int, size2: int, proof: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the only roots (of the first `size1` leaves, of all `size2`) that a prefix proof fits.

    Raises:
        ConsistencyError: unless 0 < size1 < size2, or the proof has another length or a hash not 32 bytes.
    """
    if not 0 < size1 < size2 <= MAX_TREE_SIZE:
        raise ConsistencyError(f"no tree of {size2} can be shown to extend a tree of {size1}")
    _check_hashes(ConsistencyError, *proof)
    if not proof:
        raise ConsistencyError("the proof is empty")
    node, last = size1 - 1, size2 - 1
    while node & 1:
        node >>= 1
        last >>= 1
    old = new = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            raise ConsistencyError(f"the proof of {len(proof)} hashes is too long for sizes {size1}, {size2}")
        if node & 1 or node == last:
            old, new = hash_node(sibling, old), hash_node(sibling, new)
            while node & 1 == 0 and node:
                node >>= 1
                last >>= 1
        else:
            new = hash_node(new, sibling)
        node >>= 1
        last >>= 1
    if last:
        raise ConsistencyError(f"the proof of {len(proof)} hashes is too short for sizes {size1}, {size2}")
    return old, new


def _check_hashes(error: type[InclusionError] | type[ConsistencyError], *hashes: bytes) -> None:
    for item in hashes:
        if len(item) != HASH_SIZE:
            raise error(f"a hash has {len(item)} bytes, not {HASH_SIZE}")


def _levels(size: int) -> list[int]:
    """The levels of the perfect subtrees that a tree of `size` leaves is made of, largest first."""
    return [level for level in reversed(range(size.bit_length())) if size >> level & 1]


def _split(size: int) -> int:
    """The largest power of two below `size` >= 2."""
    return 1 << ((size - 1).bit_length() - 1)


def _perfect_cover(begin: int, end: int) -> list[tuple[int, int]]:
    """Nodes (level, index), left to right, of the perfect subtrees that fill [begin, end)."""
    cover = []
    while begin < end:
        level = (end - begin).bit_length() - 1
        if begin:
            level = min(level, (begin & -begin).bit_length() - 1)
        cover.append((level, begin >> level))
        begin += 1 << level
    return cover


def _range_root(get: NodeSource, begin: int, end: int) -> bytes:
    hashes = [get(level, index) for level, index in _perfect_cover(begin, end)]
    root = hashes.pop()
    while hashes:
        root = hash_node(hashes.pop(), root)
    return root
