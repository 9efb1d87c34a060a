"""Model and update files as numpy vectors, without a Python object a number: what large models need.

The same files, the same checks and the same bits as `audit.weights` and `audit.models`, which define them; a
flat vector is a file's body as it stands, so reading one copies nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from audit.layers import Layer, parameter_specs
from audit.models import ModelError, is_zero_start, starting_spans
from audit.weights import WeightsError, encode_update, file_header, read_parts

Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
Integers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_BLOCKS = 1 << 16  # SHA-256 blocks at a time: 2 MiB


def model_vector(layers: Sequence[Layer], data: bytes) -> Vector:
    """Return the flat weights of a model file that must fit `layers` exactly; read-only, not copied.

    Raises:
        WeightsError: the bytes are not a model file.
        ModelError: another model's file.
    """
    parts = read_parts("F64", data)
    if tuple((name, shape) for name, shape, _ in parts) != parameter_specs(layers):
        raise ModelError("the model file's tensors are not those of the charter's layers")
    size = sum(math.prod(shape) for _, shape, _ in parts)
    flat: Vector = np.frombuffer(data, dtype="<f8", count=size, offset=len(data) - 8 * size)
    if not bool(np.isfinite(flat).all()):
        raise WeightsError("the file holds a value that is not finite")
    return flat


def model_pieces(layers: Sequence[Layer], flat: Vector) -> Iterator[bytes | memoryview]:
    """Yield the model file of a flat vector, header first, without making it whole."""
    specs = parameter_specs(layers)
    if len(flat) != sum(math.prod(shape) for _, shape in specs):
        raise ModelError(f"{len(flat)} weights do not fit the model's layers")
    if not bool(np.isfinite(flat).all()):
        raise WeightsError("the weights hold a value that is not finite; the model has diverged")
    yield file_header("F64", specs)
    yield np.ascontiguousarray(flat, dtype="<f8").data.cast("B")


def model_bytes(layers: Sequence[Layer], flat: Vector) -> bytes:
    """Return the model file of a flat vector: the bytes of `audit.models.model_file`."""
    return b"".join(model_pieces(layers, flat))


def update_vector(data: bytes) -> Integers:
    """Return the integers of an update file, read-only, not copied; errors as there."""
    count = (len(data) - 8 - int.from_bytes(data[:8], "little")) // 8
    if count > 0:
        head = _update_head(count)
        if data.startswith(head) and len(data) == len(head) + 8 * count:  # the one form there is
            return np.frombuffer(data, dtype="<i8", offset=len(head))
    parts = read_parts("I64", data)
    if len(parts) != 1 or parts[0][0] != "update" or len(parts[0][1]) != 1:
        raise WeightsError('an update file holds one tensor, "update", of one axis')
    found: Integers = np.frombuffer(parts[0][2], dtype="<i8")
    return found


def update_bytes(values: Integers | Sequence[int]) -> bytes:
    """Return the update file of integers: the bytes of `audit.weights.encode_update`."""
    if not isinstance(values, np.ndarray):
        return encode_update(values)
    body = np.ascontiguousarray(values, dtype="<i8").data.cast("B")
    return b"".join([_update_head(len(values)), body])


@lru_cache(maxsize=8)
def _update_head(count: int) -> bytes:
    return file_header("I64", [("update", (count,))])


def average_vectors(models: Sequence[Vector]) -> Vector:
    """Return `audit.replay.average` of the vectors: a running sum in order, then one division."""
    total = np.array(models[0], dtype=np.float64)
    for flat in models[1:]:
        total += flat
    total /= len(models)
    return total


def initial_vector(layers: Sequence[Layer], charter_digest: str) -> Vector:
    """Return the weights that a charter fixes as the start: those of `audit.models.initial_weights`."""
    size = sum(math.prod(shape) for _, shape in parameter_specs(layers))
    flat: Vector = np.zeros(size)
    if is_zero_start(layers):
        return flat
    stream = _Uniforms(bytes.fromhex(charter_digest))
    offset = 0
    for count, bound, constant in starting_spans(layers):
        flat[offset : offset + count] = (
            constant if bound is None else bound * (2.0 * stream.take(count) - 1.0)
        )
        offset += count
    return flat


class _Uniforms:
    """The stream of `audit.models`: 53-bit uniforms from SHA-256 in counter mode, four a block."""

    def __init__(self, digest: bytes) -> None:
        self._start = hashlib.sha256(b"affidavit/init/v1\x00" + digest)
        self._counter = 0
        self._left: Vector = np.empty(0)

    def take(self, count: int) -> Vector:
        out: Vector = np.empty(count)
        filled = 0
        while filled < count:
            if not len(self._left):
                self._left = self._blocks(min(_BLOCKS, (count - filled + 3) // 4))
            taken = self._left[: count - filled]
            out[filled : filled + len(taken)] = taken
            self._left = self._left[len(taken) :]
            filled += len(taken)
        return out

    def _blocks(self, count: int) -> Vector:
        raw = bytearray()
        for number in range(self._counter, self._counter + count):
            block = self._start.copy()
            block.update(number.to_bytes(8, "big"))
            raw += block.digest()
        self._counter += count
        found: Vector = (np.frombuffer(raw, dtype=">u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return found
