"""A site's witness over HTTP: statuses and their order, atomic state, and what it keeps of a forked log."""

from __future__ import annotations

import asyncio
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.checkpoints import Checkpoint, add_signatures, open_checkpoint, sign_checkpoint
from audit.errors import WitnessRequestError, WitnessStateError
from audit.keys import SigningKey
from audit.merkle import consistency_proof_of, hash_leaf, root_of, source_of
from audit.misbehaviour import Misbehaviour
from audit.notes import KeyType, NoteSigner, SignatureLine, sign_note
from audit.verify.misbehaviour import verify_misbehaviour
from audit.verify.report import Verdict
from audit.witness import Witness
from audit.witness_request import MAX_REQUEST_BYTES, AddCheckpoint, monitoring_name
from clients.accusations import FOLDER, keep_accusation
from clients.witness_server import WitnessServer

ORIGIN = "hospital.example/log"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
KEY = NoteSigner("alpha", SigningKey.generate(), KeyType.COSIGNATURE)
LEAVES = [hash_leaf(b"%d" % i) for i in range(300)]
FORKED = [*LEAVES[:7], hash_leaf(b"edited"), *LEAVES[8:]]
NOW = 1_800_000_000
POLICY = f"log {LOG.vkey}\nquorum none\n"


def signed(leaves: list[bytes], signer: NoteSigner = LOG) -> bytes:
    return sign_checkpoint(Checkpoint(ORIGIN, len(leaves), root_of(leaves)), signer)


def request(leaves: list[bytes], old: int, proof: list[bytes] | None = None) -> bytes:
    if proof is None:
        proof = consistency_proof_of(leaves, old) if 0 < old <= len(leaves) else []
    return AddCheckpoint(old_size=old, proof=tuple(proof), note=signed(leaves)).format()


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness.create(tmp_path / "witness.json", KEY, LOG.vkey)


@pytest.fixture
def server(witness: Witness, tmp_path: Path) -> WitnessServer:
    return WitnessServer(witness, tmp_path, prefix="/w", now=lambda: NOW)


def call(server: WitnessServer, method: str, path: str, content: bytes = b"") -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=server)
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(run())


def add(server: WitnessServer, content: bytes) -> httpx.Response:
    return call(server, "POST", "/w/add-checkpoint", content)


def test_cosignature_comes_back_alone_and_verifies(server: WitnessServer, witness: Witness) -> None:
    answer = add(server, request(LEAVES[:9], 0))
    assert answer.status_code == 200
    note = add_signatures(signed(LEAVES[:9]), [answer.content])
    opened = open_checkpoint(note, log=LOG.verifier, witnesses=[KEY.verifier], now=NOW)
    assert [(c.name, c.timestamp) for c in opened.cosignatures] == [("alpha", NOW)]
    assert witness.tree_size == 9
    assert add(server, request(LEAVES[:20], 9)).status_code == 200
    assert add(server, request(LEAVES[:20], 20)).status_code == 200
    assert witness.tree_size == 20


def test_every_refusal_has_its_status_in_the_order_of_the_protocol(server: WitnessServer) -> None:
    add(server, request(LEAVES[:20], 0))
    other = NoteSigner("other.example/log", SigningKey.generate())
    thief = NoteSigner(ORIGIN, SigningKey.generate())
    elsewhere = sign_checkpoint(Checkpoint(other.name, 30, b"r" * 32), other)
    body = Checkpoint(ORIGIN, 30, root_of(LEAVES[:30])).body()
    forged = body + b"\n" + SignatureLine(ORIGIN, LOG.verifier.key_id, b"\0" * 64).format()
    good = consistency_proof_of(LEAVES[:30], 20)

    def status(note: bytes, old: int, proof: list[bytes]) -> int:
        return add(server, AddCheckpoint(old_size=old, proof=tuple(proof), note=note).format()).status_code

    assert status(elsewhere, 99, [b"x" * 32]) == 404, "unknown origin before anything else"
    assert status(sign_note(body, thief), 99, []) == 403, "signature before sizes"
    assert status(forged, 99, []) == 403
    assert status(signed(LEAVES[:30]), 31, good) == 400, "old above the checkpoint before the recorded size"
    assert status(signed(LEAVES[:30]), 19, [b"x" * 32]) == 409, "recorded size before the proof"
    assert status(signed(LEAVES[:30]), 20, [b"x" * 32]) == 422
    assert status(signed(FORKED[:20]), 20, []) == 422
    assert status(signed(LEAVES[:30]), 20, good) == 200


