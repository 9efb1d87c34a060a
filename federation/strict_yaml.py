"""The strict YAML 1.2 subset that charters are written in.

One reading only: no anchors, aliases, tags, merge keys, directives or second documents, no duplicate keys,
and scalars by the YAML 1.2 core rules (`yes`, `on` and `12:30` are text). Numbers become `int` or
`Decimal`, so that `1e-5` and `0.00001` are the same number. Every key path keeps its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, TypeAlias

import yaml

from federation.errors import CharterFileError

YamlValue: TypeAlias = "bool | int | Decimal | str | list[YamlValue] | dict[str, YamlValue] | None"
Path: TypeAlias = tuple[str | int, ...]

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
MAX_DIGITS: Final = 40

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,3})?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_NOT_A_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: the value, and the line (from 1) of every key path."""

    value: YamlValue
    lines: dict[Path, int]

    def line_of(self, path: Path) -> int | None:
        """Return the line of `path`, or of its nearest parent that is in the file."""
        for length in range(len(path), -1, -1):
            line = self.lines.get(path[:length])
            if line is not None:
                return line
        return None


def parse_yaml(text: str, *, source: str = "") -> Document:
    """Parse `text`, refusing whatever two readers could read differently.

    Raises:
        CharterFileError: naming the line and what to write instead.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise CharterFileError(f"is larger than {MAX_BYTES} bytes", source=source, line=None)
    try:
        _refuse_features(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        problem = error.problem or error.context or "is not YAML"
        if "expected a single document" in str(error):
            problem = "holds a second document; keep one charter in a file"
        raise CharterFileError(f"not YAML: {problem}", source=source, line=line) from error
    except yaml.YAMLError as error:
        raise CharterFileError(f"not YAML: {error}", source=source, line=None) from error
    except RecursionError as error:
        raise CharterFileError(f"nesting is deeper than {MAX_DEPTH}", source=source, line=None) from error
    if node is None:
        raise CharterFileError("is empty", source=source, line=None)
    lines: dict[Path, int] = {}
    return Document(_read(node, (), lines, source), lines)


def _refuse_features(text: str, source: str) -> None:
    refused: tuple[tuple[type[yaml.Token], str], ...] = (
        (yaml.AnchorToken, "anchors (&name) are not allowed; write the value out"),
        (yaml.AliasToken, "aliases (*name) are not allowed; write the value out"),
        (yaml.TagToken, "tags (!name) are not allowed; write the plain value"),
        (yaml.DirectiveToken, "directives (%) are not allowed; remove the line"),
    )
    documents = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        line = token.start_mark.line + 1
        for kind, message in refused:
            if isinstance(token, kind):
                raise CharterFileError(message, source=source, line=line)
        if isinstance(token, yaml.DocumentStartToken):
            documents += 1
            if documents > 1:
                raise CharterFileError(
                    "a second document starts here; keep one charter in a file", source=source, line=line
                )


def _read(node: yaml.Node, path: Path, lines: dict[Path, int], source: str) -> YamlValue:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if len(path) > MAX_DEPTH:
        raise CharterFileError(f"nesting is deeper than {MAX_DEPTH}", source=source, line=line)
    if isinstance(node, yaml.ScalarNode):
        if node.style is not None:
            return str(node.value)
        return _scalar(node.value, source, line)
    if isinstance(node, yaml.SequenceNode):
        return [_read(item, (*path, index), lines, source) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        raise CharterFileError("is neither a value, a list nor a mapping", source=source, line=line)
    result: dict[str, YamlValue] = {}
    for key_node, value_node in node.value:
        key_line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise CharterFileError("a key must be plain text", source=source, line=key_line)
        key = str(key_node.value)
        if key == "<<" and key_node.style is None:
            raise CharterFileError(
                "merge keys (<<) are not allowed; write the values out", source=source, line=key_line
            )
        if key in result:
            raise CharterFileError(
                f"key {key!r} occurs twice; keep one of them", source=source, line=key_line
            )
        lines[(*path, key)] = key_line
        result[key] = _read(value_node, (*path, key), lines, source)
    return result


def _scalar(text: str, source: str, line: int) -> bool | int | Decimal | str | None:
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _NOT_A_NUMBER.fullmatch(text):
        raise CharterFileError(f"{text} is not a number a charter can hold", source=source, line=line)
    if _LEADING_ZERO.fullmatch(text):
        raise CharterFileError(
            f"{text} has leading zeros; write it without them, or in quotes if it is text",
            source=source,
            line=line,
        )
    if _DECIMAL.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise CharterFileError(f"a number has over {MAX_DIGITS} characters", source=source, line=line)
        return int(text) if _INTEGER.fullmatch(text) else Decimal(text)
    return text
