"""A model card as a document: numbered sections of paragraphs, tables and lists, in three forms.

The content is `federation.model_card`'s; here is only how it looks as Markdown, as JSON for machines, and as
one HTML page that prints well and loads nothing from anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any, Final, TypeAlias

NO_EVIDENCE: Final = "NO EVIDENCE"
_WORDS = re.compile(r"NO EVIDENCE|ATTESTED|PROVED|FAILED")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Text, in which `code` and **bold** are all there is of Markdown."""

    text: str


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
        lines = [f"# {self.title}", "", self.about]
        for section in self.sections:
            mark, where = ("##", f" (Annex IV, {section.annex})") if section.annex else ("###", "")
            lines += ["", f"{mark} {section.heading}{where}"]
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
            f"<title>{escape(self.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )


def _markdown(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield text
        case Bullets(items):
            yield from (f"- {item}" for item in items)
        case Table(header, rows):
            yield "| " + " | ".join(header) + " |"
            yield "|" + " --- |" * len(header)
            for row in rows:
                yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


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
    shown = _BOLD.sub(r"<strong>\1</strong>", _CODE.sub(r"<code>\1</code>", escape(text)))
    return _WORDS.sub(lambda found: f'<b class="{found[0].lower().replace(" ", "-")}">{found[0]}</b>', shown)


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
