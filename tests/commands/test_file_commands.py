"""`log export` and `log prove-fork` from the command line, and that `verify` judges what they write."""

from __future__ import annotations

import base64
import json
import shutil

import pytest

from audit.checkpoints import add_signatures, cosign, parse_checkpoint_note
from audit.entries import RunFailed
from audit.evidence import read_evidence
from audit.keys import SigningKey
from audit.merkle import root_from
from audit.notes import KeyType, NoteSigner
from audit.receipts import issue_receipts
from audit.tiles import TileTree
from audit.tlog_proof import TlogProof
from federation.coordinator import Coordinator
from tests.commands.conftest import run_command

ORIGIN = "hospital.example/files"
TIME, DEADLINE = "2020-01-01T00:00:00Z", "2020-01-01T01:00:00Z"
WITNESS = NoteSigner("w", SigningKey.generate(), KeyType.COSIGNATURE)


def grow(home, count: int, reason: str = "stopped") -> bytes:
    with Coordinator.open(home / "coordinator") as coordinator:
        for number in range(count):
            coordinator.append(
                RunFailed(run="run", charter="a" * 64, round=number, reason=reason), "coordinator"
            )
        return coordinator.publish()


@pytest.fixture
def home(tmp_path):
    home = tmp_path / "home"
    Coordinator.create(home / "coordinator", home / "signer", ORIGIN).close()
    return home


def forked(home, tmp_path):
    """The operator restores log and signer of an old day and lets history run otherwise."""
    grow(home, 3)
    old = tmp_path / "old"
    shutil.copytree(home, old)
    true, first = grow(home, 4), grow(home, 6, reason="stopped")
    config = (old / "coordinator" / "config.yaml").read_text().replace(str(home), str(old))
    (old / "coordinator" / "config.yaml").write_text(config)
    grow(old, 4, reason="coordinator_error")
    false = grow(old, 6, reason="coordinator_error")
    assert true != first
    notes = tmp_path / "first.txt", tmp_path / "second.txt"
    notes[0].write_bytes(true)
    notes[1].write_bytes(false)
    key = run_command("status", "--home", home, "--json")
    assert key.code in (0, 1)
    with Coordinator.open(home / "coordinator") as coordinator:
        policy = tmp_path / "policy.txt"
        policy.write_text(f"log {coordinator.log_key}\nquorum none\n")
    return old, notes, policy


def test_export_writes_tiles_and_then_only_what_is_new(home, tmp_path):
    grow(home, 5)
    out = tmp_path / "tiles"
    first = run_command("log", "export", out, "--home", home, "--json").json
    assert (first["tree_size"], first["previous_size"], first["files_written"]) == (6, 0, 3)
    assert run_command("log", "export", out, "--home", home, "--json").json["files_written"] == 0
    note = grow(home, 5)
    assert run_command("log", "export", out, "--home", home, "--json").json["previous_size"] == 6
    assert (out / "checkpoint").read_bytes() == note
    tree = TileTree(lambda name: (out / name).read_bytes(), 11)
    assert root_from(tree.node, 11) == parse_checkpoint_note(note).root_hash


def test_export_for_witnesses_has_no_bundle(home, tmp_path):
    grow(home, 2)
    assert run_command("log", "export", tmp_path / "out", "--home", home, "--hashes-only").code == 0
    assert not (tmp_path / "out" / "tile" / "entries").exists()


def append(home, count: int = 1) -> int:
    """Entries that no checkpoint covers yet; return the last one's index."""
    with Coordinator.open(home / "coordinator") as coordinator:
        for number in range(count):
            body = RunFailed(run="later", charter="a" * 64, round=number, reason="stopped")
            placed = coordinator.append(body, "coordinator")
    return placed.leaf_index


def test_export_to_nowhere_is_one_line(home):
    grow(home, 1)
    failed = run_command("log", "export", "nosuch://bucket", "--home", home)
    assert (failed.code, "audit.export" in failed.err, failed.err.count("\n")) == (1, True, 1)


