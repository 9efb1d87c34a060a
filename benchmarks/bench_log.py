"""The log beside other ways to keep one: ratios taken in one run, on one machine.

    python benchmarks/bench_log.py [--entries 1000000] [--seconds 4] [--write]

(a) 512 submitters with group commit against the same path with a commit an entry, on SQLite and PostgreSQL;
(b) pymerkle in memory and on SQLite, where it is installed (GPL, for this benchmark only, no extra names it);
(c) Go's sumdb judge over the whole exported log, where Go and golang-golang-x-mod-dev are installed.

Times are this process's own CPU unless a row says wall. Memory is the peak of a process that does one thing.
The machine may be shared, so trust the ratios; `--write` keeps the tables in docs/results/log_speed.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import random
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from log_load import (
    ORIGIN,
    SUBMITTERS,
    Table,
    fill,
    made,
    peak_mib,
    prediction,
    rate,
    submit,
    yardstick_us,
)
from sqlalchemy import delete, insert

from audit import _bulk, _store
from audit.checkpoints import Checkpoint, parse_checkpoint_note, sign_checkpoint
from audit.entries import columns_of
from audit.fsck import fsck
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.location import Location
from audit.merkle import hash_leaf, verify_inclusion
from audit.notes import NoteSigner
from audit.tables import LEAF
from audit.tiles import root_of_bundles
from audit.tiles_export import export_tiles

ROOT = Path(__file__).resolve().parent.parent
GOPATH = Path("/usr/share/gocode")
JUDGE = ROOT / "tests" / "conformance" / "judge" / "main.go"
RESULTS = ROOT / "docs" / "results" / "log_speed.md"
SMALL = 10_000


def compare_commits(table: Table, title: str, new_place: Callable[[], Path | str], seconds: float) -> None:
    table.head(f"(a) {SUBMITTERS} submitters, {title}, durable", "group commit", "a commit each", "ratio")
    entries = made(int(seconds * 30_000))
    with Ledger.create(new_place(), ORIGIN) as ledger:
        count, wall, cpu = submit(ledger, entries, seconds)
        assert ledger.tree_size == count
    with Ledger.create(new_place(), ORIGIN) as ledger:
        ledger._sequencer._max_batch = 1  # the same path, without its group commit
        singles, single_wall, single_cpu = submit(ledger, made(20_000), seconds)
    faster = count / wall / (singles / single_wall)
    table.row("acknowledged a second, wall (aim >= 20x)", f"{count / wall:,.0f}",
              f"{singles / single_wall:,.0f}", f"{faster:.1f}x")  # fmt: skip
    cpu_us, single_us = cpu / count * 1e6, single_cpu / singles * 1e6
    table.row("CPU us an append, asyncio included (aim < 30)", f"{cpu_us:.1f}", f"{single_us:.0f}",
              f"{single_us / cpu_us:.1f}x")  # fmt: skip
    with Ledger.create(new_place(), ORIGIN) as ledger:
        count, _, cpu = submit(ledger, map(prediction, range(10**9)), seconds)
    table.row("the same with making the entry: body, bytes, columns", f"{cpu / count * 1e6:.1f}", "", "")


def compare_latency(table: Table, folder: Path) -> None:
    """A lone append beside a bare commit of a row as large."""
    table.head("A lone append on SQLite, nothing else waiting: median ms, wall", "append", "bare commit")
    bare = sqlite3.connect(folder / "bare.db", isolation_level=None)
    bare.execute("PRAGMA journal_mode=WAL")
    bare.execute("PRAGMA synchronous=FULL")
    bare.execute("CREATE TABLE row (body BLOB)")
    ours, theirs = [], []
    with Ledger.create(folder / "lone.db", ORIGIN) as ledger:
        for data, event_id, columns in made(300):
            begun = time.perf_counter()
            ledger.append_wait(data, event_id=event_id, index_columns=columns)
            between = time.perf_counter()
            bare.execute("INSERT INTO row VALUES (?)", (data,))
            theirs.append(time.perf_counter() - between)
            ours.append(between - begun)
    bare.close()
    table.row("until durable", *(f"{statistics.median(side) * 1e3:.2f}" for side in (ours, theirs)))


def compare_inserts(table: Table, place: str) -> None:
    """COPY and executemany into the same table in turn, 256 rows a transaction."""
    rows = [
        (i, event_id, hash_leaf(data), data, *(getattr(columns, c.name) for c in list(LEAF.columns)[4:]))
        for i, (data, event_id, columns) in enumerate(made(256))
    ]
    named = [dict(zip(LEAF.columns.keys(), row, strict=True)) for row in rows]
    ways: dict[str, Callable[[Any], object]] = {
        "COPY": lambda connection: _bulk.insert_rows(connection, LEAF, rows),
        "executemany": lambda connection: connection.execute(insert(LEAF), named),
    }
    Ledger.create(place, ORIGIN).close()
    engine = _store.open_engine(Location.parse(place))
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(40):
        for way, act in ways.items():
            with _store.writing(engine) as connection:
                wall, cpu = time.perf_counter(), time.process_time()
                act(connection)
                taken[way].append((time.perf_counter() - wall, time.process_time() - cpu))
                connection.execute(delete(LEAF))
    engine.dispose()
    table.head("PostgreSQL: 256 rows into the leaf table, median us a row", *ways)
    for name, at in (("wall", 0), ("CPU of the client", 1)):
        medians = (statistics.median(pair[at] for pair in taken[way]) for way in ways)
        table.row(name, *(f"{value / 256 * 1e6:.1f}" for value in medians))


def postgresql(table: Table, seconds: float) -> None:
    path = ROOT / "tests" / "postgresql.py"
    spec = importlib.util.spec_from_file_location("bench_postgresql", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    skipped = importlib.import_module("pytest").skip.Exception
    try:
        with module.running_server() as server:
            compare_commits(table, "PostgreSQL", server.new_schema, seconds)
            compare_inserts(table, server.new_schema())
    except skipped as reason:
        table.say(f"PostgreSQL: skipped, {reason}")


# one thing each, in a process of its own: CPU and peak memory


def child_append(folder: Path, size: int) -> float:
    with Ledger.create(folder / "log.db", ORIGIN) as ledger:
        return size / fill(ledger, size)


def _proofs(folder: Path, size: int, prove: Callable[[Ledger], Callable[[int], object]]) -> float:
    with Ledger.open(folder / "log.db") as ledger:
        act, draw = prove(ledger), random.Random(1)
        for tile in range(0, size, 256):
            act(tile)  # warm: every full tile is read once
        return rate(act, [draw.randrange(size) for _ in range(20_000)])


def child_inclusion(folder: Path, size: int) -> float:
    return _proofs(folder, size, lambda ledger: lambda leaf: ledger.inclusion_proof(leaf, size))


def child_consistency(folder: Path, size: int) -> float:
    return _proofs(folder, size, lambda ledger: lambda leaf: ledger.consistency_proof(leaf + 1, size))


def child_verify(folder: Path, size: int) -> float:
    draw = random.Random(1)
    with Ledger.open(folder / "log.db") as ledger:
        root = ledger.root_hash
        leaves = [draw.randrange(size) for _ in range(2_000)]
        proofs = {
            leaf: (ledger.leaf_hashes(leaf, leaf + 1)[0], ledger.inclusion_proof(leaf, size))
            for leaf in leaves
        }

    def verify(leaf: int) -> None:
        leaf_hash, proof = proofs[leaf]
        verify_inclusion(leaf_index=leaf, tree_size=size, leaf_hash=leaf_hash, proof=proof, root_hash=root)

    return rate(verify, leaves)


def child_export(folder: Path, size: int) -> float:
    key = NoteSigner(ORIGIN, SigningKey.generate())
    with Ledger.open(folder / "log.db") as ledger:
        note = sign_checkpoint(Checkpoint(ORIGIN, size, ledger.root_hash), key)
        begun = time.process_time()
        export_tiles(ledger, note, folder / "tiles")
    (folder / "vkey").write_text(key.vkey)
    return size / (time.process_time() - begun)


def child_walk(folder: Path, size: int) -> float:
    begun = time.process_time()
    checkpoint = parse_checkpoint_note((folder / "tiles" / "checkpoint").read_bytes())
    root = root_of_bundles(lambda path: (folder / "tiles" / path).read_bytes(), checkpoint.tree_size)
    assert (checkpoint.tree_size, checkpoint.root_hash) == (size, root)
    return size / (time.process_time() - begun)


def child_fsck(folder: Path, size: int) -> float:
    begun = time.process_time()
    found = fsck(folder / "log.db", columns_of=columns_of)
    assert found.ok, found
    assert found.entries == size
    return size / (time.process_time() - begun)


CHILDREN: dict[str, tuple[str, Callable[[Path, int], float]]] = {
    "append": ("append in bulk", child_append),
    "inclusion": ("inclusion proofs, warm (aim >= 15,000)", child_inclusion),
    "consistency": ("consistency proofs, warm", child_consistency),
    "verify": ("inclusion proofs verified", child_verify),
    "export": ("export as tiles", child_export),
    "walk": ("exported log: every entry hashed, root (aim >= 300,000)", child_walk),
    "fsck": ("fsck: every entry decoded, every column and node", child_fsck),
}


def in_child(kind: str, folder: Path, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder), "--entries", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def sizes(table: Table, folder: Path, size: int) -> dict[str, float]:
    """Do each thing on a small and on the large log; return the rates on the large one."""
    table.head(
        "A second of CPU, and peak memory, on SQLite",
        f"{SMALL:,}", f"{size:,}", f"MiB at {SMALL:,}", f"MiB at {size:,}",
    )  # fmt: skip
    rates = {}
    for name in ("small", "large"):
        (folder / name).mkdir()
    for kind, (title, _) in CHILDREN.items():
        small, large = in_child(kind, folder / "small", SMALL), in_child(kind, folder / "large", size)
        rates[kind] = large["rate"]
        table.row(
            title,
            *(f"{each['rate']:,.0f}" for each in (small, large)),
            *(f"{each['peak']:.0f}" for each in (small, large)),
        )
    return rates


def compare_pymerkle(table: Table, folder: Path, size: int, ours: dict[str, float]) -> None:
    try:
        library: Any = importlib.import_module("pymerkle")
    except ImportError:
        table.say("(b) pymerkle is not installed here; skipped")
        return
    table.head("(b) pymerkle, a second of CPU", f"ours at {size:,}", "pymerkle", "ratio")

    def against(name: str, mine: float, theirs: float) -> None:
        table.row(name, f"{mine:,.0f}", f"{theirs:,.0f}", f"{mine / theirs:.2f}x")

    count = min(size, 20_000)
    with Ledger.open(folder / "large" / "log.db") as ledger:
        bodies = ledger.entries(0, count)
    draw = random.Random(2)
    memory = library.InmemoryTree(algorithm="sha256")
    begun = time.process_time()
    for body in bodies:
        memory.append_entry(body)
    against("append; theirs in memory, ours durable", ours["append"], count / (time.process_time() - begun))
    numbers = [draw.randrange(count) for _ in range(2_000)]
    for number in numbers[:200]:
        memory.prove_inclusion(number + 1)
    per_second = rate(lambda number: memory.prove_inclusion(number + 1), numbers)
    against(f"inclusion proof; theirs in memory at {count:,}", ours["inclusion"], per_second)
    disk = library.SqliteTree(str(folder / "pymerkle.db"), algorithm="sha256")
    begun = time.process_time()
    for body in bodies[:500]:
        disk.append_entry(body)
    against("append; theirs on SQLite, a commit each", ours["append"], 500 / (time.process_time() - begun))
    disk.append_entries(bodies[500:], chunksize=1000)
    per_second = rate(lambda number: disk.prove_inclusion(number + 1), numbers[:100])
    against(f"inclusion proof; theirs on SQLite at {count:,}", ours["inclusion"], per_second)


def compare_judge(table: Table, folder: Path, size: int, ours: float) -> None:
    if shutil.which("go") is None or not (GOPATH / "src/golang.org/x/mod/sumdb").is_dir():
        table.say("(c) no Go, or no golang-golang-x-mod-dev, here; skipped")
        return
    judge = folder / "judge"
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GOPATH": str(GOPATH), "GO111MODULE": "off",
        "GOCACHE": str(folder / "cache"),
    }  # fmt: skip
    subprocess.run(["go", "build", "-o", judge, JUDGE], env=environment, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    vkey = (folder / "large" / "vkey").read_text()
    done = subprocess.run(
        [judge, folder / "large" / "tiles", vkey], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout
    theirs = size / (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    table.head("(c) the whole exported log, entries a second of CPU", "ours (Python)", "Go judge", "ratio")
    table.row("every entry under the root", f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=1_000_000, help="size of the large log")
    parser.add_argument("--seconds", type=float, default=4.0, help="of appends, each way")
    parser.add_argument(
        "--write", action="store_true", help=f"keep the tables in {RESULTS.relative_to(ROOT)}"
    )
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        measured = CHILDREN[given.child][1](given.folder, given.entries)
        print(json.dumps({"rate": measured, "peak": peak_mib()}))
        return 0
    table = Table()
    begun = yardstick_us()
    with tempfile.TemporaryDirectory(prefix="affidavit-bench-") as name:
        folder = Path(name)
        places = (folder / f"append-{number}.db" for number in range(10))
        compare_commits(table, "SQLite", lambda: next(places), given.seconds)
        compare_latency(table, folder)
        postgresql(table, given.seconds)
        rates = sizes(table, folder, given.entries)
        compare_pymerkle(table, folder, given.entries, rates)
        compare_judge(table, folder, given.entries, rates["walk"])
    table.say(
        f"Yardstick: SHA-256 of 1 KiB took {begun:.2f} us of CPU before and {yardstick_us():.2f} us after; "
        "0.9 us on an idle server core of 2023."
    )
    if given.write:
        RESULTS.write_text(f"# The log's speed\n\n{INTRODUCTION}\n" + "\n".join(table.text) + "\n")
    return 0


INTRODUCTION = """`make results` writes this file (`benchmarks/bench_log.py --write`). One run, one machine,
perhaps a busy one: trust the ratios. Entries are predictions of 840 bytes. CPU is that of the process which
appends; a PostgreSQL server's own is not in it. Memory is the peak of a process that does one thing; warm
proofs hold at most 4096 full tiles, 64 MiB. The walk over an exported log hashes every entry and compares the
root with the checkpoint; it does not read the entries. `fsck` does: it decodes each one, derives all its
columns and compares every index, node, root and checkpoint.
"""


if __name__ == "__main__":
    sys.exit(main())
