"""The page of the soak run says what was run, and what was not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.soak_report import PARTS, RESULTS, assemble, page, recorder, run


def row(part: str, **more: object) -> dict[str, object]:
    return {
        "part": part,
        "test": "t",
        "size": "3",
        "result": "0 lost",
        "seconds": 1.5,
        "cpu_seconds": 1,
        **more,
    }


def test_page_names_every_part_that_was_not_run():
    text = page([row("kill"), row("flips", size="20,000")], where="here")
    assert "| kill -9 of a writer in the middle of an append | 3 | 0 lost | 1.5 | 1 |" in text
    said = text.splitlines()[-1]
    assert said.startswith("Not run here: ")
    assert [title for title in PARTS.values() if title in said] == [
        title for part, title in PARTS.items() if part not in ("kill", "flips")
    ]
    assert "Not run here" not in page([row(part) for part in PARTS], where="here")


@pytest.mark.parametrize("line", ["assert False", "raise SystemExit(3)"])
def test_run_that_fails_leaves_the_page_as_it_was(tmp_path, line):
    target = tmp_path / "log.md"
    target.write_text("before")
    assert run([sys.executable, "-c", line], target) != 0
    assert (target.read_text(), list(tmp_path.iterdir())) == ("before", [target])


def test_run_that_passes_writes_what_its_tests_reported(tmp_path, repository):
    target = tmp_path / "log.md"
    script = (
        "from tests.soak_report import recorder\nrecorder('t')('kill', size='500 kills', result='0 lost')\n"
    )
    assert (
        run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(repository)!r})\n{script}"], target)
        == 0
    )
    assert "| 500 kills | 0 lost |" in target.read_text()
    assert "Python 3." in target.read_text()


def test_parts_run_one_by_one_make_one_page_with_the_last_of_a_repeated_test(tmp_path):
    rows = [row("kill", result="1 lost"), row("flips", test="u"), row("kill", result="0 lost, again")]
    (tmp_path / "rows").write_text("".join(json.dumps(each) + "\n" for each in rows))
    assemble(tmp_path / "rows", tmp_path / "log.md", "One part was run again.")
    text = (tmp_path / "log.md").read_text()
    assert "One part was run again." in text
    assert "writes nothing here" not in text
    assert ("0 lost, again" in text, "1 lost" in text) == (True, False)


def test_part_that_the_page_does_not_know_is_refused(tmp_path: Path):
    with pytest.raises(KeyError, match="add it to PARTS"):
        recorder("t")("surprise", size="1", result="2")


def test_nothing_is_written_outside_the_soak_run(tmp_path, monkeypatch):
    monkeypatch.delenv(RESULTS, raising=False)
    recorder("t")("kill", size="1", result="2")
    monkeypatch.setenv(RESULTS, str(tmp_path / "rows"))
    recorder("t")("kill", size="1", result="2")
    (written,) = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert (written["part"], written["test"]) == ("kill", "t")