def test_what_no_checkpoint_covers_is_put_under_one_before_it_is_proved(home, tmp_path):
    index = append(home)
    proof, evidence = tmp_path / "p", tmp_path / "e.zip"
    assert run_command("log", "proof", index, "--out", proof, "--home", home).code == 0
    note = TlogProof.parse(proof.read_bytes()).checkpoint_note
    assert parse_checkpoint_note(note).tree_size == index + 1
    index = append(home)
    assert run_command("evidence", "export", index, "--out", evidence, "--home", home).code == 0
    assert parse_checkpoint_note(read_evidence(evidence.read_bytes()).checkpoint).tree_size == index + 1
    index = append(home)
    assert (
        run_command("log", "export", tmp_path / "t", "--home", home, "--json").json["tree_size"] == index + 1
    )
    index = append(home)
    shown = run_command("log", "publish", "--home", home, "--json").json
    assert (shown["tree_size"], shown["origin"]) == (index + 1, ORIGIN)
    assert run_command("log", "proof", 999, "--home", home).err.startswith("error audit.entry_not_found")


@pytest.mark.parametrize("command", ["evidence export 1 --out {out}", "log proof 1", "log export {out}"])
def test_without_the_signer_the_command_to_run_is_named(home, tmp_path, command):
    append(home)
    (home / "signer").rename(tmp_path / "elsewhere")
    words = command.format(out=tmp_path / "out").split()
    failed = run_command(*words, "--home", home)
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert "error audit.signer_missing" in failed.err
    assert "`affidavit log publish`" in failed.err
    assert str(home / "signer") in failed.err
    assert not (tmp_path / "out").exists()


def answer_of(home, folder, index: int, *, leaf_hash: bytes | None = None, deadline: str = DEADLINE):
    """An answer as the API gives it, with the log's receipt for a leaf (or for another one)."""
    with Coordinator.open(home / "coordinator") as coordinator:
        leaf = leaf_hash or coordinator.ledger.leaf_hashes(index, index + 1)[0]
        (made,) = issue_receipts(
            coordinator.signer.key, ORIGIN, [(index, leaf)], time=TIME, merge_deadline=deadline
        )
        policy = folder / "receipt-policy.txt"
        policy.write_text(f"log {coordinator.log_key}\nwitness w {WITNESS.vkey}\nquorum w\n")
    path = folder / f"answer-{index}.json"
    path.write_text(json.dumps({"answers": [0.5], "receipt": made.to_json(), "opened": []}))
    return path, policy


def test_promise_that_was_kept_accuses_nobody(home, tmp_path):
    note = tmp_path / "note"
    note.write_bytes(grow(home, 3))
    path, _ = answer_of(home, tmp_path, 2)
    tree = home / "coordinator" / "log.db"
    failed = run_command("log", "prove-fork", "--receipt", path, note, "--log", tree, "-o", tmp_path / "f")
    assert (failed.code, "audit.no_misbehaviour" in failed.err) == (1, True)
    failed = run_command("log", "prove-fork", "--receipt", path, note, "-o", tmp_path / "f")
    assert (failed.code, "show which leaf stands there" in failed.err) == (1, True)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("by", ["log", "tiles"])
def test_broken_promise_convicts_the_log_before_anybody(home, tmp_path, by):
    """The log signed a receipt for one leaf and a tree with another in its place."""
    note, out = tmp_path / "note", tmp_path / "fork.json"
    note.write_bytes(grow(home, 3))
    path, policy = answer_of(home, tmp_path, 2, leaf_hash=b"p" * 32)
    tree = home / "coordinator" / "log.db"
    if by == "tiles":
        tree = tmp_path / "tiles"
        assert run_command("log", "export", tree, "--home", home).code == 0
    made = run_command("log", "prove-fork", "--receipt", path, note, "--log", tree, "-o", out, "--json").json
    assert (made["kind"], made["conclusive"]) == ("receipt", True)
    assert run_command("verify", out, "--policy", policy).code == 0
    data = out.read_bytes()
    for altered in (
        data.replace(b"7070", b"7071", 1),
        data.replace(DEADLINE.encode(), b"2020-01-01T01:00:01Z"),
    ):
        assert altered != data
        out.write_bytes(altered)
        assert run_command("verify", out, "--policy", policy).code == 1


