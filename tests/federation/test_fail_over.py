"""A signer that slept and a database that was put back cannot fork a log: the home's witnesses are asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from audit.checkpoints import add_signatures, cosign, parse_checkpoint_note
from audit.entries import KeyRevoked, columns_of, decode_entry
from audit.errors import (
    PolicyFileError,
    SignerError,
    SignerRewriteError,
    SignerRollbackError,
    SignerSplitError,
    WitnessesUnreachableError,
)
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner
from audit.witness_request import monitoring_name
from federation.coordinator import Coordinator
from tests.http_witness import answering
from tests.postgresql import running_server

ORIGIN = "hospital.example/log"
WITNESS = NoteSigner("alpha", SigningKey.generate(), KeyType.COSIGNATURE)


@pytest.fixture(scope="module")
def server() -> Any:
    with running_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Return a place for a new log each time."""
    if request.param == "postgresql":
        return request.getfixturevalue("server").new_schema
    names = iter("abcdef")
    return lambda: str(tmp_path / f"{next(names)}.db")


def grow(home: Coordinator, *names: str) -> None:
    for name in names:
        home.append(KeyRevoked(key_id=name), "server")


def put_back(ledger: Ledger, size: int, place: str) -> None:
    """An old backup: the log's first entries, byte for byte."""
    with Ledger.create(place, ledger.origin) as old:
        for data in ledger.entries(0, size):
            entry = decode_entry(data)
            old.append_wait(data, event_id=entry.event_id, index_columns=columns_of(data))


def home_on(folder: Path, first: Path, database: str, policy: str | None) -> Path:
    """Another machine's coordinator home, over the database and with a signer of its own."""
    shutil.copytree(first / "signer-as-it-was", folder / "signer")
    (folder / "coordinator").mkdir()
    config = {"origin": ORIGIN, "signer_home": str(folder / "signer"), "database": database}
    (folder / "coordinator" / "config.yaml").write_text(yaml.safe_dump(config))
    if policy is not None:
        (folder / "coordinator" / "policy.txt").write_text(policy)
    return folder / "coordinator"


@pytest.fixture
def first(tmp_path: Path, database: Callable[[], str]) -> Iterator[Coordinator]:
    """A log of nine entries, published; its signer was copied when the log had three."""
    folder = tmp_path / "first"
    with Coordinator.create(folder / "coordinator", folder / "signer", ORIGIN, database=database()) as home:
        grow(home, "a", "b")
        home.publish()
        shutil.copytree(folder / "signer", folder / "signer-as-it-was")
        grow(home, "c", "d", "e", "f", "g", "h")
        home.publish()
        yield home


def policy_of(home: Coordinator, url: str) -> str:
    return f"log {home.log_key}\nwitness alpha {WITNESS.vkey} {url}\nquorum alpha\n"


def witnessed(home: Coordinator) -> bytes:
    note = home.ledger.latest_checkpoint()
    assert note is not None
    return add_signatures(note, [cosign(note, WITNESS, 1_000)])


def test_stale_signer_over_an_old_database_is_stopped_by_the_witnesses_alone(
    first: Coordinator, database: Callable[[], str], tmp_path: Path
) -> None:
    seen, asked = witnessed(first), []
    places = [database() for _ in range(3)]
    for place in places:
        put_back(first.ledger, 6, place)

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(path)
        return 200, seen

    with answering(answer) as url:
        policy = policy_of(first, url)
        other, short, alone = (
            home_on(tmp_path / name, tmp_path / "first", place, told)
            for name, place, told in zip(
                ("other", "short", "alone"), places, (policy, policy, None), strict=True
            )
        )
        with Coordinator.open(other) as late:
            grow(late, "another", "history", "as", "long")
            for _ in range(2):
                with pytest.raises(SignerError) as caught:
                    late.publisher.step()
            assert isinstance(caught.value, SignerRewriteError | SignerSplitError)
            assert late.ledger.latest_checkpoint() is None
            assert late.signer.state().checkpoint.tree_size == 3
        with Coordinator.open(short) as late, pytest.raises(SignerRollbackError):
            late.publish()
    assert set(asked) == {f"/{monitoring_name(ORIGIN)}/checkpoint"}
    with Coordinator.open(alone) as late:
        grow(late, "another", "history", "as", "long")
        assert late.publisher.step(), "whoever asks nobody forks: that is what the witnesses are asked for"


def test_second_server_takes_over_what_the_first_published(
    first: Coordinator, database: Callable[[], str], tmp_path: Path
) -> None:
    with answering(lambda *_: (200, witnessed(first))) as url:
        place = str(first.ledger.location.url or first.ledger.location.path)
        place = place.replace("postgresql+psycopg", "postgresql")
        folder = home_on(tmp_path / "second", tmp_path / "first", place, policy_of(first, url))
        with Coordinator.open(folder) as second:
            assert first.publisher.step() is None
            assert second.publisher.step() is None, "the first holds the lease"
            first.publisher.close()
            grow(second, "more")
            assert parse_checkpoint_note(second.publisher.step() or b"").tree_size == 10
            assert second.publisher.leads
            assert not first.publisher.leads
            assert first.publish() == second.ledger.latest_checkpoint()


def test_nothing_is_signed_while_a_quorum_of_witnesses_is_silent(
    first: Coordinator, database: Callable[[], str], tmp_path: Path
) -> None:
    place = database()
    put_back(first.ledger, 6, place)
    policy = policy_of(first, "http://127.0.0.1:9")
    folder = home_on(tmp_path / "second", tmp_path / "first", place, policy)
    with Coordinator.open(folder) as second:
        with pytest.raises(WitnessesUnreachableError):
            second.publisher.step()
        with pytest.raises(WitnessesUnreachableError):
            second.publish()
        assert second.ledger.latest_checkpoint() is None
        state = second.ledger.lease("signer", "look", ttl_s=1).state()
        assert state is not None
        assert state.is_free


def test_database_put_back_behind_the_signer_does_not_open(
    first: Coordinator, database: Callable[[], str], tmp_path: Path
) -> None:
    """As after pg_restore of an old dump: refused before an entry is taken or a receipt signed."""
    old, edited = database(), database()
    put_back(first.ledger, 6, old)
    with Ledger.create(edited, ORIGIN) as log:
        for data in [*first.ledger.entries(0, 8), *first.ledger.entries(2, 3)]:
            event = f"{log.tree_size}"
            log.append_wait(data, event_id=event, index_columns=columns_of(data))
    config = tmp_path / "first" / "coordinator" / "config.yaml"
    text = yaml.safe_load(config.read_text())
    for place, error in ((old, SignerRollbackError), (edited, SignerSplitError)):
        config.write_text(yaml.safe_dump({**text, "database": place}))
        with pytest.raises(error):
            Coordinator.open(tmp_path / "first" / "coordinator")


@pytest.mark.parametrize("text", ["log x\n", "quorum none\n", "\0", "log {other}\nquorum none\n"])
def test_policy_file_that_is_none_stops_the_start(tmp_path: Path, text: str) -> None:
    other = NoteSigner("other.example/log", SigningKey.generate()).vkey
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN):
        pass
    (tmp_path / "c" / "policy.txt").write_text(text.format(other=other))
    with pytest.raises(PolicyFileError, match=r"policy\.txt"):
        Coordinator.open(tmp_path / "c")
