"""What the demo shows: numbered steps, a live table of rounds, answers and refusals."""

from __future__ import annotations

import csv
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from audit.epsilon import epsilon_text
from clients.demo_data import CLASSES

if TYPE_CHECKING:
    from audit.bodies import VersionRegistered
    from federation.progress import RunEvent

_SHOWN_ROUNDS: Final = 8


class Screen:
    """Prints for a person; with `quiet` it prints nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console = console or Console(highlight=False, quiet=quiet)
        self._steps = 0
        self._rounds: deque[RunEvent] = deque(maxlen=_SHOWN_ROUNDS)
        self._live: Live | None = None
        self._planned = 0

    def step(self, title: str) -> None:
        self._steps += 1
        self._console.print(f"\n[bold]{self._steps}. {escape(title)}[/bold]")

    def note(self, text: str) -> None:
        self._console.print(f"   {escape(text)}", soft_wrap=True)

    def text(self, text: str) -> None:
        for line in text.rstrip().splitlines():
            self._console.print(f"   {escape(line)}", soft_wrap=True)

    def hospitals(self, files: Mapping[str, Path], label: str) -> None:
        """Show each hospital's file, rows and mix. Only the demo may: it dealt the rows itself."""
        table = Table(box=None, pad_edge=False)
        for column in ("  hospital", "patients", *CLASSES, "file"):
            table.add_column(column)
        for name, path in files.items():
            with path.open(encoding="utf-8", newline="") as file:
                labels = [row[label] for row in csv.DictReader(file)]
            counts = [str(labels.count(kind)) for kind in CLASSES]
            table.add_row(f"  {name}", str(len(labels)), *counts, str(path))
        self._console.print(table)

    @contextmanager
    def training(self, rounds: int) -> Iterator[None]:
        """Show a table that follows the rounds; a line every few rounds where there is no terminal."""
        self._planned = rounds
        if not self._console.is_terminal:
            yield
            return
        with Live(self._table(), console=self._console, refresh_per_second=8) as live:
            self._live = live
            try:
                yield
            finally:
                live.update(self._table())
                self._live = None

    def event(self, event: RunEvent) -> None:
        """Take one event of the run, from whichever thread."""
        if event.kind in ("refused", "abandoned", "failed"):
            self.note(f"{event.kind}: {event.detail}")
        if event.kind != "round":
            return
        self._rounds.append(event)
        if self._live is not None:
            self._live.update(self._table())
        elif event.round in (1, event.rounds) or event.round % 5 == 0:
            self.note("   ".join(f"{name} {value}" for name, value in _cells(event).items()))

    def gates(self, registered: VersionRegistered) -> None:
        table = Table(box=None, pad_edge=False)
        for column in ("  gate", "baseline", "needed", "value", "measured on", "passed"):
            table.add_column(column)
        for gate in registered.gates:
            passed = "yes" if gate.passed else "NO"
            source = f"{gate.source} {gate.dataset[:8]}…"
            table.add_row(f"  {gate.metric}", gate.baseline, gate.floor, gate.value, source, passed)
        self._console.print(table)
        for site in registered.costs:
            self.note(
                f"{site.site}: epsilon {site.run_epsilon} for this run (one {site.unit}, {site.relation}, "
                f"delta {site.delta}, {site.accountant.upper()})"
            )

    def answer(self, answer: Mapping[str, Any]) -> None:
        given = answer["answers"][0]
        self.note(f"answer   {given['label']}, probability of malignant {given.get('probability')}")
        self.note(f"allowed  by {', '.join(answer['decision']['policies'])}")
        entry = answer["entry"]
        self.note(f"receipt  entry {entry['leaf_index']}, leaf {entry['leaf_hash'][:16]}…, signed by the log")

    def refusal(self, purpose: str, refusal: Mapping[str, Any]) -> None:
        self.note("")
        self.note(f"the same row for {purpose}: {refusal['status']} {refusal['title']}")
        entry = refusal["entry"]["leaf_index"]
        self.note(f"refused  by {', '.join(refusal['policies'])}; recorded as entry {entry}")

    def caught(self, report: str, code: int) -> None:
        lines = report.rstrip().splitlines()
        first = next((number for number, line in enumerate(lines) if " FAIL " in line), len(lines) - 1)
        self.text("\n".join([*lines[first : first + 2], lines[-1]]))
        self.note(f"exit code {code}: caught")

    def end(self, folder: Path, seconds: float) -> None:
        home = folder / "homes"
        self._console.print(f"\n[bold]Done in {seconds:.0f} s. What to try next[/bold]")
        for line in (
            ("without a policy nothing is believed", f"verify {folder}/evidence.zip"),
            ("for a script", f"verify {folder}/evidence.zip --policy {folder}/policy.txt --json"),
            ("the log itself", f"log list --home {home} --type round.completed"),
            ("made from the log alone", f"models card breast-cytology --home {home}"),
            ("what the odometer counted", f"site status northgate --home {home}"),
            ("then open http://127.0.0.1:8000/docs", f"serve --home {home}"),
            ("begin with your own data", "charter new --from my.csv"),
        ):
            self.note(f"{_command()} {line[1]}   # {line[0]}")

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        shown = [_cells(event) for event in self._rounds]
        for column in shown[-1] if shown else {"round": "", "sites": "", "auc": "", "epsilon": ""}:
            table.add_column(f"  {column}" if column == "round" else column, justify="right")
        for cells in shown:
            table.add_row(*cells.values())
        return table


def _command() -> str:
    """How to call the command from here: by its name, or by the path it was installed at."""
    if shutil.which("affidavit"):
        return "affidavit"
    installed = Path(sys.executable).with_name("affidavit")
    try:
        return str(installed.relative_to(Path.cwd()))
    except ValueError:
        return str(installed)


def _cells(event: RunEvent) -> dict[str, str]:
    metrics = {name: f"{value:.4f}" for name, value in event.metrics.items()}
    return {
        "round": f"{event.round}/{event.rounds}",
        "sites": str(len(event.sites)),
        **metrics,
        "epsilon": "" if event.epsilon is None else epsilon_text(event.epsilon, 3),
        "cosigned": str(event.witnesses),
        "seconds": f"{event.elapsed_s:.2f}",
    }
