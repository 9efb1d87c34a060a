"""A COSE receipt of inclusion (RFC 9942): the same proof for those whose tools speak COSE.

COSE_Sign1 (tag 18) over the tree's root, which travels detached:

    protected    {1: alg, 395: 1}                     alg -8 (EdDSA), tree RFC9162_SHA256
    unprotected  {396: {-1: [bstr .cbor [size, index, [path]]]}}
    payload      nil

It carries no cosignatures, so whoever must not rely on the log alone takes the tlog-proof. A tree of one
leaf has no path, for which the format has no form.

Source: RFC 9942; RFC 9052 section 4.4; deterministic CBOR of RFC 8949 section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from audit.checkpoints import Checkpoint
from audit.errors import MalformedProofError
from audit.keys import SIGNATURE_SIZE, VerifyKey
from audit.merkle import HASH_SIZE, root_from_inclusion_proof, verify_inclusion

MEDIA_TYPE: Final = "application/cose"
MAX_BYTES: Final = 8192
_ALGORITHM: Final = 1
_EDDSA: Final = -8
_VDS: Final = 395
_RFC9162_SHA256: Final = 1
_VDP: Final = 396
_INCLUSION: Final = -1
_SIGN1_TAG: Final = b"\xd2"
_NULL: Final = b"\xf6"
_MAX_DEPTH: Final = 6


class CoseError(MalformedProofError):
    """The proof has no form as a COSE receipt, or the bytes are not one."""

    code = "audit.cose"


def issue_cose_receipt(
    sign: Callable[[bytes], bytes],
    checkpoint: Checkpoint,
    leaf_index: int,
    leaf_hash: bytes,
    path: Sequence[bytes],
) -> bytes:
    """Return the receipt of one leaf.

    Args:
        sign: the log key's raw Ed25519 signature. checkpoint: one that this key has signed already, so that
            nothing new is claimed. leaf_index, leaf_hash, path: the inclusion proof, which is checked.

    Raises:
        CoseError: the tree has one leaf only.
        ProofError: the proof does not lead to the checkpoint's root.
    """
    verify_inclusion(
        leaf_index=leaf_index,
        tree_size=checkpoint.tree_size,
        leaf_hash=leaf_hash,
        proof=path,
        root_hash=checkpoint.root_hash,
    )
    if not path:
        raise CoseError(
            "a tree of one leaf has no COSE receipt; wait for a second entry, or take the tlog-proof"
        )
    protected = _encode({_ALGORITHM: _EDDSA, _VDS: _RFC9162_SHA256})
    proof = _encode([checkpoint.tree_size, leaf_index, list(path)])
    signature = sign(_signed(protected, checkpoint.root_hash))
    head = b"\x84" + _encode(protected) + _encode({_VDP: {_INCLUSION: [proof]}}) + _NULL
    return _SIGN1_TAG + head + _encode(signature)


def verify_cose_receipt(receipt: bytes, *, leaf_hash: bytes, key: VerifyKey) -> tuple[int, int]:
    """Prove that `key` signed a tree with this leaf; return (tree size, leaf index).

    Raises:
        CoseError: the bytes are not such a receipt, in the form that `issue_cose_receipt` gives.
        ProofError, BadSignatureError: the path or the signature does not hold.
    """
    if len(receipt) > MAX_BYTES or receipt[:2] != _SIGN1_TAG + b"\x84":
        raise CoseError("not a COSE_Sign1 of four parts")
    try:
        protected, position = _decode(receipt, 2)
        unprotected, position = _decode(receipt, position)
        payload, position = _decode(receipt, position)
        signature, position = _decode(receipt, position)
        match unprotected:
            case {396: {-1: [bytes(proof)]}}:
                parts, end = _decode(proof, 0)
            case _:
                raise CoseError("the unprotected header holds no single inclusion proof")
    except (IndexError, RecursionError, UnicodeDecodeError) as error:
        raise CoseError(f"the bytes end too soon or are no CBOR: {error}") from error
    if protected != _encode({_ALGORITHM: _EDDSA, _VDS: _RFC9162_SHA256}) or payload is not None:
        raise CoseError("another algorithm or tree, or an attached payload")
    match parts:
        case [int(size), int(index), [*path]] if path and all(
            isinstance(item, bytes) and len(item) == HASH_SIZE for item in path
        ):
            root = root_from_inclusion_proof(index, size, leaf_hash, path)
        case _:
            raise CoseError("the inclusion proof is not [size, index, [path]]")
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_SIZE:
        raise CoseError("the signature is not 64 bytes")
    head = b"\x84" + _encode(protected) + _encode({_VDP: {_INCLUSION: [proof]}}) + _NULL + _encode(signature)
    if (
        end != len(proof)
        or _encode(parts) != proof
        or _SIGN1_TAG + head != receipt
        or position != len(receipt)
    ):
        raise CoseError("the receipt is not in its deterministic form")
    key.verify_raw(_signed(protected, root), signature)
    return size, index


def _signed(protected: bytes, payload: bytes) -> bytes:
    """Sig_structure of RFC 9052. Begins with 0x84, so it is never the UTF-8 text of a signed note."""
    return _encode(["Signature1", protected, b"", payload])


def _head(major: int, value: int) -> bytes:
    if value < 24:
        return bytes([major << 5 | value])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 1 << 8 * size:
            return bytes([major << 5 | code]) + value.to_bytes(size, "big")
    raise CoseError(f"{value} has no CBOR head")


def _encode(value: Any) -> bytes:
    """Deterministic CBOR of the few kinds a receipt holds; the keys of a map come in the order given."""
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(_encode(item) for item in value)
    if isinstance(value, dict):
        return _head(5, len(value)) + b"".join(_encode(k) + _encode(v) for k, v in value.items())
    raise CoseError(f"{type(value).__name__} has no place in a receipt")


def _decode(data: bytes, position: int, depth: int = 0) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise CoseError("nested too deeply")
    major, code = data[position] >> 5, data[position] & 31
    position += 1
    if major == 7 and code == 22:
        return None, position
    if code < 24:
        value = code
    elif code <= 27:
        size = 1 << (code - 24)
        if position + size > len(data):
            raise CoseError("the bytes end too soon")
        value, position = int.from_bytes(data[position : position + size], "big"), position + size
    else:
        raise CoseError("an indefinite length")
    if major in (0, 1):
        return (value if major == 0 else -1 - value), position
    if major not in (2, 4, 5) or value > len(data):
        raise CoseError(f"major type {major} has no place in a receipt")
    if major == 2:
        if position + value > len(data):
            raise CoseError("the bytes end too soon")
        return data[position : position + value], position + value
    items: list[Any] = []
    for _ in range(value * (2 if major == 5 else 1)):
        item, position = _decode(data, position, depth + 1)
        items.append(item)
    if major == 4:
        return items, position
    if not all(isinstance(name, int) for name in items[::2]):
        raise CoseError("a label is an integer")
    return dict(zip(items[::2], items[1::2], strict=True)), position
