"""From a named row to numbers, by the charter's declared bounds only: nothing is ever learnt from data.

Numbers are clamped to their bounds, optionally passed through the natural logarithm, and scaled to [-1, 1];
booleans are -1 or 1; categories are one 0/1 input for each declared value, in declared order. A missing
value is refused, or takes the midpoint (0, or no category), as the feature declares.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from operator import le
from typing import Any, Final, TypeAlias

from audit.canonical import canonical_bytes
from audit.decimals import DecimalError, decimal_text, float_text, parse_decimal
from audit.errors import AuditError

Row: TypeAlias = Mapping[str, Any]

_EXACT: Final = 2**53  # up to here every whole number is a double
_NUMBERS: Final = {float, int}
_BOOLEANS: Final = {"true": 1.0, "1": 1.0, "false": -1.0, "0": -1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing in a row that the charter does not allow."""

    field: str
    code: str  # "missing" | "unknown_field" | "wrong_type" | "unknown_category" | "out_of_bounds"
    message: str  # names the value's fault and the fix; for the row's owner only

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


class EncodingError(AuditError):
    """A row cannot be encoded; `problems` names each field and the fix."""

    code = "audit.encoding"

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = tuple(problems)


class PlainRow(dict[str, str]):
    """A row as `plain_row` gives it, and its canonical bytes where they are known: not to be changed."""

    __slots__ = ("text",)

    text: bytes

    def canonical(self) -> bytes:
        """Return `canonical_bytes` of the row."""
        try:
            return self.text
        except AttributeError:
            return canonical_bytes(self)


class NumberedRow(dict[str, Any]):
    """A row that came as numbers side by side, and still knows them so: not to be changed."""

    __slots__ = ("in_order", "names")

    def __init__(self, names: tuple[str, ...], in_order: list[Any]) -> None:
        super().__init__(zip(names, in_order, strict=True))
        self.names, self.in_order = names, in_order


class RowEncoder:
    """The charter's features, read once, for many rows."""

    def __init__(
        self, features: Sequence[Mapping[str, Any]], texts_of: Callable[[list[Any]], list[str]] | None = None
    ) -> None:
        """`texts_of` returns the canonical text of each of a list of floats and whole numbers within 2**53,
        where somebody knows a faster way than `number_texts`.
        """
        self._texts_of = texts_of or number_texts
        self._features = [_Feature(feature) for feature in features]
        self._names = frozenset(feature.name for feature in self._features)
        self._scales = _Scales.of(self._features)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(feature.name for feature in self._features)

    @property
    def size(self) -> int:
        """How many numbers one row becomes."""
        return sum(feature.size for feature in self._features)

    def encode(self, row: Row) -> list[float]:
        """Return the row as `size` floats; out-of-bounds values are clamped.

        Raises:
            EncodingError: a missing value whose rule is "refuse", a wrong type, an unknown category or field.
        """
        values: list[float] = []
        problems = self._unknown(row)
        for feature in self._features:
            found = feature.read(row.get(feature.name))
            if isinstance(found, Problem):
                problems.append(found)
            else:
                values += found[0]
        if problems:
            raise EncodingError(problems)
        return values

    def read(self, row: Row) -> tuple[list[float], list[Problem]]:
        """Return what `encode` and `check` would, in one pass; the values mean nothing beside a problem."""
        values: list[float] = []
        problems = self._unknown(row)
        get = row.get
        for feature in self._features:
            found = feature.read(get(feature.name))
            if type(found) is tuple:
                values += found[0]
                if found[1] is not None:
                    problems.append(found[1])
            else:
                problems.append(found)  # type: ignore[arg-type] # what is no tuple is a problem
        return values, problems

    def read_plain(self, row: Row) -> tuple[PlainRow, list[float]] | None:
        """Return what `plain_row` and then `read` give of a row without a problem, in a tenth of the time.

        None: a feature is no linear number, or a value is none within its bounds; the long way says more.
        """
        scales = self._scales
        if scales is None:
            return None
        if type(row) is NumberedRow and row.names == scales.names:
            values = row.in_order
        elif row.keys() == self._names:
            values = list(map(row.__getitem__, scales.names))
        else:
            return None
        kinds = set(map(type, values))
        if not kinds <= _NUMBERS or not (
            all(map(le, scales.lower, values)) and all(map(le, values, scales.upper))
        ):
            return None
        given = values
        if int in kinds:
            if not -_EXACT <= min(values) <= max(values) <= _EXACT:
                return None
            values = list(map(float, values))
        if any(not values[place].is_integer() for place in scales.whole):
            return None
        texts = self._texts_of(given)
        plain = PlainRow(zip(scales.names, texts, strict=True))
        if scales.layout:
            plain.text = (scales.layout % scales.in_order(texts)).encode()
        encoded = [
            2.0 * (value - low) / span - 1.0
            for value, low, span in zip(values, scales.lower, scales.spans, strict=True)
        ]
        return plain, encoded

    def check(self, row: Row) -> list[Problem]:
        """Return everything the charter does not allow in the row, out-of-bounds values included."""
        problems = self._unknown(row)
        for feature in self._features:
            found = feature.read(row.get(feature.name))
            if isinstance(found, Problem):
                problems.append(found)
            elif found[1] is not None:
                problems.append(found[1])
        return problems

    def _unknown(self, row: Row) -> list[Problem]:
        return [
            Problem(field=str(name), code="unknown_field", message="is not in the charter; leave it out")
            for name in row
            if name not in self._names
        ]


def number_texts(numbers: list[Any]) -> list[str]:
    """Return each number's canonical decimal text (`audit.decimals`)."""
    return [float_text(number) for number in numbers]


