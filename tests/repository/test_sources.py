"""The tracked files speak of the project alone, and no module outgrows its noun."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

# Patterns and examples are written with tildes that are taken out, so that this file does not match itself.
FOREIGN = {
    reason: re.compile(pattern.replace("~", ""))
    for reason, pattern in {
        "a folder of one machine": r"(?<![\w.$}>)])/(?:wo~rk|ro~ot|ho~me/\w+|opt/(?:whe~els|py~pi))\b(?!-)",
        "a package index": r"\b(?:py~pi\.org|python~hosted\.org|download\.py~torch\.org|test\.py~pi)\b",
        "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIV~ATE KEY-----\s*[A-Za-z0-9+/]{40}",
        "an open end": r"#\s*(?:TO~DO|FIX~ME|XX~X)\b",
    }.items()
}
LONGEST_MODULE_LINES = 500


@pytest.fixture(scope="module")
def tracked(repository: Path) -> dict[str, str]:
    """The text of every tracked file, by its path."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, timeout=60, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout, so nothing is tracked")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        path = repository / name
        if path.is_file():
            data = path.read_bytes()
            if b"\0" not in data:
                texts[name] = data.decode()
    return texts


@pytest.mark.parametrize("reason", FOREIGN)
def test_no_tracked_file_names_what_is_not_the_projects(reason, tracked):
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}"
        for name, text in tracked.items()
        for match in FOREIGN[reason].finditer(text)
    ]
    assert not found, f"{reason}: {found}"


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("a folder of one machine", "see /wo~rk/main/notes"),
        ("a folder of one machine", "cd '/ro~ot'"),
        ("a folder of one machine", 'path = "/ho~me/alice/data"'),
        ("a package index", "--index-url https://py~pi.org/simple"),
        ("an open end", "x = 1  # TO~DO later"),
        ("a private key", "-----BEGIN PRIV~ATE KEY-----\n" + "A" * 64),
    ],
)
def test_patterns_catch_what_they_name(reason, line):
    assert FOREIGN[reason].search(line.replace("~", ""))


def test_every_module_stays_short(tracked):
    lengths = {name: text.count("\n") for name, text in tracked.items() if name.endswith(".py")}
    too_long = {name: lines for name, lines in lengths.items() if lines >= LONGEST_MODULE_LINES}
    assert not too_long


def test_no_generated_file_is_tracked(tracked):
    generated = re.compile(
        r"(^|/)(__pycache__|\.venv|\.affidavit|build|dist|htmlcov)/|\.(pyc|egg-info|fab|db)$"
    )
    assert not [name for name in tracked if generated.search(name)]


def test_no_module_is_a_drawer(tracked):
    assert not [
        name for name in tracked if Path(name).name in {"utils.py", "helpers.py", "misc.py", "common.py"}
    ]
