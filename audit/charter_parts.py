"""Strict reading of a charter's objects: every failure names the key's path."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from audit.decimals import parse_decimal
from audit.errors import AuditError


class CharterFormError(AuditError):
    """The bytes are not a charter in canonical form; `field` is the key's path."""

    code = "audit.charter_form"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"charter {field}: {problem}")
        self.field, self.problem = field, problem


class CharterPart:
    """One object of the charter; every read names its key on failure."""

    def __init__(
        self, value: Any, path: str, *, fields: tuple[str, ...], optional: tuple[str, ...] = ()
    ) -> None:
        if not isinstance(value, dict):
            raise CharterFormError(path or "top", "is not an object")
        missing, unknown = set(fields) - set(value), set(value) - set(fields) - set(optional)
        if missing or unknown:
            raise CharterFormError(
                path or "top", f"missing keys {sorted(missing)}, unknown {sorted(unknown)}"
            )
        self.value, self.path = value, path

    def fail(self, key: str, problem: str) -> CharterFormError:
        return CharterFormError(f"{self.path}.{key}".lstrip("."), problem)

    def text(self, key: str) -> str:
        value = self.value[key]
        if not isinstance(value, str):
            raise self.fail(key, "is not text")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.fail(key, f"{value[:40]!r} is none of {', '.join(allowed)}")
        return value

    def count(self, key: str, *, least: int = 0, source: CharterPart | None = None) -> int:
        value = (source or self).value[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise (source or self).fail(key, f"is not a whole number of at least {least}")
        return value

    def decimal(self, key: str, *, least: Decimal | None = None, above: Decimal | None = None) -> Decimal:
        try:
            value = parse_decimal(self.text(key))
        except AuditError as error:
            raise self.fail(key, str(error)) from error
        if (least is not None and value < least) or (above is not None and value <= above):
            raise self.fail(key, f"{value} is out of range")
        return value

    def items(self, key: str) -> list[Any]:
        value = self.value[key]
        if not isinstance(value, list):
            raise self.fail(key, "is not a list")
        return value

    def texts(self, key: str) -> list[str]:
        values = self.items(key)
        if not all(isinstance(value, str) for value in values) or len(set(values)) != len(values):
            raise self.fail(key, "is not a list of distinct texts")
        return values