def encode_row(features: Sequence[Mapping[str, Any]], row: Row) -> list[float]:
    """Return one row as floats; see `RowEncoder.encode`."""
    return RowEncoder(features).encode(row)


def check_row(features: Sequence[Mapping[str, Any]], row: Row) -> list[Problem]:
    """Return one row's problems; see `RowEncoder.check`."""
    return RowEncoder(features).check(row)


def input_size(features: Sequence[Mapping[str, Any]]) -> int:
    """Return how many numbers one row becomes."""
    return RowEncoder(features).size


def plain_row(row: Row) -> dict[str, Any]:
    """Return a row as it is committed to: numbers as canonical decimal text, booleans and text as they are.

    Raises:
        EncodingError: a value that is no number, text, boolean or null.
    """
    plain: dict[str, Any] = {}
    for name, value in row.items():
        if value is None or isinstance(value, (bool, str)):
            plain[name] = value
        else:
            try:
                plain[name] = decimal_text(value)
            except DecimalError as error:
                raise EncodingError([Problem(field=name, code="wrong_type", message=str(error))]) from error
    return plain


def is_missing(value: object) -> bool:
    """Whether a value counts as absent: None, empty text, NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scales:
    """The features of a charter whose features are all numbers without a logarithm, side by side."""

    names: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    spans: tuple[float, ...]
    whole: tuple[int, ...]  # places of whole numbers
    layout: str  # the canonical text of a row, with %s for each value; empty where a name is not ASCII
    order: tuple[int, ...]  # in which the layout takes the values

    @classmethod
    def of(cls, features: Sequence[_Feature]) -> _Scales | None:
        if not features or any(
            feature.type in ("boolean", "category") or feature.log for feature in features
        ):
            return None
        names = tuple(feature.name for feature in features)
        order = tuple(sorted(range(len(names)), key=names.__getitem__))
        keys = [json.dumps(names[place], ensure_ascii=False).replace("%", "%%") for place in order]
        return cls(
            names=names,
            lower=tuple(feature.lower for feature in features),
            upper=tuple(feature.upper for feature in features),
            spans=tuple(feature.upper - feature.lower for feature in features),
            whole=tuple(place for place, feature in enumerate(features) if feature.type == "integer"),
            layout="{" + ",".join(f'{key}:"%s"' for key in keys) + "}"
            if all(map(str.isascii, names))
            else "",
            order=order,
        )

    def in_order(self, texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(map(texts.__getitem__, self.order))


class _Feature:
    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.name: str = spec["name"]
        self.type: str = spec["type"]
        self.unit: str = spec.get("unit", "")
        self.midpoint = spec.get("missing", "refuse") == "midpoint"
        self.size = 1
        self.log = False
        if self.type == "category":
            self.categories = {category: k for k, category in enumerate(spec["categories"])}
            self.size = len(self.categories)
        elif self.type != "boolean":
            self.lower, self.upper = float(parse_decimal(spec["lower"])), float(parse_decimal(spec["upper"]))
            self.log = spec.get("transform", "none") == "log"
            if self.log and self.lower <= 0:
                problem = "a log transform needs a lower bound above zero"
                raise EncodingError([Problem(field=self.name, code="out_of_bounds", message=problem)])

    def read(self, value: object) -> Problem | tuple[list[float], Problem | None]:
        if is_missing(value):
            if self.midpoint:
                return [0.0] * self.size, None
            return self._problem("missing", "is missing and has no default; give a value")
        if self.type == "boolean":
            return self._boolean(value)
        if self.type == "category":
            return self._category(value)
        return self._number(value)

    def _boolean(self, value: object) -> Problem | tuple[list[float], None]:
        code = _BOOLEANS.get(_text(value).lower())
        if code is None:
            return self._problem("wrong_type", f"{_shown(value)} is neither true nor false")
        return [code], None

    def _category(self, value: object) -> Problem | tuple[list[float], None]:
        chosen = self.categories.get(_text(value))
        if chosen is None:
            allowed = ", ".join(list(self.categories)[:12])
            return self._problem("unknown_category", f"{_shown(value)} is not declared; use one of {allowed}")
        return [1.0 if k == chosen else 0.0 for k in range(self.size)], None

    def _number(self, value: object) -> Problem | tuple[list[float], Problem | None]:
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
            return self._problem("wrong_type", f"{_shown(value)} is not a number")
        try:
            number = float(decimal_text(value.strip() if isinstance(value, str) else value))
        except DecimalError:
            return self._problem("wrong_type", f"{_shown(value)} is not a finite number")
        if self.type == "integer" and not number.is_integer():
            return self._problem("wrong_type", f"{_shown(value)} is not a whole number")
        outside = None
        if not self.lower <= number <= self.upper:
            unit = f" {self.unit}" if self.unit not in ("", "1") else ""  # "1": a number without one
            bounds = f"{self.lower:g} to {self.upper:g}{unit}"
            outside = self._problem("out_of_bounds", f"{_shown(value)} is outside {bounds}; check the unit")
            number = min(max(number, self.lower), self.upper)
        if self.log:
            span = math.log(self.upper) - math.log(self.lower)
            return [2.0 * (math.log(number) - math.log(self.lower)) / span - 1.0], outside
        return [2.0 * (number - self.lower) / (self.upper - self.lower) - 1.0], outside

    def _problem(self, code: str, message: str) -> Problem:
        return Problem(field=self.name, code=code, message=message)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, Decimal)):
        try:
            return decimal_text(value)
        except DecimalError:
            return ""
    return ""


def _shown(value: object) -> str:
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:40] + "…")
