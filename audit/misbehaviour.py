"""A file that convicts a log: what it signed twice, and why both cannot be true.

Whoever finds two checkpoints that contradict each other keeps them in this form, and anyone with the log's
key (from a policy obtained elsewhere) can judge the file without trusting the accuser. It is canonical JSON:

    format       "affidavit-misbehaviour/1"
    kind         split     two checkpoints of one size with different roots
                 rewrite   the larger tree's own prefix proof gives its first leaves another root
                 leaf      each tree proves another leaf at one index
                 receipt   a receipt's leaf is not where the log promised it
                 unproved  two checkpoints and a consistency proof that fails: a question, no conviction
    notes        the signed notes, smaller tree first; one for a receipt
    leaf_index   of `leaf` and `receipt`, otherwise -1
    leaf_hashes  hex; of `leaf` two, of `receipt` the leaf that stands there instead, or none
    paths        lists of hex hashes: rewrite one prefix proof, leaf two inclusion proofs, receipt one or
                 none, unproved the consistency proof as it was offered
    receipt      the receipt's fields, or {}

A consistency proof that fails can be forged by any accuser, so `unproved` convicts nobody: it obliges the
log to show the proof that it owes. A rewrite is conclusive because its hashes lead to a root the log signed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import Checkpoint, parse_checkpoint_note
from audit.errors import AuditError, ProofError
from audit.merkle import (
    HASH_SIZE,
    NodeSource,
    inclusion_proof,
    prefix_proof,
    root_from_inclusion_proof,
    roots_from_prefix_proof,
    verify_consistency,
)
from audit.receipts import Receipt

FORMAT: Final = "affidavit-misbehaviour/1"
MAX_BYTES: Final = 1 << 20
KINDS: Final = ("split", "rewrite", "leaf", "receipt", "unproved")
_MAX_PATH: Final = 64
_NO_LEAF: Final = -1
_HASH = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"format", "kind", "notes", "leaf_index", "leaf_hashes", "paths", "receipt"}
_SHAPES: Final = {
    "split": ((2, 0, 0),),
    "rewrite": ((2, 0, 1),),
    "leaf": ((2, 2, 2),),
    "receipt": ((1, 1, 1), (1, 0, 0)),
    "unproved": ((2, 0, 1),),
}  # how many notes, leaf hashes and paths


class MisbehaviourError(AuditError):
    """The bytes are not such a file, or two notes do not contradict each other."""

    code = "audit.misbehaviour"


class NoMisbehaviourError(MisbehaviourError):
    """The two notes are consistent: there is nobody to accuse."""

    code = "audit.no_misbehaviour"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misbehaviour:
    """The content of a file; nothing in it is believed before its signatures are checked."""

    kind: str
    notes: tuple[bytes, ...]
    leaf_index: int = _NO_LEAF
    leaf_hashes: tuple[bytes, ...] = ()
    paths: tuple[tuple[bytes, ...], ...] = ()
    receipt: Receipt | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MisbehaviourError(f"kind {self.kind[:40]!r} is none of {', '.join(KINDS)}")
        shape = (len(self.notes), len(self.leaf_hashes), len(self.paths))
        if shape not in _SHAPES[self.kind]:
            raise MisbehaviourError(f"{self.kind}: has {shape} notes, leaf hashes and paths")
        if any(len(path) > _MAX_PATH for path in self.paths):
            raise MisbehaviourError(f"{self.kind}: a path is longer than {_MAX_PATH} hashes")
        if any(len(item) != HASH_SIZE for item in (*self.leaf_hashes, *(h for p in self.paths for h in p))):
            raise MisbehaviourError(f"{self.kind}: a hash is not 32 bytes")
        if (self.kind in ("leaf", "receipt")) != (self.leaf_index >= 0) or self.leaf_index < _NO_LEAF:
            raise MisbehaviourError(f"{self.kind}: leaf_index {self.leaf_index} does not belong here")
        if (self.kind == "receipt") != (self.receipt is not None):
            raise MisbehaviourError(f"{self.kind}: a receipt belongs to kind receipt and only there")
        found = self.checkpoints
        if len({item.origin for item in found}) != 1:
            raise MisbehaviourError("the two checkpoints are of different logs; that contradicts nothing")
        if [item.tree_size for item in found] != sorted(item.tree_size for item in found):
            raise MisbehaviourError("the smaller tree comes first")
        if self.receipt is not None and (
            self.receipt.origin != found[0].origin or self.receipt.leaf_index != self.leaf_index
        ):
            raise MisbehaviourError("the receipt is of another log or leaf than the checkpoint")

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The notes' checkpoints; no signature is believed yet."""
        try:
            return tuple(parse_checkpoint_note(note) for note in self.notes)
        except AuditError as error:
            raise MisbehaviourError(f"a note is no checkpoint: {error}") from error

    @property
    def origin(self) -> str:
        return self.checkpoints[0].origin

    def encode(self) -> bytes:
        return canonical_bytes(
            {
                "format": FORMAT,
                "kind": self.kind,
                "notes": [note.decode() for note in self.notes],
                "leaf_index": self.leaf_index,
                "leaf_hashes": [item.hex() for item in self.leaf_hashes],
                "paths": [[item.hex() for item in path] for path in self.paths],
                "receipt": {} if self.receipt is None else self.receipt.to_json(),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Misbehaviour:
        """Read a file in its only form.

        Raises:
            MisbehaviourError: anything else.
        """
        if len(data) > MAX_BYTES:
            raise MisbehaviourError(f"{len(data)} bytes; at most {MAX_BYTES}")
        try:
            document = parse_canonical(data)
        except AuditError as error:
            raise MisbehaviourError(str(error)) from error
        match document:
            case {
                "format": str(found),
                "kind": str(kind),
                "notes": [*notes],
                "leaf_index": int(leaf_index),
                "leaf_hashes": [*leaf_hashes],
                "paths": [*paths],
                "receipt": dict(receipt),
                **others,
            } if found == FORMAT and not others and not isinstance(leaf_index, bool):
                try:
                    return cls(
                        kind=kind,
                        notes=tuple(_note(note) for note in notes),
                        leaf_index=leaf_index,
                        leaf_hashes=_hashes(leaf_hashes),
                        paths=tuple(_hashes(path) for path in paths),
                        receipt=Receipt.from_json(receipt) if receipt else None,
                    )
                except MisbehaviourError:
                    raise
                except AuditError as error:
                    raise MisbehaviourError(str(error)) from error
        raise MisbehaviourError(f"a file of format {FORMAT} has exactly the fields {sorted(_FIELDS)}")

    def contradiction(self) -> str:
        """Return in one sentence why the notes cannot both be honest, whoever signed them.

        Raises:
            MisbehaviourError: they can, or nothing here shows that they cannot.
        """
        first, second = self.checkpoints[0], self.checkpoints[-1]
        try:
            if self.kind == "split":
                return _split(first, second)
            if self.kind == "rewrite":
                return _rewrite(first, second, self.paths[0])
            if self.kind == "leaf":
                return _two_leaves(self.leaf_index, (first, second), self.leaf_hashes, self.paths)
            if self.kind == "receipt":
                return self._broken_promise(first)
            verify_consistency(
                size1=first.tree_size,
                size2=second.tree_size,
                root1=first.root_hash,
                root2=second.root_hash,
                proof=self.paths[0],
            )
        except ProofError as error:
            if self.kind == "unproved":
                raise InconclusiveError(
                    f"the log owes a consistency proof from size {first.tree_size} to {second.tree_size}; "
                    f"the one offered fails ({error})"
                ) from error
            raise MisbehaviourError(f"a proof in the file does not hold: {error}") from error
        raise NoMisbehaviourError("the consistency proof in the file holds: the log only grew")

    def _broken_promise(self, checkpoint: Checkpoint) -> str:
        if self.receipt is None:
            raise MisbehaviourError("a broken promise needs its receipt")
        if not self.leaf_hashes:
            if checkpoint.tree_size > self.leaf_index:
                raise MisbehaviourError("the checkpoint is large enough; show which leaf stands there")
            return (
                f"leaf {self.leaf_index} was promised by {self.receipt.merge_deadline}, "
                f"and a later checkpoint has {checkpoint.tree_size} entries"
            )
        _at(self.leaf_index, checkpoint, self.leaf_hashes[0], self.paths[0])
        if self.leaf_hashes[0] == self.receipt.leaf_hash:
            raise NoMisbehaviourError("the receipt's leaf is where it was promised")
        return f"leaf {self.leaf_index} is another one than the receipt promised"


class InconclusiveError(MisbehaviourError):
    """The file asks the log a question and convicts nobody."""

    code = "audit.misbehaviour_unproved"


def prove_fork(
    first: bytes, second: bytes, *, larger: NodeSource | None = None, offered: Sequence[bytes] | None = None
) -> Misbehaviour:
    """Return the file on two notes of one log that contradict each other.

    Args:
        first: one signed note. second: the other; their order does not matter.
        larger: reads the nodes of the larger tree (a log file, or tiles), to show what its first leaves are.
        offered: the consistency proof that somebody gave between the two.

    Raises:
        NoMisbehaviourError: the notes are consistent.
        MisbehaviourError: nothing given can show that they are not.
    """
    notes = tuple(sorted((first, second), key=lambda note: parse_checkpoint_note(note).tree_size))
    small, large = (parse_checkpoint_note(note) for note in notes)
    if small.origin != large.origin:
        raise MisbehaviourError("the two checkpoints are of different logs; that contradicts nothing")
    if small.tree_size == large.tree_size:
        if small.root_hash == large.root_hash:
            raise NoMisbehaviourError("both notes are of the same tree")
        return Misbehaviour(kind="split", notes=notes)
    if small.tree_size == 0:
        raise NoMisbehaviourError("every log extends the empty one")
    candidates: list[Sequence[bytes]] = []
    if larger is not None:
        candidates.append(prefix_proof(larger, small.tree_size, large.tree_size))
    if offered is not None:
        candidates.append(offered)
    for path in candidates:
        try:
            _rewrite(small, large, path)
        except NoMisbehaviourError:
            raise
        except AuditError:
            continue
        return Misbehaviour(kind="rewrite", notes=notes, paths=(tuple(path),))
    if offered is None:
        raise MisbehaviourError(
            f"two sizes, {small.tree_size} and {large.tree_size}: give the log of the larger tree, or the "
            "consistency proof that was offered"
        )
    made = Misbehaviour(kind="unproved", notes=notes, paths=(tuple(offered),))
    try:
        made.contradiction()
    except InconclusiveError:
        return made
    raise NoMisbehaviourError("the notes are consistent")


def prove_two_leaves(
    first: bytes, second: bytes, leaf_index: int, one: NodeSource, other: NodeSource
) -> Misbehaviour:
    """Return the file that shows another leaf at `leaf_index` in each of two trees.

    Args:
        first: the smaller tree's note. second: the larger tree's.
        leaf_index: where they differ. one: nodes of the first tree. other: of the second.

    Raises:
        MisbehaviourError: they do not differ there.
    """
    sizes = [parse_checkpoint_note(note).tree_size for note in (first, second)]
    made = Misbehaviour(
        kind="leaf",
        notes=(first, second),
        leaf_index=leaf_index,
        leaf_hashes=(one(0, leaf_index), other(0, leaf_index)),
        paths=(
            tuple(inclusion_proof(one, leaf_index, sizes[0])),
            tuple(inclusion_proof(other, leaf_index, sizes[1])),
        ),
    )
    made.contradiction()
    return made


def prove_broken_promise(receipt: Receipt, note: bytes, tree: NodeSource | None = None) -> Misbehaviour:
    """Return the file that shows that a receipt's leaf is not in a later checkpoint.

    Args:
        receipt: the log's promise. note: a checkpoint; cosigned after the deadline if it is too small to
            hold the leaf. tree: nodes of the checkpoint's tree, if it is large enough.

    Raises:
        MisbehaviourError: nothing shows that the promise was broken.
    """
    index, size = receipt.leaf_index, parse_checkpoint_note(note).tree_size
    leaf_hashes: tuple[bytes, ...] = ()
    found: tuple[tuple[bytes, ...], ...] = ()
    if index < size and tree is not None:
        leaf_hashes, found = (tree(0, index),), (tuple(inclusion_proof(tree, index, size)),)
    made = Misbehaviour(
        kind="receipt",
        notes=(note,),
        leaf_index=index,
        leaf_hashes=leaf_hashes,
        paths=found,
        receipt=receipt,
    )
    made.contradiction()
    return made


def _split(first: Checkpoint, second: Checkpoint) -> str:
    if first.tree_size != second.tree_size:
        raise MisbehaviourError("a split has two trees of one size")
    if first.root_hash == second.root_hash:
        raise NoMisbehaviourError("both notes are of the same tree")
    return f"size {first.tree_size} was signed with two roots"


def _rewrite(small: Checkpoint, large: Checkpoint, path: Sequence[bytes]) -> str:
    old, new = roots_from_prefix_proof(small.tree_size, large.tree_size, path)
    if new != large.root_hash:
        raise MisbehaviourError("the prefix proof does not lead to the larger tree's root")
    if old == small.root_hash:
        raise NoMisbehaviourError("the larger tree extends the smaller one: the log only grew")
    return (
        f"the first {small.tree_size} of {large.tree_size} entries have the root {old.hex()}, "
        f"but {small.root_hash.hex()} was signed for them"
    )


def _two_leaves(
    leaf_index: int,
    checkpoints: tuple[Checkpoint, Checkpoint],
    hashes: Sequence[bytes],
    paths: Sequence[Sequence[bytes]],
) -> str:
    for checkpoint, leaf_hash, path in zip(checkpoints, hashes, paths, strict=True):
        _at(leaf_index, checkpoint, leaf_hash, path)
    if hashes[0] == hashes[1]:
        raise NoMisbehaviourError(f"both trees hold the same leaf {leaf_index}")
    return f"leaf {leaf_index} is {hashes[0].hex()} in one tree and {hashes[1].hex()} in the other"


def _at(leaf_index: int, checkpoint: Checkpoint, leaf_hash: bytes, path: Sequence[bytes]) -> None:
    root = root_from_inclusion_proof(leaf_index, checkpoint.tree_size, leaf_hash, path)
    if root != checkpoint.root_hash:
        raise MisbehaviourError(f"the proof of leaf {leaf_index} does not lead to the checkpoint's root")


def _note(value: Any) -> bytes:
    if not isinstance(value, str):
        raise MisbehaviourError("a note is text")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise MisbehaviourError("a note is not UTF-8") from error


def _hashes(values: Any) -> tuple[bytes, ...]:
    if not isinstance(values, list):
        raise MisbehaviourError("a path is a list of hashes")
    if not all(isinstance(value, str) and _HASH.fullmatch(value) for value in values):
        raise MisbehaviourError("a hash is 64 lower-case hex digits")
    return tuple(bytes.fromhex(value) for value in values)
