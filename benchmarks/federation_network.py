"""The rounds over real SuperNodes: ours as in production, and a plain Flower + Opacus app at its defaults.

Ours is the federation of processes that the tests kill (`tests.network.fleet`): `affidavit coordinator up`,
`affidavit site up` for each site, TLS, authentication, agents, ledgers, statements, log and witnesses.
Round times are the ServerApp's own, from the run's journal.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from federation_costs import OFFLINE, Laps, median_laps, tree_cpu_s

HERE: Final = Path(__file__).resolve().parent
LIMIT_S: Final = 210.0


def demo_fleet(folder: Path, rounds: int, more: str) -> Any:
    """Return the demo's four hospitals with the demo's charter, as a fleet of real processes."""
    sys.path.insert(0, str(HERE.parent))
    from clients.demo_data import demo_charter, write_demo_files
    from tests.network.fleet import Fleet

    files = write_demo_files(folder / "data")
    tables = {name: list(csv.reader(path.open(encoding="utf-8"))) for name, path in files.sites.items()}

    def charter(identities: dict[str, str], officer: str) -> str:
        officers = {"officer": officer}
        text = demo_charter(public=files.public, identities=identities, officers=officers, rounds=rounds)
        return text.replace("round_timeout_s: 20", "round_timeout_s: 120")

    columns = tuple(next(iter(tables.values()))[0])
    sites = tuple(sorted(tables))
    fleet = Fleet(folder, sites, lambda name: tables[name][1:], columns=columns, charter=charter, more=more)
    return fleet, files.public.read_bytes()


def network_ours(masked: bool, rounds: int = 6) -> dict[str, Any]:
    more = "\nsecure_aggregation: {tolerated: 1}\n" if masked else ""
    with tempfile.TemporaryDirectory(prefix="aff") as name:
        fleet, public = demo_fleet(Path(name), rounds, more)
        with fleet:
            fleet.coordinator.blobs.put(public)
            return timed_run(fleet)


def timed_run(fleet: Any) -> dict[str, Any]:
    """Carry out one run and tell what a round took: in all, and its parts by the journal."""
    run = fleet.start()
    marks: list[tuple[float, float]] = []
    events: list[dict[str, Any]] = []
    for event in journal(fleet, run):
        events.append(event)
        if event["kind"] == "round":
            marks.append((event["elapsed_s"], tree_cpu_s()))
    if fleet.end(run) is None or len(marks) < 2:
        raise SystemExit(f"the run did not end: {events[-3:]}")
    wall, cpu = median_laps(marks)
    return {
        "wall": wall,
        "cpu": cpu,
        "rounds": [round(b - a, 2) for (a, _), (b, _) in pairwise(marks)],
        **parts(events),
    }


def journal(fleet: Any, run: str) -> Iterator[dict[str, Any]]:
    """Yield a run's events as its ServerApp writes them, until it ends."""
    path, seen, until = fleet.home / "runs" / f"{run}.events.jsonl", 0, time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for line in lines[seen:]:
            event: dict[str, Any] = json.loads(line)
            yield event
            if event["kind"] in ("completed", "failed", "not_resumed"):
                return
        seen = len(lines)
        time.sleep(0.02)


def parts(events: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of a round's parts: until all are asked, until all have answered, and the rest."""
    before: dict[int, dict[str, float]] = {}
    for event in events:
        if event["kind"] in ("asked", "answered", "round"):
            before.setdefault(event["round"], {})[event["kind"]] = event["elapsed_s"]
    spans: dict[str, list[float]] = {"asking": [], "answers": [], "closing": []}
    for number in sorted(before)[1:]:
        now, ended = before[number], before[number - 1].get("round")
        if ended is None or len(now) < 3:
            continue
        spans["asking"].append(now["asked"] - ended)
        spans["answers"].append(now["answered"] - now["asked"])
        spans["closing"].append(now["round"] - now["answered"])
    return {name: round(statistics.median(found), 3) for name, found in spans.items() if found}


def network_pieces(width: int = 3160, sites: int = 2) -> dict[str, Any]:
    """Two rounds of a model of ten million parameters through real SuperNodes; its files travel in pieces."""
    sys.path.insert(0, str(HERE.parent))
    from tests.network.fleet import Fleet, rows_of, wide_charter

    names = ("north", "south", "west")[:sites]
    with tempfile.TemporaryDirectory(prefix="aff") as name:
        fleet = Fleet(
            Path(name),
            names,
            lambda site: rows_of(site, 40),
            charter=wide_charter(width),
        )
        with fleet:
            found = timed_run(fleet)
            return {
                **found,
                "parameters": fleet.charter.dimension,
                "peak_mib": {kind: peak_of(fleet, kind) for kind in ("agent", "supernode", "superlink")},
            }


def peak_of(fleet: Any, kind: str) -> int:
    """The largest resident memory that a process of this kind ever had, MiB."""
    found = []
    for pid in fleet.pids(kind):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM")]
    return max(found, default=0)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group; after a while without asking again."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
            return


def network_plain(rounds: int = 4) -> dict[str, Any]:
    """flower-superlink, four flower-supernode, flwr run: as their documentation has it."""
    from clients.demo_data import write_demo_files

    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_demo_files(folder / "data")
        times, home = folder / "times", folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "bench"\n'
            '[superlink.bench]\naddress = "127.0.0.1:28543"\ninsecure = true\n'
        )
        environment = {
            **os.environ,
            **OFFLINE,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FLWR_HOME": str(home),
        }

        def start(*command: str, **more: str) -> None:
            log = stack.enter_context((folder / f"{command[0]}-{len(more)}.log").open("wb"))
            process = subprocess.Popen(
                [str(programs / command[0]), *command[1:]],
                env={**environment, **more},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(end, process)

        start(
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", "28543"),
            "--disable-runtime-dependency-installation",
        )
        time.sleep(5)
        for index in range(4):
            start(
                *("flower-supernode", "--insecure", "--superlink", "127.0.0.1:28543"),
                *("--port", str(28550 + index), "--node-config", f"partition-id={index}"),
                FLWR_HOME=str(folder / f"node{index}"),
            )
        time.sleep(8)
        config = f'rounds={rounds} data="{folder / "data"}" times="{times}"'
        subprocess.run(
            [
                str(programs / "flwr"),
                "run",
                str(HERE / "plain_flower"),
                "bench",
                "--run-config",
                config,
            ],
            env=environment,
            check=True,
            capture_output=True,
            timeout=60,
        )
        until = time.time() + 200
        laps, seen = Laps(), 1  # the first line is of round 0, before any training
        while seen <= rounds and time.time() < until:
            time.sleep(0.05)
            lines = times.read_text().splitlines() if times.exists() else []
            if len(lines) > seen:
                laps.mark()
                seen = len(lines)
    wall, cpu = laps.medians()
    return {"wall": wall, "cpu": cpu}
