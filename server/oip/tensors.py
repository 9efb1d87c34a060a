"""The protocol's tensors, and what they are to a charter: columns of named features in, answers out.

A model whose features are all numbers takes one matrix `rows`, (n, features) in the charter's order; any
model takes one tensor (n) or (n, 1) a feature, by its name. A NaN is a missing value. Out go `label`, and
`probability` (binary), `probabilities` (n, classes) or `value`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

from audit.encoding import NumberedRow
from server.errors import MalformedRequestError

MATRIX: Final = "rows"
MAX_TENSORS: Final = 4_200  # as many as a charter may have features
_LAYOUT: Final = {
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
    "BOOL": "<u1",
}
DATATYPES: Final = frozenset({*_LAYOUT, "BYTES"})
_OF_FEATURE: Final = {"number": "FP64", "integer": "INT64", "boolean": "BOOL", "category": "BYTES"}
_LENGTH: Final = struct.Struct("<I")
_NO_NULL: Final = (
    "data holds null, which is no value of the protocol; where a feature is missing leave its tensor out, "
    'send NaN in a binary tensor, or "" in BYTES'
)


class TensorError(MalformedRequestError):
    """A tensor is not what the protocol or the model takes; names the tensor and the fix."""

    def __init__(self, name: str, problem: str) -> None:
        shown = name if len(name) <= 80 else name[:80] + "…"
        super().__init__(f"{shown}: {problem}", fields=[{"field": shown, "problem": problem}])


class Tensor(NamedTuple):
    """One tensor: its values flat, in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


class InferAsk(NamedTuple):
    """An inference request, whichever way it came."""

    id: str = ""
    parameters: Mapping[str, Any] = MappingProxyType({})
    inputs: tuple[Tensor, ...] = ()
    outputs: Mapping[str, bool | None] = MappingProxyType({})  # name -> asked as binary?
    binary: bool = False  # of outputs that do not say
    model: str = ""  # which the body names once more; "": it does not
    version: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKind:
    """One line of a model's metadata; -1 stands for the number of rows."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """What one charter's model takes and gives; what follows from that is worked out once."""

    features: tuple[tuple[str, str], ...]  # name, type
    task: str
    classes: tuple[str, ...]

    @classmethod
    def of(cls, charter: Mapping[str, Any]) -> Signature:
        return cls(
            tuple((feature["name"], feature["type"]) for feature in charter["features"]),
            charter["task"],
            tuple(charter["label"].get("classes") or ()),
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.features)

    @cached_property
    def is_matrix(self) -> bool:
        """Whether one matrix may hold a row: every feature is a number, and none is called as it is."""
        return all(kind in ("number", "integer") and name != MATRIX for name, kind in self.features)

    def inputs(self) -> tuple[TensorKind, ...]:
        if self.is_matrix:
            return (TensorKind(name=MATRIX, datatype="FP64", shape=(-1, len(self.features))),)
        return tuple(
            TensorKind(name=name, datatype=_OF_FEATURE[kind], shape=(-1,)) for name, kind in self.features
        )

    @cached_property
    def outputs(self) -> tuple[TensorKind, ...]:
        label = TensorKind(name="label", datatype="BYTES", shape=(-1,))
        match self.task:
            case "regression":
                return (label, TensorKind(name="value", datatype="FP64", shape=(-1,)))
            case "multiclass":
                shape = (-1, len(self.classes))
                return (label, TensorKind(name="probabilities", datatype="FP64", shape=shape))
            case _:
                return (label, TensorKind(name="probability", datatype="FP64", shape=(-1,)))

    def rows(self, inputs: Sequence[Tensor], *, max_rows: int) -> list[dict[str, Any]]:
        """Return the rows that the tensors hold, as named features.

        Raises:
            TensorError: a tensor is unknown, doubled, of another shape or kind, or holds too many rows.
        """
        if not inputs:
            raise TensorError("inputs", "is empty; give the tensors that the model's metadata names")
        if len(inputs) == 1 and inputs[0].name == MATRIX and self.is_matrix:
            return self._of_matrix(inputs[0], max_rows)
        kinds = dict(self.features)
        columns: dict[str, Sequence[Any]] = {}
        count: int | None = None
        for tensor in inputs:
            kind = kinds.get(tensor.name)
            if kind is None or tensor.name in columns:
                known = ", ".join(item.name for item in self.inputs()[:8])
                why = "is given twice" if tensor.name in columns else f"is no input; the model takes {known}"
                raise TensorError(tensor.name, why)
            if len(tensor.shape) not in (1, 2) or tensor.shape[1:] not in ((), (1,)):
                raise TensorError(tensor.name, f"has shape {list(tensor.shape)}; give [n] or [n, 1]")
            if count is None:
                count = tensor.shape[0]
            if tensor.shape[0] != count:
                raise TensorError(tensor.name, f"has {tensor.shape[0]} rows, the tensors before it {count}")
            columns[tensor.name] = self._column(tensor, kind)
        _check_count(count or 0, max_rows)
        names = list(columns)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _of_matrix(self, tensor: Tensor, max_rows: int) -> list[dict[str, Any]]:
        width = len(self.features)
        if len(tensor.shape) != 2 or tensor.shape[1] != width:
            raise TensorError(tensor.name, f"has shape {list(tensor.shape)}; give [n, {width}]")
        if tensor.datatype in ("BYTES", "BOOL"):
            raise TensorError(tensor.name, f"holds {tensor.datatype}; give FP64, FP32 or whole numbers")
        _check_count(tensor.shape[0], max_rows)
        values = _numbers(tensor.values)
        return [
            NumberedRow(self.names, values[start : start + width]) for start in range(0, len(values), width)
        ]

    def _column(self, tensor: Tensor, kind: str) -> Sequence[Any]:
        text = tensor.datatype == "BYTES"
        if kind == "category" and not text:
            raise TensorError(tensor.name, f"holds {tensor.datatype}; a category is BYTES")
        if kind in ("number", "integer") and (text or tensor.datatype == "BOOL"):
            raise TensorError(tensor.name, f"holds {tensor.datatype}; give a number's datatype")
        if kind == "boolean" and text:
            raise TensorError(tensor.name, "holds BYTES; a boolean is BOOL")
        if kind == "category":
            return [value or None for value in tensor.values]
        return _numbers(tensor.values)


