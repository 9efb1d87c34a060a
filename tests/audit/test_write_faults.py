"""System calls that write fail or kill, one after the other: nothing acknowledged is ever lost."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, sign_checkpoint
from audit.errors import LedgerMissingError, SignerMissingError
from audit.fsck import fsck
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import KeyType, NoteSigner
from audit.signer import Signer
from audit.witness import Witness
from audit.witness_request import AddCheckpoint
from tests.audit.test_bit_flips import columns_of
from tests.faults.jobs import COLUMNS, body_of
from tests.faults.nursery import NoTracingError, Nursery, Outcome, every
from tests.soak_report import Report

ORIGIN = "hospital.example/faults"
NAMES = ["one", "two", "three"]
ONCE = ("error=EIO", "error=ENOSPC", "signal=KILL")
EVER_SINCE = "error=ENOSPC"  # and at every later call: the disk stays full
Check = Callable[[Path, Outcome], None]
Scene = tuple[Callable[[Path], dict[str, object]], Check]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(scope="module")
def tracing(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    """The nursery, where its children can be traced."""
    folder = tmp_path_factory.mktemp("probe")
    try:
        nursery.run("create", inject="link:error=EIO:when=99", path=str(folder / "log.db"), origin=ORIGIN)
    except NoTracingError as reason:
        pytest.skip(str(reason))
    return nursery


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 253 entries: the fourth entry from here completes a tile."""
    path = tmp_path_factory.mktemp("log") / "log.db"
    with Ledger.create(path, ORIGIN) as ledger:
        names = [f"old-{n}" for n in range(253)]
        for name in names:
            last = ledger.append(body_of(name), event_id=name, index_columns=COLUMNS)
        last.result(30)
    return path


def check_log(path: Path, outcome: Outcome) -> None:
    """Nothing acknowledged is lost, nothing doubled, and who asks again gets the place that it had."""
    assert not outcome.raw(), outcome
    report = fsck(path, columns_of=columns_of, origin=ORIGIN)
    assert report.ok, (report, outcome)
    acked = dict(line.split() for line in outcome.acks())
    with Ledger.open(path) as ledger:
        for name, index in acked.items():
            assert ledger.stored_entry(int(index)).event_id == name
            assert ledger.entry(int(index)) == body_of(name)
        before = ledger.tree_size
        known = {name: ledger.find_event(name) for name in NAMES}
        for name in NAMES:
            again = ledger.append_wait(body_of(name), event_id=name, index_columns=COLUMNS)
            found = known[name]
            assert again.leaf_index == (found.leaf_index if found else before)
            before += not found
        assert ledger.tree_size == before
    assert fsck(path, columns_of=columns_of, origin=ORIGIN).ok


def appending(log: Path) -> Scene:
    def prepare(folder: Path) -> dict[str, object]:
        shutil.copy(log, folder / "log.db")
        return {"path": str(folder / "log.db"), "names": NAMES}

    return prepare, lambda folder, outcome: check_log(folder / "log.db", outcome)


def recovering(log: Path, nursery: Nursery) -> Scene:
    """As left by a writer that was killed: the file, its write-ahead log and the index of that."""

    def prepare(folder: Path) -> dict[str, object]:
        arguments = appending(log)[0](folder)
        nursery.run(
            "append", kill_after=(3, 0.0), path=arguments["path"], names=[f"w{n}" for n in range(999)]
        )
        return arguments

    return prepare, lambda folder, outcome: check_log(folder / "log.db", outcome)


def creating() -> Scene:
    def check(folder: Path, outcome: Outcome) -> None:
        assert not outcome.raw(), outcome
        path = folder / "log.db"
        if outcome.acks():
            assert path.exists()
        if path.exists():
            assert fsck(path, columns_of=columns_of, origin=ORIGIN).ok
        else:
            with pytest.raises(LedgerMissingError):
                Ledger.open(path)
            Ledger.create(path, ORIGIN).close()

    return lambda folder: {"path": str(folder / "log.db"), "origin": ORIGIN}, check


