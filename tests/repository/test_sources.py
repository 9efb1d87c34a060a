"""The tracked files speak of the project alone, and no module outgrows its noun."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

# Each pattern is written in pieces, so that this file does not match itself.
FOREIGN = {
    "a folder of one machine": re.compile(
        r"(?<![\w.$}>)])/(?:wor" r"k|roo" r"t|hom" r"e/\w+|opt/(?:wheels|py" r"pi))\b(?!-)"
    ),
    "a package index": re.compile(
        r"\b(?:py" r"pi\.org|pythonho" r"sted\.org|download\.pyto" r"rch\.org|test\.py" r"pi)\b"
    ),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIV" r"ATE KEY-----\s*[A-Za-z0-9+/]{40}"),
    "an open end": re.compile(r"#\s*(?:TO" r"DO|FIX" r"ME|XX" r"X)\b"),
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
        ("a folder of one machine", "see /work/main/notes"),
        ("a folder of one machine", "cd '/root'"),
        ("a folder of one machine", 'path = "/home/alice/data"'),
        ("a package index", "--index-url https://pypi.org/simple"),
        ("an open end", "x = 1  # TODO later"),
        ("a private key", "-----BEGIN PRIVATE KEY-----\n" + "A" * 64),
    ],
)
def test_patterns_catch_what_they_name(reason, line):
    assert FOREIGN[reason].search(line)


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
