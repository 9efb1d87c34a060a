"""What pydantic found, said again for whoever wrote the file: the key, what is wrong, what to write."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from federation.errors import Problem

_PATTERN_FIX = {
    "identity": "paste the line printed by `affidavit identity new`, which begins with ed25519:",
    "key": "paste the line printed by `affidavit identity new`, which begins with ed25519:",
    "digest": "write the 64 hex digits that `sha256sum` prints for the file",
    "name": "use lower-case letters, digits and hyphens (features: letters, digits and _), at most 63",
}


def problems_of(
    error: ValidationError, model: type[BaseModel]
) -> list[tuple[tuple[str | int, ...], Problem]]:
    """Return (key path, problem) for every error in `error`."""
    found = []
    for item in error.errors(include_url=False):
        path = tuple(item["loc"])
        message, fix = _explain(
            str(item["type"]), item.get("ctx") or {}, item.get("input"), path, str(item["msg"]), model
        )
        found.append((path, Problem(path="", message=message, fix=fix)))
    return found


def _explain(
    kind: str,
    ctx: dict[str, Any],
    given: object,
    path: tuple[str | int, ...],
    message: str,
    model: type[BaseModel],
) -> tuple[str, str]:
    last = str(path[-1]) if path else ""
    if kind == "missing":
        return "is missing", f"add `{last}:` here"
    if kind == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        close = difflib.get_close_matches(last, known, n=1, cutoff=0.6)
        if close:
            return "is not a key of a charter", f"did you mean `{close[0]}`?"
        return "is not a key of a charter", f"remove it; the keys here are {', '.join(known)}"
    if kind == "literal_error":
        expected = str(ctx.get("expected", ""))
        options = [option.strip("'") for option in expected.replace(" or ", ", ").split(", ")]
        close = difflib.get_close_matches(str(given), options, n=1, cutoff=0.6)
        return (
            f"{given!s} is not known",
            f"did you mean {close[0]}?" if close else f"choose one of {', '.join(options)}",
        )
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        bound = ctx.get("gt", ctx.get("ge", ctx.get("lt", ctx.get("le"))))
        words = {"greater_than": "greater than", "greater_than_equal": "at least",
                 "less_than": "less than", "less_than_equal": "at most"}[kind]  # fmt: skip
        return f"is {given}", f"write a number {words} {bound}"
    if kind == "number":
        return f"{given!r} {message}", "write a number such as 0.5 or 1e-5, without quotes"
    if kind == "count" or kind.startswith("int"):
        return f"{given!r} is not a whole number", "write a whole number such as 30, without quotes"
    if kind == "string_pattern_mismatch":
        return f"{given!r} is not in the form expected", _PATTERN_FIX.get(last, f"match {ctx.get('pattern')}")
    if kind.startswith("string"):
        return f"{given!r} is not text that fits here", "write text, in quotes if it looks like a number"
    if kind.startswith("bool"):
        return f"{given!r} is neither true nor false", "write true or false"
    if kind in ("tuple_type", "list_type"):
        return "is not a list", "write a list: [first, second], or one `- item` a line"
    if kind in ("too_short", "too_long"):
        return (
            "has the wrong number of items",
            f"give {ctx.get('min_length', ctx.get('max_length', 'another number'))} or more",
        )
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "is not a mapping", "write indented `key: value` lines below it"
    return message, "see `affidavit charter new` for a complete example"


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    kind: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        kind = (
            _model_in(kind.model_fields[part].annotation)
            if part in getattr(kind, "model_fields", {})
            else None
        )
        if kind is None:
            return []
    return list(kind.model_fields)


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        found = _model_in(part)
        if found is not None:
            return found
    return None
