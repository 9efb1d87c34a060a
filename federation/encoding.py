"""A whole table encoded at once: the same numbers as `audit.encoding`, bit for bit, and never an exception.

A row outside the contract (a missing value that is refused, a wrong type, an unknown category) is masked:
in training it contributes nothing. A value out of bounds is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from audit.decimals import DecimalError, decimal_text, parse_decimal
from audit.encoding import EncodingError, RowEncoder, is_missing

if TYPE_CHECKING:
    import pandas as pd


def encode_frame(
    features: Sequence[Mapping[str, Any]], frame: pd.DataFrame
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (inputs of shape (rows, encoded width), mask of shape (rows,)): masked-out rows are all zero.

    `features` are the charter's, in canonical form. A column that is missing masks every row.
    """
    rows = len(frame)
    mask = np.ones(rows, dtype=np.bool_)
    parts: list[NDArray[np.float64]] = []
    for feature in features:
        width = RowEncoder([feature]).size
        if feature["name"] not in frame.columns:
            mask[:] = False
            parts.append(np.zeros((rows, width)))
            continue
        values, valid = _column(feature, frame[feature["name"]], width)
        parts.append(values)
        mask &= valid
    inputs = np.concatenate(parts, axis=1) if parts else np.zeros((rows, 0))
    inputs[~mask] = 0.0
    return inputs, mask


def encode_labels(
    label: Mapping[str, Any], column: pd.Series
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return (targets, mask): class indices, or values scaled to [-1, 1] by the label's bounds."""
    if "classes" in label:
        position = {name: float(index) for index, name in enumerate(label["classes"])}
        values, mask = _by_value(column, 1, lambda value: [position[_class_name(value)]])
        return values[:, 0], mask
    lower, upper = float(parse_decimal(label["lower"])), float(parse_decimal(label["upper"]))

    def scaled(value: object) -> list[float]:
        if is_missing(value) or isinstance(value, bool):
            raise DecimalError("no number")
        number = float(parse_decimal(decimal_text(value)))  # type: ignore[arg-type]
        return [2.0 * (min(max(number, lower), upper) - lower) / (upper - lower) - 1.0]

    values, mask = _by_value(column, 1, scaled)
    return values[:, 0], mask


def _column(
    feature: Mapping[str, Any], column: pd.Series, width: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    numeric = column.dtype.kind in "fiu"
    if feature["type"] in ("number", "integer") and numeric and feature.get("transform", "none") == "none":
        return _linear(feature, column.to_numpy(dtype=np.float64))
    encoder = RowEncoder([feature])
    return _by_value(column, width, lambda value: encoder.encode({feature["name"]: value}))


def _linear(
    feature: Mapping[str, Any], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    lower, upper = float(parse_decimal(feature["lower"])), float(parse_decimal(feature["upper"]))
    missing = np.isnan(values)
    valid = np.isfinite(values)
    if feature["type"] == "integer":
        valid &= np.where(valid, values, 0.5) == np.floor(np.where(valid, values, 0.5))
    clamped = np.clip(np.where(valid, values, lower), lower, upper)
    encoded = 2.0 * (clamped - lower) / (upper - lower) - 1.0
    if feature.get("missing", "refuse") == "midpoint":
        encoded[missing] = 0.0
        valid |= missing
    return encoded[:, None], valid


def _by_value(
    column: pd.Series, width: int, encode: Callable[[object], list[float]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Encode each distinct value once, by the definition itself."""
    known: dict[tuple[type, object], list[float] | None] = {}
    encoded = np.zeros((len(column), width))
    valid = np.zeros(len(column), dtype=np.bool_)
    for position, value in enumerate(column.tolist()):
        if isinstance(value, float) and math.isnan(value):
            value = None
        key = (type(value), value)
        try:
            if key not in known:
                known[key] = _tried(encode, value)
            found = known[key]
        except TypeError:  # an unhashable cell, such as a list
            found = None
        if found is not None:
            encoded[position] = found
            valid[position] = True
    return encoded, valid


def _tried(encode: Callable[[object], list[float]], value: object) -> list[float] | None:
    try:
        return encode(value)
    except (EncodingError, DecimalError, KeyError):
        return None


def _class_name(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    return decimal_text(value)  # type: ignore[arg-type]