def signing(log: Path, homes: Path) -> Scene:
    """A checkpoint that left the signer is the one in its state, which goes on from there."""

    def prepare(folder: Path) -> dict[str, object]:
        shutil.copy(log, folder / "log.db")
        shutil.copytree(homes / "signer", folder / "signer")
        return {"path": str(folder / "log.db"), "home": str(folder / "signer")}

    def check(folder: Path, outcome: Outcome) -> None:
        assert not outcome.raw(), outcome
        notes = {bytes.fromhex(text) for text in outcome.acks()}
        assert len(notes) <= 1
        signer = Signer.open(folder / "signer")
        with Ledger.open(folder / "log.db") as ledger:
            for note in notes:
                assert signer.state().note == note
                assert ledger.latest_checkpoint() == note
            again = signer.sign_edge(ledger)
            assert not notes or {again} == notes
            assert ledger.store_checkpoint(again) == again
        assert fsck(folder / "log.db", columns_of=columns_of, log=signer.verifier).ok

    return prepare, check


def creating_signer() -> Scene:
    def check(folder: Path, outcome: Outcome) -> None:
        assert not outcome.raw(), outcome
        if outcome.acks() or (folder / "signer" / "key.pem").exists():
            assert Signer.open(folder / "signer").state().checkpoint.tree_size == 0
        else:
            with pytest.raises(SignerMissingError):
                Signer.open(folder / "signer")
            Signer.create(folder / "signer", ORIGIN)

    return lambda folder: {"home": str(folder / "signer"), "origin": ORIGIN}, check


LOG = NoteSigner(ORIGIN, SigningKey.generate())
WITNESS = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
LEAVES = [hash_leaf(b"%d" % n) for n in range(400)]


def grown(sizes: range) -> list[str]:
    """Requests that lead from each size to the next."""
    requests = []
    for size in sizes:
        note = sign_checkpoint(Checkpoint(ORIGIN, size + 1, root_of(LEAVES[: size + 1])), LOG)
        proof = tuple(consistency_proof_of(LEAVES[: size + 1], size)) if size else ()
        requests.append(AddCheckpoint(old_size=size, proof=proof, note=note).format().decode())
    return requests


def cosigning(requests: list[str]) -> Scene:
    def prepare(folder: Path) -> dict[str, object]:
        Witness.create(folder / "witness.json", WITNESS, LOG.vkey)
        WITNESS.key.save(folder / "key", None)
        return {
            "path": str(folder / "witness.json"), "key": str(folder / "key"), "log": LOG.vkey,
            "requests": requests,
        }  # fmt: skip

    return prepare, check_witness


def check_witness(folder: Path, outcome: Outcome) -> None:
    """Every cosignature that was given is within what the state records; the state moves on from there."""
    assert not outcome.raw(), outcome
    witness = Witness(folder / "witness.json", WITNESS, LOG.vkey)
    size = witness.tree_size
    assert len(outcome.acks()) <= size
    note = sign_checkpoint(Checkpoint(ORIGIN, size + 1, root_of(LEAVES[: size + 1])), LOG)
    proof = consistency_proof_of(LEAVES[: size + 1], size) if size else []
    witness.cosign(note, size, proof, 1_700_000_000)


def break_each(
    nursery: Nursery, folder: Path, job: str, scene: Scene, faults: Callable[[Counter[str]], list[str]]
) -> Counter[str]:
    """Run the job once to count its calls, then once for each fault; return how many ended how."""
    prepare, check = scene
    counting = folder / "counting"
    counting.mkdir()
    counted = nursery.count(job, folder / "trace", **prepare(counting))
    ended: Counter[str] = Counter()
    for number, fault in enumerate(faults(counted)):
        place = folder / str(number)
        place.mkdir()
        outcome = nursery.run(job, inject=fault, **prepare(place))
        try:
            check(place, outcome)
        except BaseException as error:
            error.add_note(f"{job} with {fault}: {outcome}")
            raise
        ended["faults"] += 1
        ended["killed"] += outcome.signal == signal.SIGKILL
        ended["refused"] += any(line.startswith("refused") for line in outcome.said)
        ended["acknowledged"] += len(outcome.acks())
        shutil.rmtree(place)
    return ended


