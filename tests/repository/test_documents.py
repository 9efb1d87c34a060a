"""Documents link to what exists, and every decision is in the index."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
ADR_NAME = re.compile(r"\d{4}-[a-z0-9]+(-[a-z0-9]+)*\.md")


def broken_links(document: Path) -> list[str]:
    """Relative links of a Markdown file whose target does not exist; fenced code is not read."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = (first or second for first, second in LINK.findall(text))
    relative = (target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:", target))
    return [target for target in relative if target and not (document.parent / target).exists()]


def test_documents_link_to_files_that_exist(repository):
    documents = [*repository.glob("*.md"), *(repository / "docs").rglob("*.md")]
    assert len(documents) >= 4
    broken = {str(path.relative_to(repository)): found for path in documents if (found := broken_links(path))}
    assert not broken


@pytest.mark.parametrize(
    "link", ["[x](gone.md)", "![picture](gone.png)", "[x](gone.md#part)", "a [b](../no/such) c"]
)
def test_broken_link_is_found(link, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"See {link}.\n")
    assert broken_links(document)


@pytest.mark.parametrize(
    "link", ["[x](page.md)", "[x](#part)", "[x](https://example.org/y)", "```\n[x](gone.md)\n```"]
)
def test_sound_link_is_left_alone(link, tmp_path):
    document = tmp_path / "page.md"
    document.write_text(f"{link}\n")
    assert not broken_links(document)


def test_every_decision_is_in_the_index_with_its_status(repository):
    folder = repository / "docs" / "adr"
    index = (folder / "README.md").read_text()
    decisions = [path for path in folder.glob("*.md") if path.name not in {"README.md", "0000-template.md"}]
    for path in decisions:
        assert ADR_NAME.fullmatch(path.name), path.name
        text = path.read_text()
        assert text.startswith(f"# {int(path.name[:4])}. "), f"{path.name} does not begin with its number"
        (status,) = re.findall(r"^\*\*Status\*\*: (\w+)", text, re.MULTILINE)
        row = re.search(
            rf"^\| \[{path.name[:4]}\]\({re.escape(path.name)}\) \|.*\| (\w+)", index, re.MULTILINE
        )
        assert row, f"{path.name} is not in the index"
        assert row[1] == status, f"{path.name} is {status}, the index says {row[1]}"
    numbers = [path.name[:4] for path in decisions]
    assert len(set(numbers)) == len(numbers), "two decisions share a number"
