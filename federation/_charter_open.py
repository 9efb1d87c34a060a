"""Key paths of a charter as text, the lines they stand on, and the values still left open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from federation.errors import CharterError, Problem

KeyPath: TypeAlias = tuple[str | int, ...]
Located: TypeAlias = tuple[KeyPath, Problem]

PLACEHOLDER: Final = "TODO"
NOISE: Final = ("privacy", "noise_multiplier")
_MEANINGS: Final = frozenset({"lower", "upper", "unit", "categories", "classes"})


def placeholder_problems(value: object, path: KeyPath = ()) -> list[Located]:
    """Return one problem for every value that still reads TODO."""
    if isinstance(value, Mapping):
        parts = [(item, (*path, str(key))) for key, item in value.items()]
        return [found for item, inner in parts for found in placeholder_problems(item, inner)]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in placeholder_problems(item, (*path, i))]
    if isinstance(value, str) and value.strip().upper().startswith(PLACEHOLDER):
        by_meaning = "write what the field means, never what is in anybody's data"
        fix = by_meaning if _MEANINGS & set(path) else "decide it"
        return [(path, Problem(path="", message=f"still says {PLACEHOLDER}", fix=fix))]
    return []


def with_lines(
    found: Iterable[Located], line_of: Callable[[KeyPath], int | None], source: str
) -> CharterError:
    """Return the error that names every problem's line, in the order of the file."""
    problems = [
        Problem(path=path_text(path) or p.path, message=p.message, fix=p.fix, line=line_of(path))
        for path, p in found
    ]
    return CharterError(sorted(problems, key=lambda p: (p.line or 0, p.path)), source=source)


def path_text(path: KeyPath) -> str:
    """Return `features[3].upper` for ("features", 3, "upper")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def split_path(path: str) -> KeyPath:
    """Return ("features", 3, "upper") for `features[3].upper`."""
    parts: list[str | int] = []
    for piece in path.replace("[", ".[").split("."):
        if piece.startswith("["):
            parts.append(int(piece[1:-1]))
        elif piece:
            parts.append(piece)
    return tuple(parts)
