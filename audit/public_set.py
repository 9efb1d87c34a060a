"""The public set: the rows that a charter declares public, so that anyone can recompute a gate.

Its digest is the SHA-256 of the file's bytes: UTF-8 CSV with a header that names every feature and the label.
Other columns are ignored. Labels are class names, or numbers for a regression.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from audit.decimals import DecimalError, decimal_text, parse_decimal
from audit.encoding import EncodingError, RowEncoder, is_missing
from audit.errors import AuditError


class PublicSetError(AuditError):
    """The file is not the public set of this charter; names line, column and fix."""

    code = "audit.public_set"


def public_set_digest(data: bytes) -> str:
    """Return the digest a charter names the file by."""
    return hashlib.sha256(data).hexdigest()


def read_public_set(
    data: bytes, features: Sequence[Mapping[str, Any]], label: Mapping[str, Any]
) -> tuple[list[list[float]], list[float]]:
    """Return the encoded rows and their labels (class indices, or values in the label's unit).

    Raises:
        PublicSetError: not UTF-8 CSV, a missing column, a bad value; names line and column.
    """
    encoder = RowEncoder(features)
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = next(reader, [])
        missing = [name for name in (*encoder.names, label["name"]) if name not in header]
        if missing or len(set(header)) != len(header):
            raise PublicSetError(f"public set: the header lacks {missing}, or names a column twice")
        rows, labels = [], []
        for number, cells in enumerate(reader, start=2):
            if not cells:
                continue
            if len(cells) != len(header):
                raise PublicSetError(
                    f"public set, line {number}: {len(cells)} cells for {len(header)} columns"
                )
            row = dict(zip(header, cells, strict=True))
            rows.append(encoder.encode({name: row[name] for name in encoder.names}))
            labels.append(_label(row[label["name"]], label, number))
    except EncodingError as error:
        raise PublicSetError(f"public set, line {number}: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise PublicSetError(f"public set: not UTF-8 CSV: {error}") from error
    if not rows:
        raise PublicSetError("public set: no rows")
    return rows, labels


def missing_values(data: bytes, names: Sequence[str]) -> dict[str, frozenset[int]]:
    """Return the places of the rows that lack each of the named features.

    An encoded number does not tell: what is missing lies where the middle of the declared range does.

    `data` is a file that `read_public_set` has read; both pass over empty lines.
    """
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    return {
        name: frozenset(place for place, row in enumerate(rows) if is_missing(row[name])) for name in names
    }


def _label(text: str, label: Mapping[str, Any], number: int) -> float:
    where = f"public set, line {number}, column {label['name']}"
    if "classes" in label:
        if text not in label["classes"]:
            raise PublicSetError(
                f"{where}: {text[:40]!r} is none of the classes {list(label['classes'])[:12]}"
            )
        return float(list(label["classes"]).index(text))
    try:
        value = parse_decimal(decimal_text(text))
    except DecimalError as error:
        raise PublicSetError(f"{where}: {error}") from error
    lower, upper = parse_decimal(label["lower"]), parse_decimal(label["upper"])
    return float(min(max(value, lower), upper))
