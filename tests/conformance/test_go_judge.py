"""Go's checksum database, an implementation that shares nothing with ours, judges exported logs and proofs.

Needs Debian's golang-go and golang-golang-x-mod-dev; the judge is compiled once a session, without a network.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from audit.canonical import canonical_bytes
from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.entries import IndexColumns
from audit.errors import AuditError
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.merkle import (
    consistency_proof,
    hash_leaf,
    inclusion_proof,
    root_of,
    source_of,
    verify_consistency,
    verify_inclusion,
)
from audit.notes import KeyType, NoteSigner, open_note
from audit.tiles_export import export_tiles

SOURCE = Path(__file__).parent / "judge" / "main.go"
GOPATH = Path("/usr/share/gocode")
ORIGIN = "hospital.example/judged"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
WITNESSES = [
    NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE) for name in ("east", "north", "west")
]
KEYS = [LOG.vkey, *(witness.vkey for witness in WITNESSES)]
NOW = 1_800_000_000


@pytest.fixture(scope="session")
def judge(tmp_path_factory) -> Path:
    if shutil.which("go") is None or not (GOPATH / "src/golang.org/x/mod/sumdb/tlog").is_dir():
        pytest.skip("the judge needs Go: install golang-go and golang-golang-x-mod-dev")
    folder = tmp_path_factory.mktemp("judge")
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(folder), "GOPATH": str(GOPATH), "GO111MODULE": "off",
        "GOCACHE": str(folder / "cache"), "GOFLAGS": "", "GOTOOLCHAIN": "local",
    }  # fmt: skip
    command = ["go", "build", "-o", str(folder / "judge"), str(SOURCE)]
    built = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert built.returncode == 0, built.stderr
    return folder / "judge"


def fill(ledger: Ledger, numbers: Iterable[int]) -> None:
    columns = IndexColumns(type="test.event", actor="tester", time="2026-11-23T22:23:12Z")
    futures = []
    for number in numbers:
        body = canonical_bytes({"event_id": f"{number:032x}", "text": "x" * (number * 7 % 90)})
        futures.append(ledger.append(body, event_id=f"{number:032x}", index_columns=columns))
        if len(futures) == 2000:
            for future in futures:
                future.result(60)
            futures.clear()
    for future in futures:
        future.result(60)


def note_of(ledger: Ledger) -> bytes:
    size = ledger.tree_size
    note = sign_checkpoint(Checkpoint(ORIGIN, size, ledger.root_at(size)), LOG)
    return add_signatures(note, [cosign(note, witness, NOW) for witness in WITNESSES])


def judged(judge: Path, folder: Path, keys: list[str] = KEYS) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [judge, folder, *keys], capture_output=True, text=True, timeout=120, check=False, env={}
    )


def judge_one(judge: Path, folder: Path, size: int) -> None:
    found = judge_whole(judge, folder, size)
    assert (found["size"], found["entries"], found["signatures"]) == (size, size, 4)


def judge_whole(judge: Path, tmp_path: Path, size: int) -> dict[str, int]:
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        fill(ledger, range(size))
        export_tiles(ledger, note_of(ledger), tmp_path / "out")
    done = judged(judge, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: int(value) for name, value in (part.split("=") for part in done.stdout.split()[1:])}


@pytest.mark.reported
def test_judge_accepts_whole_small_logs(judge, tmp_path, report):
    sizes = (0, 1, 2, 255, 256, 257)
    for size in sizes:
        (tmp_path / str(size)).mkdir()
        judge_one(judge, tmp_path / str(size), size)
    report(
        "judge", size=f"sizes {', '.join(map(str, sizes))}", result="every entry, hash and signature accepted"
    )


@pytest.mark.soak
@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 70_123])
def test_judge_accepts_a_whole_large_log(judge, tmp_path, size, report):
    judge_one(judge, tmp_path, size)
    report("judge", size=f"size {size}", result="every entry, hash and signature accepted")


def test_judge_refuses_what_was_altered(judge, tmp_path):
    """The judge judges: else its agreement would mean nothing."""
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        fill(ledger, range(300))
        export_tiles(ledger, note_of(ledger), tmp_path / "out")
    for name in ("tile/0/000", "tile/0/001.p/44", "tile/1/000.p/1", "tile/entries/000", "checkpoint"):
        path = tmp_path / "out" / name
        good = path.read_bytes()
        path.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
        assert judged(judge, tmp_path / "out").returncode == 1, name
        path.write_bytes(good)
    stranger = NoteSigner(ORIGIN, SigningKey.generate())
    assert judged(judge, tmp_path / "out", [stranger.vkey]).returncode == 1
    assert judged(judge, tmp_path / "out").returncode == 0


@pytest.fixture(scope="session")
def ask(judge) -> Callable[[list[str]], list[bool]]:
    def questions(lines: list[str]) -> list[bool]:
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            [judge, "-same"], input=text, capture_output=True, text=True, timeout=60, check=True, env={}
        )
        answers = done.stdout.splitlines()
        assert len(answers) == len(lines)
        return [answer == "OK" for answer in answers]

    return questions


def _b64(*hashes: bytes) -> str:
    return " ".join(base64.b64encode(item).decode() for item in hashes)


LEAVES = [hash_leaf(b"%d" % i) for i in range(70)]
ROOTS = [root_of(LEAVES[:size]) for size in range(len(LEAVES) + 1)]


@pytest.mark.reported
def test_both_accept_every_proof_of_every_small_tree(ask, report):
    source, lines = source_of(LEAVES), []
    for size in range(1, 67):
        for index in range(size):
            path = inclusion_proof(source, index, size)
            lines.append(f"record {size} {index} {_b64(ROOTS[size], LEAVES[index], *path)}")
        for old in range(1, size + 1):
            grown = consistency_proof(source, old, size)
            lines.append(f"tree {old} {_b64(ROOTS[old])} {size} {_b64(ROOTS[size], *grown)}")
    assert len(lines) == 2 * 2211
    assert all(ask(lines))
    report("judge", size="2,211 inclusion and 2,211 consistency proofs", result="all accepted by both")


@pytest.mark.reported
def test_both_say_the_same_of_altered_proofs(ask, report):
    """Every element dropped, doubled, swapped or flipped, and sizes off by one: never two opinions."""
    draw, source, lines, ours = random.Random(11), source_of(LEAVES), [], []
    for _ in range(1500):
        size = draw.randrange(2, 67)
        index, old = draw.randrange(size), draw.randrange(1, size)
        for kind in ("record", "tree"):
            whole = (
                inclusion_proof(source, index, size)
                if kind == "record"
                else consistency_proof(source, old, size)
            )
            proof = _altered(draw, whole)
            told = size + draw.choice((0, 0, 0, 1, -1))
            if kind == "record":
                lines.append(f"record {told} {index} {_b64(ROOTS[size], LEAVES[index], *proof)}")
                ours.append(_holds(
                    verify_inclusion, leaf_index=index, tree_size=told, leaf_hash=LEAVES[index],
                    proof=proof, root_hash=ROOTS[size],
                ))  # fmt: skip
            else:
                lines.append(f"tree {old} {_b64(ROOTS[old])} {told} {_b64(ROOTS[size], *proof)}")
                ours.append(_holds(
                    verify_consistency, size1=old, size2=told, root1=ROOTS[old], root2=ROOTS[size],
                    proof=proof,
                ))  # fmt: skip
    assert ask(lines) == ours
    assert 100 < sum(ours) < len(ours) - 100
    report("judge", size=f"{len(ours):,} altered proofs", result="one opinion on each")


def _altered(draw: random.Random, proof: list[bytes]) -> list[bytes]:
    proof, place = list(proof), draw.randrange(len(proof)) if proof else 0
    match draw.randrange(6) if proof else 5:
        case 0:
            del proof[place]
        case 1:
            proof.insert(place, proof[place])
        case 2:
            proof[place] = bytes([proof[place][0] ^ 1]) + proof[place][1:]
        case 3:
            proof.reverse()
        case 4:
            proof.append(b"\0" * 32)
    return proof


def _holds(check: Callable[..., None], **what: object) -> bool:
    try:
        check(**what)
    except AuditError:
        return False
    return True


@pytest.mark.reported
def test_we_accept_no_altered_note_and_the_judge_none_that_says_something_else(ask, report):
    note = sign_checkpoint(Checkpoint(ORIGIN, 70, ROOTS[70]), LOG)
    altered = [note]
    for bit in range(len(note) * 8):
        data = bytearray(note)
        data[bit // 8] ^= 1 << bit % 8
        altered.append(bytes(data))
    ours = [_holds(lambda data=data: open_note(data, [LOG.verifier])) for data in altered]
    theirs = ask([f"note {LOG.vkey} {base64.b64encode(data).decode()}" for data in altered])
    assert ours == [True] + [False] * (len(altered) - 1)
    signature = base64.b64decode(note.rsplit(b" ", 1)[1])
    for data, accepted in zip(altered[1:], theirs[1:], strict=True):
        if (
            accepted
        ):  # Go ignores the spare bits of the last base64 digit; we do not, and nothing else differs
            assert base64.b64decode(data.rsplit(b" ", 1)[1]) == signature
    report(
        "judge",
        size=f"{len(altered) - 1:,} bits of a note flipped",
        result="0 accepted by us, 0 with another meaning by Go",
    )


def test_bundles_hold_the_very_bytes_of_the_entries(tmp_path):
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        fill(ledger, range(3))
        export_tiles(ledger, note_of(ledger), tmp_path / "out")
    data = (tmp_path / "out" / "tile/entries/000.p/3").read_bytes()
    assert json.loads(data[2 : 2 + int.from_bytes(data[:2], "big")])["event_id"] == "0" * 32
