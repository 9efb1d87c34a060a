"""Model and update files: a deterministic subset of the safetensors format, so that a digest names one file.

Weights are F64 tensors in parameter order, an update is one I64 tensor called "update". The header is compact
JSON in tensor order, padded with spaces to eight bytes, without metadata. `decode_*` accepts only bytes that
`encode_*` would write: the same numbers have one file and one digest. The safetensors library reads both.
"""

from __future__ import annotations

import json
import math
import re
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from audit.errors import AuditError

Tensor: TypeAlias = tuple[tuple[int, ...], Sequence[float]]  # shape, values in C order

MAX_HEADER_BYTES: Final = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_.]{1,128}")


class WeightsError(AuditError):
    """The bytes are not a model or update file in the one form that has a digest."""

    code = "audit.weights"


def encode_weights(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the model file of `tensors` (float64, in the mapping's own order).

    Raises:
        WeightsError: no tensor, a bad name or shape, a wrong count of values, or a value that is not finite.
    """
    parts: list[tuple[str, tuple[int, ...], array[float]]] = []
    for name, (shape, values) in tensors.items():
        try:
            flat = array("d", values)
        except (TypeError, OverflowError) as error:
            raise WeightsError(f"tensor {name}: {error}") from error
        if not all(map(math.isfinite, flat)):
            raise WeightsError(f"tensor {name} holds a value that is not finite; the model has diverged")
        parts.append((name, tuple(shape), flat))
    return _encode("F64", parts)


def decode_weights(data: bytes) -> dict[str, tuple[tuple[int, ...], list[float]]]:
    """Read a model file: name to (shape, values), in file order.

    Raises:
        WeightsError: anything but the exact bytes of `encode_weights`.
    """
    tensors = {
        name: (shape, list(map(float, _numbers("d", body)))) for name, shape, body in read_parts("F64", data)
    }
    for name, (_, values) in tensors.items():
        if not all(map(math.isfinite, values)):
            raise WeightsError(f"tensor {name} holds a value that is not finite")
    return tensors


def encode_update(values: Sequence[int]) -> bytes:
    """Return the update file of the integers `values` (each fits in 64 bits)."""
    try:
        flat = array("q", values)
    except (TypeError, OverflowError) as error:
        raise WeightsError(f"an update holds 64-bit integers: {error}") from error
    return _encode("I64", [("update", (len(flat),), flat)])


def decode_update(data: bytes) -> list[int]:
    """Read an update file.

    Raises:
        WeightsError: anything but the exact bytes of `encode_update`.
    """
    return list(map(int, update_array(data)))


def update_array(data: bytes) -> array[int]:
    """Read an update file into eight bytes a number; errors as `decode_update`."""
    tensors = read_parts("I64", data)
    if len(tensors) != 1 or tensors[0][0] != "update" or len(tensors[0][1]) != 1:
        raise WeightsError('an update file holds one tensor, "update", of one axis')
    return _numbers("q", tensors[0][2])


def file_header(dtype: str, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> bytes:
    """Return how a file of these tensors (name, shape) begins; their values follow, little-endian, in order.

    Raises:
        WeightsError: no tensor, or a bad name or shape.
    """
    if not tensors:
        raise WeightsError("a file needs at least one tensor")
    header: dict[str, object] = {}
    offset = 0
    for name, shape in tensors:
        if not _NAME.fullmatch(name) or any(type(n) is not int or n < 1 for n in shape):
            raise WeightsError(f"tensor {name!r} of shape {shape}: bad name or shape")
        end = offset + 8 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_parts(dtype: str, data: bytes) -> list[tuple[str, tuple[int, ...], memoryview]]:
    """Read a file's form: (name, shape, its values' bytes, not copied) a tensor. Values are not looked at.

    Raises:
        WeightsError: the form is not the one that `file_header` begins, or the bytes are too few or too many.
    """
    if len(data) < 16:
        raise WeightsError("the file is too short")
    size = int.from_bytes(data[:8], "little")
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WeightsError(f"the header claims {size} bytes")
    try:
        header = json.loads(data[8 : 8 + size].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise WeightsError("the header is not JSON") from error
    if not isinstance(header, dict) or not header:
        raise WeightsError("the header names no tensor")
    parts: list[tuple[str, tuple[int, ...], memoryview]] = []
    body, offset = memoryview(data)[8 + size :], 0
    for name, spec in header.items():
        if not isinstance(spec, dict) or spec.get("dtype") != dtype:
            raise WeightsError(f"tensor {name!r} is not {dtype}")
        shape = spec.get("shape")
        if not isinstance(shape, list) or any(type(n) is not int or n < 1 for n in shape):
            raise WeightsError(f"tensor {name!r} has no proper shape")
        end = offset + 8 * math.prod(shape)
        if end > len(body):
            raise WeightsError(f"tensor {name!r} reaches beyond the file")
        parts.append((name, tuple(shape), body[offset:end]))
        offset = end
    expected = file_header(dtype, [(name, shape) for name, shape, _ in parts])
    if offset != len(body) or data[: 8 + size] != expected:
        raise WeightsError("the bytes are not in the one form that has a digest")
    return parts


def _encode(dtype: str, parts: Sequence[tuple[str, tuple[int, ...], array[float] | array[int]]]) -> bytes:
    head = file_header(dtype, [(name, shape) for name, shape, _ in parts])
    body = []
    for name, shape, flat in parts:
        if len(flat) != math.prod(shape):
            raise WeightsError(f"tensor {name} of shape {shape} has {len(flat)} values")
        if sys.byteorder != "little":
            flat.byteswap()
        body.append(flat.tobytes())
    return b"".join([head, *body])


def _numbers(typecode: Literal["d", "q"], body: memoryview) -> array[Any]:
    flat: array[Any] = array(typecode)
    flat.frombytes(body)
    if sys.byteorder != "little":
        flat.byteswap()
    return flat
