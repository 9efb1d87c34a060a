"""A model card as a document: numbered sections of paragraphs, tables and lists, in three forms.

The content is `federation.model_card`'s; here is only how it looks as Markdown, as JSON for machines, and as
one HTML page that prints well and loads nothing from anywhere.

No string of a card is mark-up. What a charter, an officer or a site says goes into a card as it is, and every
form escapes it: `told` alone makes bold, code and verdicts, out of a template of the card's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Final, Literal, TypeAlias

NO_EVIDENCE: Final = "NO EVIDENCE"
Style: TypeAlias = Literal["plain", "bold", "code", "verdict"]
_MARKS: Final = re.compile(
    r"\*\*(?P<bold>.+?)\*\*|`(?P<code>[^`]+)`|(?P<verdict>NO EVIDENCE|ATTESTED|PROVED|FAILED)"
)
_HIDDEN: Final = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # turn the reading direction
_BREAKS: Final = re.compile("[\x00-\x20\x7f-\x9f\u2028\u2029]+")
_SPECIAL: Final = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_NUMBERED: Final = re.compile(r"^(\d{1,9})([.)])")
_FIRST: Final = re.compile(r"^[#+=:-]")
_is_plain_code = re.compile(r"[A-Za-z0-9+/=:.-]+( [A-Za-z0-9+/=:.-]+)*").fullmatch


@dataclass(frozen=True, slots=True)
class Span:
    text: str
    style: Style = "plain"


class Text(str):
    """What a card says: as a str it is plain text, `spans` hold how it looks."""

    __slots__ = ("spans",)

    spans: tuple[Span, ...]

    def __new__(cls, *spans: Span) -> Text:
        made = super().__new__(cls, "".join(span.text for span in spans))
        made.spans = spans
        return made


def told(template: str, *values: object) -> Text:
    """Return a text of the card's own, in which each `{}` is a value that is shown as it is.

    In the template `code`, **bold** and the verdicts are mark-up; in a value nothing is.

    >>> told("**{}** is ATTESTED", "**x** PROVED").spans
    (Span(text='**x** PROVED', style='bold'), Span(text=' is ', style='plain'), Span(text='ATTESTED', style='verdict'))
    """  # noqa: E501 - the line is what Python prints
    spans: list[Span] = []
    left = [str(value) for value in values]

    def add(piece: str, style: Style) -> None:
        first, *others = piece.split("{}")
        text = first + "".join(left.pop(0) + other for other in others)
        if text:
            spans.append(Span(text, style))

    place = 0
    for found in _MARKS.finditer(template):
        add(template[place : found.start()], "plain")
        style: Style = "bold" if found["bold"] else "code" if found["code"] else "verdict"
        add(found[style], style)
        place = found.end()
    add(template[place:], "plain")
    if left:
        raise ValueError(f"{template!r} has no place for {len(left)} of its values")
    return Text(*spans)


@dataclass(frozen=True, slots=True)
class Paragraph:
    text: str  # or a `Text`


@dataclass(frozen=True, slots=True)
class Table:
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Bullets:
    items: tuple[str, ...]


Block: TypeAlias = Paragraph | Table | Bullets


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One heading; `annex` names the point of Annex IV that it speaks to, "" under another heading's."""

    heading: str
    blocks: tuple[Block, ...]
    annex: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    model: str
    version: str
    title: str
    about: str  # what the card is, and is not
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """Return the card as Markdown."""
        lines = [f"# {_marked(self.title)}", "", _begun(self.about)]
        for section in self.sections:
            mark, where = ("##", f" (Annex IV, {section.annex})") if section.annex else ("###", "")
            lines += ["", f"{mark} {_marked(section.heading)}{where}"]
            for block in section.blocks:
                lines += ["", *_markdown(block)]
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """Return the card as one JSON document."""
        document = {
            "affidavit_card": 1,
            "model": self.model,
            "version": self.version,
            "title": self.title,
            "about": self.about,
            "sections": [
                {
                    "heading": section.heading,
                    "annex_iv": section.annex,
                    "blocks": [_plain(block) for block in section.blocks],
                }
                for section in self.sections
            ],
        }
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"

    def html(self) -> str:
        """Return the card as one page; every text is escaped."""
        parts = [f"<h1>{_inline(self.title)}</h1>", f'<p class="about">{_inline(self.about)}</p>']
        for section in self.sections:
            level = "h2" if section.annex else "h3"
            where = f' <span class="annex">Annex IV, {escape(section.annex)}</span>' if section.annex else ""
            parts.append(f"<{level}>{_inline(section.heading)}{where}</{level}>")
            parts += [_html(block) for block in section.blocks]
        body = "\n".join(parts)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(_line(self.title))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )


def _markdown(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield _begun(text)
        case Bullets(items):
            yield from (f"- {_begun(item)}" for item in items)
        case Table(header, rows):
            yield _row(header)
            yield "|" + " --- |" * len(header)
            yield from map(_row, rows)


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_marked, cells)) + " |"


def _begun(text: str) -> str:
    """Return a text as Markdown that begins a block, which no character of it may turn into another one."""
    return _FIRST.sub(r"\\\g<0>", _NUMBERED.sub(r"\1\\\2", _marked(text)))


def _marked(text: str) -> str:
    """Return a text as one line of Markdown."""
    return "".join(map(_marked_span, _spans(text))).strip()


def _marked_span(span: Span) -> str:
    text = _line(span.text)
    if span.style == "code" and _is_plain_code(text):
        return f"`{text}`"
    shown = _SPECIAL.sub(r"\\\g<0>", escape(text, quote=False))
    return f"**{shown.strip()}**" if span.style == "bold" and shown.strip() else shown


def _spans(text: str) -> tuple[Span, ...]:
    return text.spans if isinstance(text, Text) else (Span(text),)


def _line(text: str) -> str:
    """Return a text on one line, without what breaks lines, drives terminals or turns what follows around."""
    return _BREAKS.sub(" ", _HIDDEN.sub("", text))


def _plain(block: Block) -> dict[str, Any]:
    match block:
        case Paragraph(text):
            return {"paragraph": text}
        case Bullets(items):
            return {"list": list(items)}
        case Table(header, rows):
            return {"table": {"header": list(header), "rows": [list(row) for row in rows]}}


def _html(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Table(header, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join(
                "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows
            )
            start = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
            return f'<div class="wide"><table>{start}<tbody>{body}</tbody></table></div>'


def _inline(text: str) -> str:
    return "".join(map(_inline_span, _spans(text)))


def _inline_span(span: Span) -> str:
    shown = escape(_line(span.text))
    match span.style:
        case "bold":
            return f"<strong>{shown}</strong>"
        case "code":
            return f"<code>{shown}</code>"
        case "verdict":
            return f'<b class="{shown.lower().replace(" ", "-")}">{shown}</b>'
        case _:
            return shown


_STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .6rem; border-top: 2px solid #1f3a5f;
  color: #1f3a5f; break-after: avoid; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; break-after: avoid; }
.about { color: #444; border-left: 3px solid #9db2cc; padding-left: .8rem; }
.annex { float: right; font-weight: 400; font-size: .8rem; color: #5a6b80; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #d5dbe3;
  overflow-wrap: anywhere; }
th { background: #eef2f7; font-weight: 600; overflow-wrap: normal; }
tr { break-inside: avoid; }
code { font: .82em ui-monospace, monospace; overflow-wrap: anywhere; }
.no-evidence { color: #8a4b00; } .attested { color: #274b7a; } .proved { color: #1d6b35; }
.failed { color: #a31621; }
@page { size: A4; margin: 16mm 14mm; }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; } }
"""
