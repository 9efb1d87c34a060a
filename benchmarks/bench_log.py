"""The log beside other ways to keep one: ratios taken in one run, on one machine.

    python benchmarks/bench_log.py [--entries 100000] [--seconds 4]

(a) group commit against one commit an entry, on the same database with the same 512 submitters;
(b) pymerkle in memory and on SQLite, where it is installed (GPL, for this benchmark only);
(c) Go's sumdb judge over the whole exported log, where Go and golang-golang-x-mod-dev are installed.

Times are this process's own CPU unless a line says wall; the machine may be shared, so trust the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from audit.checkpoints import Checkpoint, parse_checkpoint_note, sign_checkpoint
from audit.entries import Prediction, RowCommitment, columns_of, encode_entry, new_entry
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.merkle import hash_leaf, hash_node, verify_consistency, verify_inclusion
from audit.notes import NoteSigner
from audit.tiles import ENTRIES, decode_bundle, tiles_of
from audit.tiles_export import export_tiles

SUBMITTERS = 512
ORIGIN = "bench.example/log"
GOPATH = Path("/usr/share/gocode")
SOURCE = Path(__file__).resolve().parent.parent / "tests" / "conformance" / "judge" / "main.go"


def prediction(number: int) -> tuple[bytes, str]:
    body = Prediction(
        request_id=f"{number:032x}", model="toy", version="a" * 64, charter="b" * 64, transition="c" * 64,
        purpose="triage", principal="p-" + "d" * 32, role="consumer", site="",
        policies=("consumers-may-predict",),
        policy_set="e" * 64, rows=(RowCommitment(input="f" * 64, output="0" * 64),),
    )  # fmt: skip
    entry = new_entry(body, actor="api", time="2026-11-23T22:23:12Z")
    return encode_entry(entry), entry.event_id


def made(count: int) -> list[tuple[bytes, str, Any]]:
    """Entries ready to append: what an append costs is then the log's alone."""
    return [(data, event_id, columns_of(data)) for data, event_id in map(prediction, range(count))]


async def submit(ledger: Ledger, entries: Iterator[tuple[bytes, str, Any]], seconds: float) -> int:
    """512 submitters, each waiting until its entry is durable before it sends the next."""
    stop, done = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal done
        for data, event_id, columns in entries:
            await ledger.append_from_loop(data, event_id=event_id, index_columns=columns)
            done += 1
            if time.perf_counter() >= stop:
                return

    await asyncio.gather(*(one() for _ in range(SUBMITTERS)))
    return done


def appends(folder: Path, seconds: float, max_batch: int | None) -> tuple[float, float]:
    """Return (durable appends a second of wall time, CPU microseconds an append)."""
    entries = made(2_000 if max_batch == 1 else 60_000)
    with Ledger.create(folder / f"append-{max_batch}.db", ORIGIN) as ledger:
        if max_batch is not None:
            ledger._sequencer._max_batch = max_batch  # the same path, without its group commit
        begun, cpu = time.perf_counter(), time.process_time()
        count = asyncio.run(submit(ledger, iter(entries), seconds))
        wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert ledger.tree_size == count
    return count / wall, cpu / count * 1e6


def fill(ledger: Ledger, count: int) -> float:
    """Append `count` entries in bulk; return CPU microseconds each."""
    spent, left = 0.0, count
    while left:
        batch = made(min(4_000, left))
        begun = time.process_time()
        futures = [
            ledger.append(data, event_id=event, index_columns=columns) for data, event, columns in batch
        ]
        for future in futures:
            future.result(120)
        spent += time.process_time() - begun
        left -= len(batch)
    return spent / count * 1e6


def rate(act: Callable[[int], object], numbers: list[int]) -> float:
    """Return calls a second of CPU."""
    begun = time.process_time()
    for number in numbers:
        act(number)
    return len(numbers) / (time.process_time() - begun)


def whole_log(folder: Path) -> tuple[int, float]:
    """Check every entry of an exported log against its signed root; return (entries, CPU seconds)."""
    begun = time.process_time()
    checkpoint = parse_checkpoint_note((folder / "checkpoint").read_bytes())
    row: list[bytes] = []
    for tile in tiles_of(checkpoint.tree_size):
        if tile.level == ENTRIES:
            row += map(hash_leaf, decode_bundle((folder / tile.path).read_bytes(), tile.width))
    count, carry = len(row), []
    while row:  # all perfect subtrees of a level at once; the odd one joins the right edge
        if len(row) & 1:
            carry.append(row.pop())
        row = [hash_node(row[i], row[i + 1]) for i in range(0, len(row), 2)]
    root = carry[0]
    for left in carry[1:]:
        root = hash_node(left, root)
    assert root == checkpoint.root_hash
    return count, time.process_time() - begun


def build_judge(folder: Path) -> Path | None:
    if shutil.which("go") is None or not (GOPATH / "src/golang.org/x/mod/sumdb").is_dir():
        return None
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GOPATH": str(GOPATH), "GO111MODULE": "off",
        "GOCACHE": str(folder / "cache"),
    }  # fmt: skip
    subprocess.run(["go", "build", "-o", folder / "judge", SOURCE], env=environment, check=True)
    return folder / "judge"