@pytest.mark.parametrize(
    ("deadline", "cosigned", "code"),
    [(DEADLINE, True, 0), (DEADLINE, False, 6), ("2100-01-01T00:00:00Z", True, 6)],
)
def test_tree_too_small_after_the_deadline_is_judged_by_the_witnesses_clocks(
    home, tmp_path, deadline, cosigned, code
):
    grow(home, 1)
    small = grow(home, 1)
    if cosigned:
        small = add_signatures(small, [cosign(small, WITNESS, 1_700_000_000)])
    note, out = tmp_path / "note", tmp_path / "fork.json"
    note.write_bytes(small)
    append(home, 5)
    path, policy = answer_of(home, tmp_path, 7, deadline=deadline)
    assert run_command("log", "prove-fork", "--receipt", path, note, "-o", out).code == 0
    assert run_command("verify", out, "--policy", policy).code == code


@pytest.mark.parametrize(
    "arguments",
    [("--receipt", "{p}"), ("--receipt", "{p}", "{n}", "{n}"), ("--receipt", "{p}", "{n}", "--url", "http://x"),
     ("{n}",), ("{n}", "{n}", "--url", "http://x"), ()],
)  # fmt: skip
def test_prove_fork_says_what_belongs_together(home, tmp_path, arguments):
    note = tmp_path / "note"
    note.write_bytes(grow(home, 2))
    path, _ = answer_of(home, tmp_path, 1)
    given = [text.format(p=path, n=note) for text in arguments]
    failed = run_command("log", "prove-fork", *given, "-o", tmp_path / "fork.json")
    assert (failed.code, "command.usage" in failed.err) == (1, True)
    assert not (tmp_path / "fork.json").exists()


@pytest.mark.parametrize("by", ["log", "tiles", "offered"])
def test_fork_is_proved_and_judged_from_the_command_line(home, tmp_path, by):
    old, notes, policy = forked(home, tmp_path)
    extra = ["--log", old / "coordinator" / "log.db"]
    if by == "tiles":
        run_command("log", "export", tmp_path / "tiles", "--home", old)
        extra = ["--log", tmp_path / "tiles"]
    if by == "offered":
        with Coordinator.open(old / "coordinator") as lying:
            sizes = [parse_checkpoint_note(note.read_bytes()).tree_size for note in notes]
            proof = lying.ledger.consistency_proof(*sizes)
        (tmp_path / "proof").write_text("\n".join(base64.b64encode(item).decode() for item in proof))
        extra = ["--proof", tmp_path / "proof"]
    out = tmp_path / "fork.json"
    made = run_command("log", "prove-fork", *notes, "-o", out, *extra, "--json").json
    expected = "rewrite" if by != "offered" or sizes[0].bit_count() > 1 else "unproved"
    assert made["kind"] == expected
    assert run_command("verify", out, "--policy", policy).code == (0 if expected == "rewrite" else 4)


def test_consistent_checkpoints_accuse_nobody(home, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(grow(home, 3))
    second.write_bytes(grow(home, 3))
    log = home / "coordinator" / "log.db"
    failed = run_command("log", "prove-fork", first, second, "-o", tmp_path / "fork.json", "--log", log)
    assert (failed.code, "audit.no_misbehaviour" in failed.err) == (1, True)
    failed = run_command("log", "prove-fork", first, second, "-o", tmp_path / "fork.json")
    assert (failed.code, "give the log of the larger tree" in failed.err) == (1, True)
    assert not (tmp_path / "fork.json").exists()


def test_list_finds_by_principal_and_decision(home):
    grow(home, 2)
    assert run_command("log", "list", "--home", home, "--decision", "denied", "--json").json["entries"] == []
    failed = run_command("log", "list", "--home", home, "--decision", "perhaps")
    assert (failed.code, "audit.search_term" in failed.err) == (1, True)
    assert run_command("log", "list", "--home", home, "--principal", "p-1", "--json").json["entries"] == []