def test_conflict_names_the_recorded_size_in_its_own_type(server: WitnessServer) -> None:
    add(server, request(LEAVES[:20], 0))
    answer = add(server, request(LEAVES[:30], 10))
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (
        409,
        "text/x.tlog.size",
        b"20\n",
    )


def test_proof_from_nothing_must_be_empty(server: WitnessServer, witness: Witness) -> None:
    assert add(server, request(LEAVES[:4], 0, [b"x" * 32])).status_code == 422
    assert witness.tree_size == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"old 0\n",
        b"old 00\n\n" + signed(LEAVES[:3]),
        b"old -1\n\n" + signed(LEAVES[:3]),
        b"old 4_2\n\n" + signed(LEAVES[:3]),
        b"old 99999999999999999999\n\n" + signed(LEAVES[:3]),
        b"OLD 0\n\n" + signed(LEAVES[:3]),
        b"old 0\r\n\r\n" + signed(LEAVES[:3]),
        b"old 0\nAAAA\n\n" + signed(LEAVES[:3]),
        b"old 0\n" + b"A" * 44 + b"\n\n" + signed(LEAVES[:3]),
        b"old 0\n" + b"\n".join([b"A" * 43 + b"="] * 64) + b"\n\n" + signed(LEAVES[:3]),
        b"old 0\n\nno note\n",
        b"\xff\xfe\n\n\xff",
    ],
)
def test_malformed_request_is_400_and_changes_nothing(server, witness, body) -> None:
    before = witness.path.read_bytes()
    assert add(server, body).status_code == 400
    assert witness.path.read_bytes() == before


def test_too_long_a_request_is_413(server: WitnessServer) -> None:
    assert add(server, b"x" * (MAX_REQUEST_BYTES + 1)).status_code == 413


def test_other_paths_and_methods_are_refused(server: WitnessServer) -> None:
    assert call(server, "POST", "/add-checkpoint").status_code == 404
    assert call(server, "POST", "/w/add-checkpoint/").status_code == 404
    refused = call(server, "GET", "/w/add-checkpoint")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_last_checkpoint_is_shown_with_the_line_that_was_given(server: WitnessServer) -> None:
    path = f"/w/{monitoring_name(ORIGIN)}/checkpoint"
    assert call(server, "GET", path).status_code == 404
    line = add(server, request(LEAVES[:12], 0)).content
    shown = call(server, "GET", path).content
    assert shown == add_signatures(signed(LEAVES[:12]), [line])
    assert call(server, "GET", f"/w/{'0' * 64}/checkpoint").status_code == 404


def test_broken_state_is_500_without_a_word_of_why(server: WitnessServer, witness: Witness) -> None:
    witness.path.write_bytes(b"{}")
    answer = add(server, request(LEAVES[:4], 0))
    assert answer.status_code == 500
    assert str(witness.path).encode() not in answer.content


def test_state_is_on_disk_before_the_answer_exists(witness: Witness, tmp_path: Path) -> None:
    """Where the state cannot be written, no cosignature is made: the folder turns read-only first."""
    witness.cosign(signed(LEAVES[:4]), 0, [], NOW)
    broken = Witness(witness.path, KEY, LOG.verifier)
    broken.path = tmp_path / "gone" / "witness.json"
    with pytest.raises((WitnessStateError, OSError)):
        broken.cosign(signed(LEAVES[:9]), 4, consistency_proof_of(LEAVES[:9], 4), NOW)


