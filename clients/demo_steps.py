"""What both demos do alike: the folder, one row to ask about, and the verifier in a process of its own."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from audit.console import CommandError
from audit.verify.report import Verdict

if TYPE_CHECKING:
    from federation.charter import Charter

PURPOSE: Final = "diagnosis-support"
_MARK: Final = ".made-by-affidavit-demo"


def make_folder(folder: Path) -> None:
    """Make the demo's folder anew.

    Raises:
        CommandError: it holds something that no demo made.
    """
    if folder.exists() and not (folder / _MARK).exists() and any(folder.iterdir()):
        raise CommandError(
            f"{folder} holds something that is not this demo's; give --folder", code="demo.folder_taken"
        )
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _MARK).write_text("The demo replaces this folder.\n", encoding="utf-8")


def first_row(public: Path, charter: Charter) -> dict[str, float]:
    """Return the features of the public set's first row."""
    with public.open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file))
    return {feature.name: float(row[feature.name]) for feature in charter.features}


def verify_alone(evidence: Path, policy: Path) -> subprocess.CompletedProcess[str]:
    """Run the verifier isolated: no environment, no user site, nothing but the file and the policy."""
    return subprocess.run(
        [sys.executable, "-I", "-m", "audit.verify", str(evidence), "--policy", str(policy)],
        env={},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def verdict_of(report: str) -> str:
    """Return the word that the verifier's report closes with."""
    closing = [line for line in report.splitlines() if line.partition(":")[0] in set(Verdict)]
    return closing[-1].partition(":")[0] if closing else "none"