def all_faults(counted: Counter[str]) -> list[str]:
    return [*every(counted, ONCE), *(f"{fault}+" for fault in every(counted, (EVER_SINCE,)))]


def some_faults(step: int) -> Callable[[Counter[str]], list[str]]:
    return lambda counted: all_faults(counted)[:: max(1, len(all_faults(counted)) // step)]


@pytest.fixture(scope="module")
def scenes(
    log: Path, tracing: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, Scene]]:
    homes = tmp_path_factory.mktemp("homes")
    Signer.create(homes / "signer", ORIGIN)
    return {
        "three appends": ("append", appending(log)),
        "closing after three appends": ("append_and_close", appending(log)),
        "opening after a crash, and three appends": ("open_and_append", recovering(log, tracing)),
        "creating a log": ("create", creating()),
        "signing and storing a checkpoint": ("sign", signing(log, homes)),
        "creating a signer": ("create_signer", creating_signer()),
        "three cosignatures": ("cosign", cosigning(grown(range(3)))),
    }


SCENES = [
    "three appends", "closing after three appends", "opening after a crash, and three appends",
    "creating a log", "signing and storing a checkpoint", "creating a signer", "three cosignatures",
]  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_failing_write_is_never_acknowledged(
    scenes: dict[str, tuple[str, Scene]], tracing: Nursery, tmp_path: Path, name: str
) -> None:
    job, scene = scenes[name]
    ended = break_each(tracing, tmp_path, job, scene, some_faults(5))
    assert ended["faults"] >= 5


@pytest.mark.soak
@pytest.mark.parametrize("name", SCENES)
def test_every_write_fails_in_every_way_and_nothing_acknowledged_is_lost(
    scenes: dict[str, tuple[str, Scene]], tracing: Nursery, tmp_path: Path, report: Report, name: str
) -> None:
    job, scene = scenes[name]
    ended = break_each(tracing, tmp_path, job, scene, all_faults)
    assert ended["killed"] >= ended["faults"] // 5
    report(
        "syscalls",
        size=f"{name}: {ended['faults']} faults (EIO, ENOSPC, ENOSPC ever since, KILL at each call)",
        result=f"0 lost or doubled; {ended['killed']} killed, {ended['refused']} refused by name, "
        f"{ended['acknowledged']} acknowledged and kept",
    )


def kill_witness(nursery: Nursery, folder: Path, times: int) -> int:
    """Kill it at random moments, often between recording and answering; return how many it answered."""
    draw, requests, heard = random.Random(8), grown(range(300)), 0
    prepare, check = cosigning(requests)
    for number in range(times):
        place = folder / str(number)
        place.mkdir()
        outcome = nursery.run(
            "cosign", kill_after=(draw.randrange(6), draw.uniform(0, 0.006)), **prepare(place)
        )
        witness = Witness(place / "witness.json", WITNESS, LOG.vkey)
        assert 0 <= witness.tree_size - len(outcome.acks()) <= 1, "one answer at most is on its way"
        check(place, outcome)
        heard += len(outcome.acks())
        shutil.rmtree(place)
    return heard


def test_killed_witness_has_recorded_whatever_it_answered(nursery: Nursery, tmp_path: Path) -> None:
    assert kill_witness(nursery, tmp_path, 10) > 3


@pytest.mark.soak
def test_witness_killed_two_hundred_times_has_recorded_whatever_it_answered(
    nursery: Nursery, tmp_path: Path, report: Report
) -> None:
    heard = kill_witness(nursery, tmp_path, 200)
    report("witness_kill", size="200 kills", result=f"{heard:,} cosignatures given, each within its record")
