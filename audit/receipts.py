"""Receipts: the log's signed promise to a caller that an entry stands at an index and will be in a
checkpoint.

One signature serves a batch: receipts are leaves of a small Merkle tree whose root is signed, and each
carries its path. A later checkpoint of the log without that leaf, beside the receipt, is transferable
proof of misbehaviour.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quoted

from audit.canonical import JsonValue, canonical_bytes, parse_strict
from audit.checkpoints import Checkpoint
from audit.errors import (
    AuditError,
    BadSignatureError,
    MalformedReceiptError,
    OriginMismatchError,
    ProofError,
    ReceiptMismatchError,
)
from audit.keys import SIGNATURE_SIZE, SigningKey
from audit.merkle import (
    HASH_SIZE,
    hash_leaf,
    hash_leaves,
    inclusion_proofs_of,
    root_from_inclusion_proof,
    verify_inclusion,
)
from audit.notes import NoteVerifier, check_key_name

DOMAIN = "receipt"
MAX_BATCH = 4096
MAX_RECEIPT_BYTES = 1 << 14

_TIME = re.compile(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_FIELDS = frozenset(
    {
        "origin",
        "leaf_index",
        "leaf_hash",
        "time",
        "merge_deadline",
        "batch_index",
        "batch_size",
        "batch_path",
        "signature",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """By `merge_deadline` (RFC 3339 UTC) a checkpoint of `origin` holds `leaf_hash` at `leaf_index`."""

    origin: str
    leaf_index: int
    leaf_hash: bytes
    time: str
    merge_deadline: str
    batch_index: int
    batch_size: int
    batch_path: tuple[bytes, ...]
    signature: bytes

    def __post_init__(self) -> None:
        try:
            check_key_name(self.origin)
        except AuditError as error:
            raise MalformedReceiptError(str(error)) from error
        if not _TIME.fullmatch(self.time) or not _TIME.fullmatch(self.merge_deadline):
            raise MalformedReceiptError("time and merge_deadline are RFC 3339 UTC with whole seconds")
        if self.merge_deadline < self.time:
            raise MalformedReceiptError("merge_deadline is before time")
        if not 0 <= self.leaf_index < 2**53 or not 0 <= self.batch_index < self.batch_size <= MAX_BATCH:
            raise MalformedReceiptError("leaf_index, batch_index or batch_size is out of range")
        if any(len(item) != HASH_SIZE for item in (self.leaf_hash, *self.batch_path)):
            raise MalformedReceiptError("a hash is not 32 bytes")
        if len(self.signature) != SIGNATURE_SIZE:
            raise MalformedReceiptError("signature is not 64 bytes")

    def to_json(self) -> dict[str, JsonValue]:
        """Return the receipt as JSON fields, for an HTTP answer."""
        return {
            "origin": self.origin,
            "leaf_index": self.leaf_index,
            "leaf_hash": self.leaf_hash.hex(),
            "time": self.time,
            "merge_deadline": self.merge_deadline,
            "batch_index": self.batch_index,
            "batch_size": self.batch_size,
            "batch_path": [item.hex() for item in self.batch_path],
            "signature": base64.b64encode(self.signature).decode(),
        }

    def encode(self) -> bytes:
        return canonical_bytes(self.to_json())

    @classmethod
    def parse(cls, data: bytes) -> Receipt:
        """Read a receipt's JSON, in any layout but with exactly its fields.

        Raises:
            MalformedReceiptError: anything else.
        """
        try:
            document = parse_strict(data, max_bytes=MAX_RECEIPT_BYTES)
        except AuditError as error:
            raise MalformedReceiptError(str(error)) from error
        return cls.from_json(document)

    @classmethod
    def from_json(cls, document: object) -> Receipt:
        """Read already parsed JSON; raises `MalformedReceiptError`."""
        if not isinstance(document, dict) or document.keys() != _FIELDS:
            raise MalformedReceiptError(f"a receipt has exactly the fields {sorted(_FIELDS)}")
        path = document["batch_path"]
        if not isinstance(path, list):
            raise MalformedReceiptError("batch_path is not a list")
        return cls(
            origin=_text(document, "origin"),
            leaf_index=_integer(document, "leaf_index"),
            leaf_hash=_hash(document["leaf_hash"], "leaf_hash"),
            time=_text(document, "time"),
            merge_deadline=_text(document, "merge_deadline"),
            batch_index=_integer(document, "batch_index"),
            batch_size=_integer(document, "batch_size"),
            batch_path=tuple(_hash(item, "batch_path") for item in path),
            signature=_signature(_text(document, "signature")),
        )


def issue_receipts(
    key: SigningKey, origin: str, leaves: Sequence[tuple[int, bytes]], *, time: str, merge_deadline: str
) -> list[Receipt]:
    """Return a receipt for each (leaf index, leaf hash), all under one signature by the log's key.

    Raises:
        MalformedReceiptError: nothing to receipt, too much, or a field out of range.
    """
    paths, signature = _signed(key, origin, leaves, time, merge_deadline)
    return [
        Receipt(
            origin=origin,
            leaf_index=leaf_index,
            leaf_hash=leaf_hash,
            time=time,
            merge_deadline=merge_deadline,
            batch_index=position,
            batch_size=len(leaves),
            batch_path=tuple(path),
            signature=signature,
        )
        for position, ((leaf_index, leaf_hash), path) in enumerate(zip(leaves, paths, strict=True))
    ]


def issue_documents(
    key: SigningKey, origin: str, leaves: Sequence[tuple[int, bytes]], *, time: str, merge_deadline: str
) -> list[dict[str, JsonValue]]:
    """`issue_receipts` as the JSON fields of each: what they have in common is checked and written once.

    Raises:
        MalformedReceiptError: as there.
    """
    paths, signature = _signed(key, origin, leaves, time, merge_deadline)
    first = Receipt(
        origin=origin,
        leaf_index=min(index for index, _ in leaves),
        leaf_hash=leaves[0][1],
        time=time,
        merge_deadline=merge_deadline,
        batch_index=0,
        batch_size=len(leaves),
        batch_path=tuple(paths[0]),
        signature=signature,
    ).to_json()
    if max(index for index, _ in leaves) >= 2**53 or any(len(leaf) != HASH_SIZE for _, leaf in leaves):
        raise MalformedReceiptError("a leaf_index is out of range, or a hash is not 32 bytes")
    return [
        {
            **first,
            "leaf_index": leaf_index,
            "leaf_hash": leaf_hash.hex(),
            "batch_index": position,
            "batch_path": [item.hex() for item in path],
        }
        for position, ((leaf_index, leaf_hash), path) in enumerate(zip(leaves, paths, strict=True))
    ]


def _signed(
    key: SigningKey, origin: str, leaves: Sequence[tuple[int, bytes]], time: str, merge_deadline: str
) -> tuple[list[list[bytes]], bytes]:
    """The path of each promise of a batch, and the signature of all."""
    if not 0 < len(leaves) <= MAX_BATCH:
        raise MalformedReceiptError(f"a batch has 1 to {MAX_BATCH} receipts, not {len(leaves)}")
    end = _end_of_promise(origin, time, merge_deadline)
    root, paths = inclusion_proofs_of(hash_leaves([_promise(*leaf, end) for leaf in leaves]))
    return paths, key.sign(DOMAIN, _batch(origin, len(leaves), root))


def find_signer(receipt: Receipt, keys: Sequence[NoteVerifier]) -> NoteVerifier:
    """Return which of the log's keys, of which there is at least one, made this promise.

    Raises:
        as `verify_receipt`, for the last key.
    """
    for key in keys[:-1]:
        try:
            verify_receipt(receipt, key)
        except BadSignatureError:
            continue
        return key
    verify_receipt(receipt, keys[-1])
    return keys[-1]


def verify_receipt(receipt: Receipt, log: NoteVerifier) -> None:
    """Prove that the log made this promise.

    Raises:
        OriginMismatchError: it is another log's.
        BadSignatureError: the log's key did not sign a batch that holds it.
        ReceiptMismatchError: the batch path does not fit its place.
    """
    if receipt.origin != log.name:
        raise OriginMismatchError(expected=log.name, found=receipt.origin)
    end = _end_of_promise(receipt.origin, receipt.time, receipt.merge_deadline)
    promise = _promise(receipt.leaf_index, receipt.leaf_hash, end)
    try:
        root = root_from_inclusion_proof(
            receipt.batch_index, receipt.batch_size, hash_leaf(promise), receipt.batch_path
        )
    except ProofError as error:
        raise ReceiptMismatchError(f"batch_path does not fit its place: {error}") from error
    log.key.verify(DOMAIN, _batch(receipt.origin, receipt.batch_size, root), receipt.signature)


def verify_kept(receipt: Receipt, checkpoint: Checkpoint, inclusion: Sequence[bytes]) -> None:
    """Prove that the log kept its promise: the receipt's leaf is in the checkpoint's tree.

    Raises:
        ReceiptMismatchError: it is not there; receipt and signed checkpoint together show it to anyone.
    """
    if receipt.origin != checkpoint.origin or receipt.leaf_index >= checkpoint.tree_size:
        raise ReceiptMismatchError(
            f"checkpoint {checkpoint.origin!r} of size {checkpoint.tree_size} cannot hold leaf "
            f"{receipt.leaf_index} of {receipt.origin!r}"
        )
    try:
        verify_inclusion(
            leaf_index=receipt.leaf_index,
            tree_size=checkpoint.tree_size,
            leaf_hash=receipt.leaf_hash,
            proof=inclusion,
            root_hash=checkpoint.root_hash,
        )
    except ProofError as error:
        raise ReceiptMismatchError(f"the receipt's leaf is not in the checkpoint: {error}") from error


def _promise(leaf_index: int, leaf_hash: bytes, end: str) -> bytes:
    return f'{{"leaf_hash":"{leaf_hash.hex()}","leaf_index":{leaf_index},{end}'.encode()


def _end_of_promise(origin: str, time: str, merge_deadline: str) -> str:
    # RFC 8785 by hand: the keys are sorted, and what is no text of ours is quoted by `json` itself
    return f'"merge_deadline":{quoted(merge_deadline)},"origin":{quoted(origin)},"time":{quoted(time)}}}'


def _batch(origin: str, batch_size: int, root: bytes) -> bytes:
    return canonical_bytes({"origin": origin, "batch_size": batch_size, "batch_root": root.hex()})


def _text(document: dict[str, JsonValue], field: str) -> str:
    value = document[field]
    if not isinstance(value, str):
        raise MalformedReceiptError(f"{field} is not a string")
    return value


def _integer(document: dict[str, JsonValue], field: str) -> int:
    value = document[field]
    if not isinstance(value, int) or isinstance(value, bool):
        raise MalformedReceiptError(f"{field} is not an integer")
    return value


def _hash(value: JsonValue, field: str) -> bytes:
    if not isinstance(value, str) or not _HEX64.fullmatch(value):
        raise MalformedReceiptError(f"{field} is not a lower-case hex SHA-256")
    return bytes.fromhex(value)


def _signature(text: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MalformedReceiptError("signature is not base64") from error
    if base64.b64encode(raw).decode() != text:
        raise MalformedReceiptError("signature is not canonical base64")
    return raw