def judge_cpu(judge: Path, folder: Path, vkey: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([judge, folder, vkey], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def pymerkle() -> Any:
    try:
        return importlib.import_module("pymerkle")
    except ImportError:
        return None


def line(name: str, ours: str, other: str = "", ratio: str = "") -> None:
    print(f"  {name:<46} {ours:>16}  {other:>22}  {ratio:>10}")


def header(name: str, ours: str = "", other: str = "", ratio: str = "ratio") -> None:
    print(f"\n{name:<48} {ours:>16}  {other:>22}  {ratio if other else '':>10}")


def compare_pymerkle(folder: Path, ledger: Ledger, size: int, ours: dict[str, float]) -> None:
    library = pymerkle()
    if library is None:
        print("\n(b) pymerkle is not installed here; skipped")
        return
    header("(b) pymerkle, a CPU second each", "ours (SQLite)", "pymerkle")
    count, bodies = min(size, 20_000), ledger.entries(0, min(size, 20_000))
    draw = random.Random(2)
    memory = library.InmemoryTree(algorithm="sha256")
    begun = time.process_time()
    for body in bodies:
        memory.append_entry(body)
    per_second = count / (time.process_time() - begun)
    line("append, in memory (ours: durable)", f"{1e6 / ours['append_us']:,.0f}", f"{per_second:,.0f}",
         f"{1e6 / ours['append_us'] / per_second:.2f}x")  # fmt: skip
    numbers = [draw.randrange(count) for _ in range(2_000)]
    for number in numbers[:200]:
        memory.prove_inclusion(number + 1)
    per_second = rate(lambda number: memory.prove_inclusion(number + 1), numbers)
    line(f"inclusion proof, in memory at {count:,}", f"{ours['inclusion']:,.0f}", f"{per_second:,.0f}",
         f"{ours['inclusion'] / per_second:.2f}x")  # fmt: skip
    disk = library.SqliteTree(str(folder / "pymerkle.db"), algorithm="sha256")
    begun = time.process_time()
    for body in bodies[:500]:
        disk.append_entry(body)
    single = 500 / (time.process_time() - begun)
    line("append, SQLite, a commit each (ours: group)", f"{1e6 / ours['append_us']:,.0f}", f"{single:,.0f}",
         f"{1e6 / ours['append_us'] / single:.1f}x")  # fmt: skip
    disk.append_entries(bodies[500:], chunksize=1000)
    per_second = rate(lambda number: disk.prove_inclusion(number + 1), numbers[:100])
    line(f"inclusion proof, SQLite at {count:,}", f"{ours['inclusion']:,.0f}", f"{per_second:,.0f}",
         f"{ours['inclusion'] / per_second:.1f}x")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=100_000, help="size of the log for proofs and checks")
    parser.add_argument("--seconds", type=float, default=4.0, help="of appends, each way")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="affidavit-bench-") as name:
        folder = Path(name)
        header(f"(a) {SUBMITTERS} submitters, SQLite, durable", "group commit", "a commit each")
        grouped, cpu = appends(folder, given.seconds, None)
        single, single_cpu = appends(folder, given.seconds, 1)
        line("acknowledged a second, wall", f"{grouped:,.0f}", f"{single:,.0f}", f"{grouped / single:.1f}x")
        line(
            "CPU an append, us (with asyncio)", f"{cpu:.0f}", f"{single_cpu:.0f}", f"{single_cpu / cpu:.1f}x"
        )

        key = NoteSigner(ORIGIN, SigningKey.generate())
        with Ledger.create(folder / "log.db", ORIGIN) as ledger:
            early = fill(ledger, min(10_000, given.entries))
            low = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            append_us = fill(ledger, given.entries - ledger.tree_size) if given.entries > 10_000 else early
            high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            size, root = given.entries, ledger.root_hash
            draw = random.Random(1)
            for tile in range(0, size, 256):
                ledger.inclusion_proof(tile, size)  # warm: every full tile is read once
            numbers = [draw.randrange(size) for _ in range(20_000)]
            inclusion = rate(lambda number: ledger.inclusion_proof(number, size), numbers)
            consistency = rate(lambda number: ledger.consistency_proof(number + 1, size), numbers)
            header(f"A log of {size:,} entries on SQLite, a CPU second each")
            line("bulk append, CPU us an entry (aim < 30)", f"{append_us:.1f}")
            line("inclusion proofs, warm (aim >= 15,000)", f"{inclusion:,.0f}")
            line("consistency proofs, warm", f"{consistency:,.0f}")
            proofs = [
                (n, ledger.inclusion_proof(n, size), ledger.leaf_hashes(n, n + 1)[0]) for n in numbers[:2000]
            ]
            verified = rate(lambda i: verify_inclusion(
                leaf_index=proofs[i][0], tree_size=size, leaf_hash=proofs[i][2], proof=proofs[i][1],
                root_hash=root,
            ), list(range(len(proofs))))  # fmt: skip
            line("inclusion proofs verified", f"{verified:,.0f}")
            half = ledger.root_at(size // 2)
            verify_consistency(
                size1=size // 2, size2=size, root1=half, root2=root,
                proof=ledger.consistency_proof(size // 2, size),
            )  # fmt: skip
            line("peak memory, MiB, after 10,000 and after all", f"{low / 1024:.0f}", f"{high / 1024:.0f}")
            note = sign_checkpoint(Checkpoint(ORIGIN, size, root), key)
            begun = time.process_time()
            export_tiles(ledger, note, folder / "tiles")
            line("export, entries", f"{size / (time.process_time() - begun):,.0f}")
            compare_pymerkle(folder, ledger, size, {"append_us": append_us, "inclusion": inclusion})

        header("(c) whole exported log, entries a CPU second", "ours (Python)", "Go judge")
        count, seconds = whole_log(folder / "tiles")
        judge, aim = build_judge(folder), "every entry and the root (aim >= 300,000)"
        if judge is None:
            line(aim, f"{count / seconds:,.0f}", "no Go here")
        else:
            theirs = judge_cpu(judge, folder / "tiles", key.vkey)
            line(aim, f"{count / seconds:,.0f}", f"{count / theirs:,.0f}",
                 f"{theirs / seconds:.2f}x")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
