"""Numbers as text: one canonical plain decimal for each value, because entries hold no floats."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Final

from audit.errors import AuditError

MAX_DIGITS: Final = 400  # more than any double needs, few enough that no text can exhaust memory

_CANONICAL = re.compile(r"0|-?(?:[1-9][0-9]*|0\.[0-9]*[1-9]|[1-9][0-9]*\.[0-9]*[1-9])")
_PLAIN = re.compile(r"-?[0-9]+\.[0-9]+")
_WRITTEN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_TIE = re.compile(r"-?[0-9]+\.[0-9]{6}5|.*e.*")
_SMALL: Final = 1e9  # below it half the distance to the next double is far under half a millionth
_CONTEXT = Context(prec=2 * MAX_DIGITS, rounding=ROUND_HALF_EVEN)


class DecimalError(AuditError):
    """The value has no canonical decimal text, or the text is not canonical."""

    code = "audit.decimal"


def decimal_text(value: int | float | Decimal | str) -> str:
    """Return `value` as plain decimal text: no exponent, no "+", no "-0", no needless zeros.

    Floats go through `repr`, so reading the text back gives the same double.

    Raises:
        DecimalError: NaN, infinity, a bool, text that is not a number, or more than `MAX_DIGITS` digits.

    >>> decimal_text(1e-05), decimal_text("2.50"), decimal_text(-0.0)
    ('0.00001', '2.5', '0')
    """
    if type(value) is float:  # the common case, without a detour: repr is canonical but for its ends
        text = repr(value)
        if _PLAIN.fullmatch(text):
            return (text[:-2] if text.endswith(".0") else text) if value else "0"
    elif type(value) is str and len(value) <= MAX_DIGITS and _CANONICAL.fullmatch(value):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal, str)):
        raise DecimalError(f"{value!r} is not a number; give an int, a float, a Decimal or decimal text")
    if isinstance(value, str) and not (len(value) <= MAX_DIGITS and _WRITTEN.fullmatch(value)):
        raise DecimalError(f"{value[:40]!r} is not a decimal number")
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except (InvalidOperation, ValueError) as error:
        raise DecimalError(f"{value!r} is not a decimal number") from error
    if not number.is_finite():
        raise DecimalError(f"{value!r} is not finite")
    if number == 0:
        return "0"
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(number.adjusted()) > MAX_DIGITS or abs(exponent) > MAX_DIGITS:
        raise DecimalError(f"a number of more than {MAX_DIGITS} digits")
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def float_text(value: float) -> str:
    """`decimal_text` of a finite float, for where there are many.

    >>> float_text(0.25), float_text(-0.0), float_text(3.0), float_text(1e-05)
    ('0.25', '0', '3', '0.00001')
    """
    text = repr(value)
    if text[-2:] == ".0":
        return text[:-2] if value else "0"
    return decimal_text(value) if "e" in text else text


def parse_decimal(text: object) -> Decimal:
    """Read canonical decimal text, and nothing else.

    Raises:
        DecimalError: another spelling of a number ("1e-5", "1.0", "+1", "-0"), or no number.
    """
    if not isinstance(text, str) or len(text) > 2 * MAX_DIGITS + 3 or not _CANONICAL.fullmatch(text):
        raise DecimalError(f"{str(text)[:40]!r} is not a canonical decimal; write it plainly, like 0.00001")
    return Decimal(text)


def _may_tie(text: str) -> bool:
    return (text[-1] == "5" or "e" in text) and _TIE.fullmatch(text) is not None


def rounded_text(value: float | Decimal, places: int = 6) -> str:
    """Return `value` rounded half to even at `places` decimals, as canonical text."""
    if places == 6 and type(value) is float and -_SMALL < value < _SMALL and not _may_tie(repr(value)):
        # A format rounds the double itself, not its shortest text. They differ only where that text is a tie:
        # a tie between the two would be a text as short, and nearer to the double.
        text = f"{value:.6f}".rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    number = Decimal(repr(value)) if isinstance(value, float) else value
    if not number.is_finite():
        raise DecimalError(f"{value!r} is not finite")
    return decimal_text(number.quantize(Decimal(1).scaleb(-places), context=_CONTEXT))
