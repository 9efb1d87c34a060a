"""Witnesses with an address: what they saw is believed for its signatures, what they fail to say is not."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.errors import WitnessesUnreachableError
from audit.keys import SigningKey
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import MAX_NOTE_BYTES, KeyType, NoteSigner
from audit.tlog_policy import Policy
from audit.watchers import Watchers
from audit.witness import Witness
from clients.witness_server import WitnessServer
from tests.http_witness import answering, witnessing

ORIGIN = "hospital.example/log"
LOG = NoteSigner(ORIGIN, SigningKey.generate())
KEYS = {name: NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE) for name in "abc"}
LEAVES = [hash_leaf(b"%d" % i) for i in range(40)]
DEAD = "http://127.0.0.1:9"


def signed(size: int) -> bytes:
    return sign_checkpoint(Checkpoint(ORIGIN, size, root_of(LEAVES[:size])), LOG)


def prove(old: int, new: int) -> list[bytes]:
    return consistency_proof_of(LEAVES[:new], old)


def watchers(quorum: int = 2, timeout_s: float = 60.0, **urls: str) -> Watchers:
    lines = [f"log {LOG.vkey}"]
    lines += [f"witness {name} {key.vkey} {urls.get(name, '')}".rstrip() for name, key in KEYS.items()]
    lines += [f"group members {quorum} a b c", "quorum members"]
    return Watchers(Policy.parse("\n".join([*lines, ""])), ORIGIN, timeout_s=timeout_s)


def says(note: bytes) -> Callable[[str, bytes], tuple[int, bytes]]:
    return lambda path, body: (200, note)


def test_what_witnesses_saw_is_asked_until_no_quorum_can_be_hidden() -> None:
    """With 2 of 3, one silent witness hides nothing; two could have cosigned together."""
    with answering(says(signed(9))) as a, answering(lambda *_: (404, b"nothing yet\n")) as b:
        assert watchers(a=a, b=b, c=DEAD).seen() == [signed(9)]
        with pytest.raises(WitnessesUnreachableError, match="b, c") as caught:
            watchers(a=a, b=DEAD, c=DEAD).seen()
        assert caught.value.code == "audit.witnesses_unreachable"
        assert caught.value.names == ("b", "c")


@pytest.mark.parametrize("status", [301, 400, 403, 500, 503])
def test_answer_that_is_none_counts_as_silence(status: int) -> None:
    with (
        answering(lambda *_: (status, signed(9)), Location=DEAD) as a,
        pytest.raises(WitnessesUnreachableError),
    ):
        watchers(a=a, b=a, c=a).seen()


def test_sites_without_an_address_cannot_stop_the_log_and_are_named() -> None:
    assert watchers().seen() == []
    with answering(says(signed(9))) as a:
        assert watchers(a=a).seen() == [signed(9)]


@contextmanager
def releasing(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def test_endless_slow_and_garbled_answers_end(caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def slow(path: str, body: bytes) -> tuple[int, bytes]:
        assert over.wait(60)
        return 200, signed(9)

    begun = time.monotonic()
    with (
        answering(lambda *_: (200, b"x" * (MAX_NOTE_BYTES + 99))) as a,
        answering(slow) as b,
        releasing(over),
        pytest.raises(WitnessesUnreachableError),
    ):
        watchers(timeout_s=0.3, a=a, b=b, c=DEAD).seen()
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never speaks
    with listener, pytest.raises(WitnessesUnreachableError):
        watchers(timeout_s=0.2, a=f"http://127.0.0.1:{listener.getsockname()[1]}", b=DEAD, c=DEAD).seen()
    assert time.monotonic() - begun < 50
    assert "does not answer" in caplog.text


def test_other_schemes_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "note").write_bytes(signed(9))
    found = watchers(a=f"file://{tmp_path}/note", b="ftp://x/y")
    assert found.reachable == ()
    assert found.seen() == []


def real(name: str, folder: Path) -> WitnessServer:
    witness = Witness.create(folder / f"{name}.json", KEYS[name], LOG.vkey)
    return WitnessServer(witness, folder)


def test_checkpoints_are_offered_from_where_each_witness_is(tmp_path: Path) -> None:
    with witnessing(real("a", tmp_path)) as a, witnessing(real("b", tmp_path)) as b:
        found = watchers(a=a, b=b, c=DEAD)
        for size in (5, 5, 9, 40):
            note = add_signatures(signed(size), found.offer(signed(size), prove))
            policy = found.policy.open(note, now=int(time.time()))
            assert policy.witnesses == ("a", "b")
            assert policy.quorum.satisfied
        again = watchers(a=a, b=b, c=DEAD)  # a new process does not know where they are
        assert len(again.offer(signed(40), prove)) == 2
        assert [len(again.offer(signed(7), prove)), found.seen()[0].count(b"\n")] == [0, 6]


def forged(note: bytes) -> bytes:
    return cosign(note, NoteSigner("a", SigningKey.generate(), KeyType.COSIGNATURE), 1_000)


@pytest.mark.parametrize(
    "answer",
    [
        (200, b""),
        (200, b"hello\n"),
        (200, forged(signed(9))),
        (200, cosign(signed(8), KEYS["a"], 1_000)),
        (200, cosign(signed(9), KEYS["b"], 1_000)),
        (409, b"nonsense\n"),
        (409, b"9" * 40),
        (409, b"999999\n"),
        (409, b"9\n"),
        (422, b"no\n"),
    ],
    ids=[
        "empty",
        "text",
        "thief",
        "other-tree",
        "other-witness",
        "word",
        "huge",
        "ahead",
        "again",
        "refusal",
    ],
)
def test_answer_that_is_no_cosignature_of_this_witness_is_dropped(answer: tuple[int, bytes]) -> None:
    asked: list[bytes] = []

    def once(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(body)
        return answer

    with answering(once) as a:
        assert watchers(a=a).offer(signed(9), prove) == []
    assert 1 <= len(asked) <= 2, "a witness that always disagrees is not asked forever"
