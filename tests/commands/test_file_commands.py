"""`log export` and `log prove-fork` from the command line, and that `verify` judges what they write."""

from __future__ import annotations

import base64
import shutil

import pytest

from audit.checkpoints import parse_checkpoint_note
from audit.entries import RunFailed
from audit.merkle import root_from
from audit.tiles import TileTree
from federation.coordinator import Coordinator
from tests.commands.conftest import run_command

ORIGIN = "hospital.example/files"


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


def test_export_before_any_checkpoint_or_to_nowhere_is_one_line(home):
    failed = run_command("log", "export", "x", "--home", home)
    assert (failed.code, "evidence.no_checkpoint" in failed.err) == (1, True)
    grow(home, 1)
    failed = run_command("log", "export", "nosuch://bucket", "--home", home)
    assert (failed.code, "audit.export" in failed.err, failed.err.count("\n")) == (1, True, 1)


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