def test_recorded_size_never_falls_under_racing_requests(server: WitnessServer, witness: Witness) -> None:
    """Racing requests: each success extends the one before it, and a reader never sees the size fall."""
    sizes = list(range(1, 61))
    random.Random(3).shuffle(sizes)
    seen: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(witness.tree_size)

    def push(size: int) -> int | None:
        for _ in range(40):
            old = witness.tree_size
            if old > size:
                return None
            if server.add_checkpoint(request(LEAVES[:size], old))[0] == 200:
                return size
        return None

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        done = [size for size in pool.map(push, sizes) if size is not None]
    stop.set()
    watcher.join()
    assert seen == sorted(seen)
    assert witness.tree_size == max(done) == 60


def test_of_two_histories_raced_at_once_only_one_is_cosigned(server: WitnessServer, witness: Witness) -> None:
    add(server, request(LEAVES[:5], 0))
    bodies = [request(leaves[:9], 5, consistency_proof_of(leaves[:9], 5)) for leaves in (LEAVES, FORKED)] * 10
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(server.add_checkpoint, bodies))
    roots = {root_of(leaves[:9]) for leaves in (LEAVES, FORKED)}
    assert [status for status, _, _ in answers].count(200) == 1
    assert witness.state().checkpoint.root_hash in roots


def test_fork_is_kept_as_a_file_that_convicts(server: WitnessServer, tmp_path: Path) -> None:
    add(server, request(LEAVES[:21], 0))
    assert add(server, request(FORKED[:40], 21, consistency_proof_of(FORKED[:40], 21))).status_code == 422
    assert add(server, request(FORKED[:21], 21)).status_code == 422
    kept = [path.read_bytes() for path in (tmp_path / FOLDER).iterdir()]
    assert sorted(Misbehaviour.parse(data).kind for data in kept) == ["rewrite", "split"]
    assert {verify_misbehaviour(data, policy_text=POLICY).verdict for data in kept} == {Verdict.VALID}


def test_senseless_proofs_between_honest_notes_leave_one_question_and_no_more(server, tmp_path) -> None:
    add(server, request(LEAVES[:21], 0))
    for number in range(20):
        assert add(server, request(LEAVES[:40], 21, [hash_leaf(b"%d" % number)])).status_code == 422
    (kept,) = (tmp_path / FOLDER).iterdir()
    assert verify_misbehaviour(kept.read_bytes(), policy_text=POLICY).verdict is Verdict.INCOMPLETE


def test_question_becomes_a_conviction_when_the_tiles_tell(tmp_path: Path) -> None:
    """A log that hides the proof still serves the tiles of the tree it signed."""
    seen, offered = signed(LEAVES[:16]), signed(FORKED[:40])
    path = keep_accusation(tmp_path, seen, offered, [b"x" * 32])
    assert path is not None
    assert Misbehaviour.parse(path.read_bytes()).kind == "unproved"
    assert keep_accusation(tmp_path, seen, offered, [b"x" * 32], source_of(FORKED[:40])) == path
    assert verify_misbehaviour(path.read_bytes(), policy_text=POLICY).verdict is Verdict.VALID
    keep_accusation(tmp_path, seen, offered, [b"y" * 32])
    assert Misbehaviour.parse(path.read_bytes()).kind == "rewrite"


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda tail: b"old 3\n" + tail))
@settings(max_examples=200)
def test_any_bytes_are_a_request_or_a_400(data: bytes) -> None:
    try:
        parsed = AddCheckpoint.parse(data)
    except WitnessRequestError:
        return
    assert parsed.format() == data


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.binary(min_size=32, max_size=32), max_size=63),
    st.binary(max_size=99),
)
@settings(deadline=None, max_examples=100)
def test_request_reads_back_as_written(old: int, proof: list[bytes], note: bytes) -> None:
    made = AddCheckpoint(old_size=old, proof=tuple(proof), note=note)
    assert AddCheckpoint.parse(made.format()) == made