def answer_tensors(signature: Signature, answers: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """Return the answers as the output tensors, numbers as the doubles that their texts name."""
    count = len(answers)
    tensors = []
    for kind in signature.outputs:
        values: list[Any]
        if kind.name == "label":
            values = [answer["label"] for answer in answers]
        elif kind.name == "probabilities":
            values = [float(text) for answer in answers for text in answer["probabilities"]]
        else:
            values = [float(answer[kind.name]) for answer in answers]
        shape = (count, *kind.shape[1:])
        tensors.append(Tensor(name=kind.name, datatype=kind.datatype, shape=shape, values=values))
    return tuple(tensors)


def size_of(name: str, shape: Iterable[int]) -> int:
    """Return how many values a shape holds.

    Raises:
        TensorError: a size is no count, or together they are beyond every limit.
    """
    size = 1
    for each in shape:
        if type(each) is not int or not 0 <= each < 2**31:
            raise TensorError(name, "shape: each size is a whole number from 0")
        size *= each
        if size > 2**31:
            raise TensorError(name, "shape: so many values fit in no request")
    return size


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Sequence[Any]:
    """Read a tensor's raw little-endian bytes.

    Raises:
        TensorError: they are not of the shape's size, or no text.
    """
    size = size_of(name, shape)
    if datatype == "BYTES":
        return _texts(name, data, size)
    layout = _LAYOUT.get(datatype)
    if layout is None:
        raise TensorError(name, f"datatype {datatype[:20]!r} is unknown; use one of {sorted(DATATYPES)}")
    wanted = size * np.dtype(layout).itemsize
    if len(data) != wanted:
        raise TensorError(name, f"holds {len(data)} bytes; {datatype} of its shape takes {wanted}")
    values: list[Any] = np.frombuffer(data, dtype=layout).tolist()
    if datatype != "BOOL":
        return values
    if any(value > 1 for value in values):
        raise TensorError(name, "a BOOL is one byte, 0 or 1")
    return [bool(value) for value in values]


def to_raw(tensor: Tensor) -> bytes:
    """Return a tensor's raw little-endian bytes."""
    if tensor.datatype == "BYTES":
        texts = [str(value).encode() for value in tensor.values]
        return b"".join(part for text in texts for part in (_LENGTH.pack(len(text)), text))
    return np.asarray(tensor.values).astype(_LAYOUT[tensor.datatype]).tobytes()


def flat(name: str, datatype: str, shape: Sequence[int], data: object) -> list[Any]:
    """Read a tensor's JSON values, nested or flat, and check each against the datatype.

    Raises:
        TensorError: a value is of another kind, there are not as many as the shape says, or they are nested
            otherwise than it says.
    """
    size = size_of(name, shape)
    if not isinstance(data, list):
        raise TensorError(name, "data: give a list of values, nested or flat")
    values: list[Any] = data
    kinds = set(map(type, values))
    if list in kinds:
        values = _unnested(name, data, shape)
        kinds = set(map(type, values))
    if len(values) != size:
        raise TensorError(name, f"data has {len(values)} values, its shape {size}")
    if datatype == "BYTES":
        fits = kinds <= {str}
    elif datatype == "BOOL":
        fits = kinds <= {bool}
    elif datatype.startswith("FP"):
        fits = kinds <= {float, int}
    elif datatype in _LAYOUT:
        fits = kinds <= {int}
    else:
        raise TensorError(name, f"datatype {datatype[:20]!r} is unknown; use one of {sorted(DATATYPES)}")
    if type(None) in kinds:
        raise TensorError(name, _NO_NULL)
    if not fits:
        raise TensorError(name, f"data holds a value that is no {datatype}")
    return values


def _unnested(name: str, data: list[Any], shape: Sequence[int]) -> list[Any]:
    """The values of nested lists whose lengths are the shape's, level by level."""
    items, lengths = data, {len(data)}
    for level, length in enumerate(shape):
        if level:
            if not set(map(type, items)) <= {list}:
                raise TensorError(
                    name, f"data: level {level} is not all lists; nest as the shape, or not at all"
                )
            lengths = set(map(len, items))
            items = list(chain.from_iterable(items))
        if not lengths <= {length}:
            found = "/".join(map(str, sorted(lengths)[:4]))
            raise TensorError(
                name,
                f"data: level {level} has {found} items, where shape {list(shape)} says {length}; "
                "nest as the shape, or give one flat list in row-major order",
            )
    if list in set(map(type, items)):
        raise TensorError(name, "data is nested deeper than its shape")
    return items


def _texts(name: str, data: bytes | memoryview, size: int) -> list[str]:
    raw, position = bytes(data), 0
    texts: list[str] = []
    while position < len(raw) and len(texts) < size:
        if position + 4 > len(raw):
            break
        (length,) = _LENGTH.unpack_from(raw, position)
        position += 4
        if position + length > len(raw):
            break
        try:
            texts.append(raw[position : position + length].decode())
        except UnicodeDecodeError as error:
            raise TensorError(name, "holds BYTES that are no UTF-8 text") from error
        position += length
    if position != len(raw) or len(texts) != size:
        raise TensorError(name, f"does not hold {size} BYTES, each after its length in four bytes")
    return texts


def _numbers(values: Sequence[Any]) -> list[Any]:
    """NaN stands for a missing value; a number too large for a double is left for the contract to refuse."""
    total = sum(values)
    if total == total:  # a NaN would make it one
        return list(values)
    return [None if value != value else value for value in values]


def _check_count(count: int, max_rows: int) -> None:
    if count < 1:
        raise TensorError("inputs", "hold no row; give at least one")
    if count > max_rows:
        raise TensorError("inputs", f"hold {count} rows; at most {max_rows} fit in one request")
