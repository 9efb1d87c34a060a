"""The demo, whole: training through Flower, the API and the verifier in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from audit.console import CommandError
from clients.demo import run_demo
from clients.demo_screen import Screen


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Three rounds in place of thirty, twice into one folder: the second run replaces the first."""
    folder = tmp_path_factory.mktemp("demo") / "affidavit-demo"
    folder.mkdir()
    (folder / ".made-by-affidavit-demo").touch()
    (folder / "left-over").write_text("of an earlier run")
    return folder, run_demo(folder, Screen(quiet=True), rounds=3)


@pytest.mark.slow  # starts the API and three verifiers as processes
def test_every_link_holds(demo):
    folder, outcome = demo
    assert outcome.verdict == "VALID"
    assert outcome.verdict_altered == "INVALID"
    assert outcome.refused_by == ["purpose-outside-charter"]
    assert outcome.rounds == 3
    assert outcome.epsilon <= 3
    assert outcome.answer["label"] in ("benign", "malignant")
    assert not (folder / "left-over").exists()
    assert (folder / "learning.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow  # shares the demo above
def test_report_shows_what_was_proved_and_what_was_only_attested(demo):
    folder, _ = demo
    report = (folder / "report.txt").read_text()
    assert "PROVED" in report
    assert "ATTESTED" in report
    assert "NO EVIDENCE" not in report


@pytest.mark.slow  # shares the demo above
def test_evidence_without_the_policy_is_never_valid(demo):
    folder, _ = demo
    done = subprocess.run(
        [sys.executable, "-I", "-m", "audit.verify", str(folder / "evidence.zip"), "--json"],
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert json.loads(done.stdout)["verdict"] == "SELF-CONSISTENT ONLY"


def test_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CommandError, match="--folder") as caught:
        run_demo(tmp_path, Screen(quiet=True))
    assert caught.value.code == "demo.folder_taken"
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
