"""API keys at rest and in memory: revocation, expiry, rotation, terms, certificates; on both databases."""

from __future__ import annotations

import sqlite3
import threading
from datetime import timedelta

import pytest
from starlette.testclient import TestClient

from audit.location import DATABASE
from server.app import create_app
from server.errors import KeyRequestError, TooBusyError, UnauthenticatedError
from server.keys import KeyStore
from tests.postgresql import running_server
from tests.server.conftest import CHEAP, Clock
from tests.waiting import Moved, wait_until

PREDICT = "/v1/models/toy/predict"


@pytest.fixture(scope="module")
def server():
    with running_server() as found:
        yield found


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request, tmp_path, monkeypatch):
    """A coordinator's home whose keys are in one of the two databases."""
    if request.param == "postgresql":
        monkeypatch.setenv(DATABASE, request.getfixturevalue("server").new_schema())
    return tmp_path


@pytest.fixture
def store(home):
    stores = []

    def make(**options: object) -> KeyStore:
        stores.append(KeyStore(home, Clock(), hasher=CHEAP, **options))
        return stores[-1]

    yield make
    for made in stores:
        made.close()


def test_key_is_one_principal_with_its_terms_for_every_worker(store):
    text, view = store().create(role="consumer", region="eu", models=("b", "a", "b"), note="ward 3")
    principal = store().authenticate(text)
    assert (principal.id, principal.role, principal.region) == (view.principal, "consumer", "eu")
    assert (principal.models, principal.method) == (("a", "b"), "key")


def test_revocation_counts_here_at_once_and_elsewhere_within_the_recheck(store):
    monotonic = Moved(1_000.0)
    here, elsewhere = store(), store(monotonic=monotonic)
    text, view = here.create(role="consumer")
    for worker in (here, elsewhere):
        worker.authenticate(text)
    here.revoke(view.key_id)
    with pytest.raises(UnauthenticatedError):
        here.authenticate(text)
    monotonic.forward(1.9)
    assert elsewhere.recall(text) is not None
    monotonic.forward(0.2)
    assert elsewhere.recall(text) is None, "two seconds, of the five that are promised"
    with pytest.raises(UnauthenticatedError):
        elsewhere.authenticate(text)


def test_recheck_cannot_be_set_beyond_the_bound_that_is_promised(tmp_path):
    with pytest.raises(ValueError, match="within 5"):
        KeyStore(tmp_path, Clock(), recheck_s=5.1)


def test_revocation_while_a_key_is_being_looked_up_is_not_forgotten(store, monkeypatch):
    keys = store()
    text, view = keys.create(role="consumer")
    verify = keys._verify

    def slow(secret_hash: str, secret: str) -> None:
        verify(secret_hash, secret)
        keys.revoke(view.key_id)  # in the middle of somebody's request

    monkeypatch.setattr(keys, "_verify", slow)
    keys.authenticate(text)
    monkeypatch.undo()
    assert keys.recall(text) is None
    with pytest.raises(UnauthenticatedError):
        keys.authenticate(text)


def test_remembered_key_touches_no_database(store, monkeypatch):
    keys = store(monotonic=Moved(1_000.0))
    text, _ = keys.create(role="consumer")
    first = keys.authenticate(text)
    monkeypatch.setattr(keys, "_row", lambda _: pytest.fail("read again"))
    assert keys.authenticate(text) == keys.recall(text) == first


def test_rotated_key_is_the_same_principal_and_the_old_one_ends(store):
    keys = store()
    text, view = keys.create(role="node", site="alpha", region="eu", models=("m",))
    keys.authenticate(text)
    new, made, old = keys.replace(view.key_id, overlap=timedelta(hours=1))
    assert keys.authenticate(new) == keys.authenticate(text)
    assert (made.principal, made.site, made.region, made.models) == (view.principal, "alpha", "eu", ("m",))
    keys._clock.forward(hours=1, seconds=1)
    with pytest.raises(UnauthenticatedError):
        keys.authenticate(text)
    assert keys.authenticate(new).id == view.principal
    assert old.expires


def test_rotation_never_prolongs_a_key(store):
    keys = store()
    _, view = keys.create(role="consumer", expires=keys._clock() + timedelta(minutes=5))
    _, made, old = keys.replace(view.key_id, overlap=timedelta(days=1))
    assert old.expires == made.expires == view.expires


@pytest.mark.parametrize("ends", ["revoked", "expired"])
def test_key_that_ended_has_no_successor(store, ends):
    keys = store()
    _, view = keys.create(role="consumer", expires=keys._clock() + timedelta(minutes=5))
    keys.revoke(view.key_id) if ends == "revoked" else keys._clock.forward(minutes=6)
    with pytest.raises(KeyRequestError, match="make a new one"):
        keys.replace(view.key_id, overlap=timedelta(0))


@pytest.mark.parametrize(
    "terms",
    [{"region": "EU"}, {"region": "x" * 64}, {"models": ("../m",)}, {"models": ("m",) * 65},
     {"certificate": "zz"}, {"certificate": "AB" * 32}, {"site": "alpha"}],
    ids=str,
)  # fmt: skip
def test_terms_that_are_none_make_no_key(tmp_path, terms):
    keys = KeyStore(tmp_path, Clock(), hasher=CHEAP)
    with pytest.raises(KeyRequestError):
        keys.create(role="consumer", **terms)
    assert keys.list() == ()
    keys.close()


def test_certificate_is_one_standing_keys_and_opens_nothing_as_a_secret(store):
    keys = store()
    text, view = keys.create(role="consumer", certificate="ab" * 32)
    assert text == ""
    assert keys.authenticate_certificate("ab" * 32).id == view.principal
    assert keys.authenticate_certificate("ab" * 32).method == "certificate"
    for secret in ("certificate", "A" * 43):
        with pytest.raises(UnauthenticatedError):
            keys.authenticate(f"affidavit_{view.key_id}_{secret}")
    with pytest.raises(KeyRequestError, match="revoke that one first"):
        keys.create(role="officer", certificate="ab" * 32)
    keys.revoke(view.key_id)
    with pytest.raises(UnauthenticatedError):
        keys.authenticate_certificate("ab" * 32)
    assert keys.create(role="officer", certificate="ab" * 32)[1].role == "officer"


def test_subject_of_a_token_has_one_pseudonym_for_all_workers_at_once(store):
    workers, found = [store() for _ in range(4)], []

    def ask(worker: KeyStore) -> None:
        try:
            found.append(worker.pseudonym("https://i.example", "dr-jekyll"))
        except TooBusyError:
            found.append("busy")

    threads = [threading.Thread(target=ask, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0].startswith("p-")
    assert workers[0].pseudonym("https://other.example", "dr-jekyll") != found[0]


def test_issuers_name_for_somebody_is_not_at_rest(tmp_path):
    keys = KeyStore(tmp_path, Clock(), hasher=CHEAP)
    keys.pseudonym("https://i.example", "dr-jekyll@hospital.example")
    keys.close()
    assert b"jekyll" not in (tmp_path / "keys.db").read_bytes()


def test_keys_of_a_file_move_to_the_database_where_the_log_is(server, tmp_path, monkeypatch):
    older = KeyStore(tmp_path, Clock(), hasher=CHEAP)
    text, view = older.create(role="node", site="alpha")
    older.close()
    monkeypatch.setenv(DATABASE, server.new_schema())
    for _ in range(2):  # the second finds them there, and takes none twice
        keys = KeyStore(tmp_path, Clock(), hasher=CHEAP)
        assert keys.authenticate(text).site == "alpha"
        assert [found.key_id for found in keys.list()] == [view.key_id]
        keys.close()


def test_store_of_the_release_before_gains_the_new_tables(tmp_path):
    keys = KeyStore(tmp_path, Clock(), hasher=CHEAP)
    text, _ = keys.create(role="consumer")
    keys.close()
    with sqlite3.connect(tmp_path / "keys.db") as raw:
        raw.execute("DROP TABLE api_key_terms")
        raw.execute("DROP TABLE token_subject")
    raw.close()
    keys = KeyStore(tmp_path, Clock(), hasher=CHEAP)
    assert keys.authenticate(text).models == ()
    keys.close()


def test_key_that_an_old_store_brings_back_stays_revoked_by_the_log(lab, as_role, tmp_path):
    path = lab.folder / "coordinator" / "keys.db"
    before = path.read_bytes()
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        key_id = lab.tokens["consumer"].split("_")[1]
        assert client.delete(f"/v1/keys/{key_id}", headers=as_role("operator")).status_code == 200
    path.write_bytes(before)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert client.get("/v1/models", headers=as_role("consumer")).status_code == 401


def test_key_revoked_by_another_machine_ends_by_the_log(lab, as_role):
    """The other machine's store is not ours: only the log tells."""
    with TestClient(
        create_app(lab.settings(rules_follow_s=0.05, key_recheck_s=5), clock=lab.clock)
    ) as client:
        assert client.get("/v1/models", headers=as_role("consumer")).status_code == 200
        from audit.entries import KeyRevoked

        lab.coordinator.append(KeyRevoked(key_id=lab.tokens["consumer"].split("_")[1]), "operator")
        wait_until(lambda: client.get("/v1/models", headers=as_role("consumer")).status_code == 401)


def test_rotation_over_http_is_an_entry_and_shows_the_secret_once(client, lab, as_role):
    key_id = lab.tokens["consumer"].split("_")[1]
    reply = client.post(f"/v1/keys/{key_id}/rotate", headers=as_role("operator"), json={"overlap_s": 0})
    made = reply.json()
    assert reply.status_code == 201
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {made['key']}"}).status_code == 200
    lab.clock.forward(seconds=1)
    assert client.get("/v1/models", headers=as_role("consumer")).status_code == 401
    (entry,) = lab.entries("key.replaced")
    assert (entry["body"]["key_id"], entry["body"]["successor"]) == (key_id, made["key_id"])
    assert made["key"].split("_", 2)[2] not in str(lab.entries())
    listed = client.get("/v1/keys", headers=as_role("operator")).text
    assert made["key"].split("_", 2)[2] not in listed


def test_region_and_models_of_a_key_are_in_its_entry_and_decide(client, lab, as_role, row):
    body = {"role": "consumer", "region": "eu", "models": ["other"]}
    made = client.post("/v1/keys", headers=as_role("operator"), json=body).json()
    (entry,) = lab.entries("key.created")
    assert (entry["body"]["region"], entry["body"]["models"]) == ("eu", ["other"])
    asked = {"purpose": "triage", "rows": [row]}
    reply = client.post(PREDICT, headers={"Authorization": f"Bearer {made['key']}"}, json=asked)
    assert (reply.status_code, reply.json()["policies"]) == (403, ["key-not-for-this-model"])


class Counted:
    """A hasher that says how often it was asked, and takes as long as the test wants."""

    def __init__(self) -> None:
        self.asked, self.goes_on = 0, threading.Event()

    def verify(self, secret_hash: str, secret: str) -> bool:
        self.asked += 1
        assert self.goes_on.wait(60)
        return CHEAP.verify(secret_hash, secret)

    def hash(self, secret: str) -> str:
        return CHEAP.hash(secret)


def crowd(store, texts, hasher, *, until):
    """Ask with all of them at once; the hasher goes on when `until(told)` holds. Return what each is told."""
    told: list[object] = [None] * len(texts)

    def ask(place: int) -> None:
        try:
            told[place] = store.authenticate(texts[place]).role
        except (UnauthenticatedError, TooBusyError) as error:
            told[place] = error.code

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    wait_until(lambda: until(told))
    hasher.goes_on.set()
    for thread in threads:
        thread.join()
    return told


def in_turns(store, waiting):
    """Whether so many wait for their turn, whatever key they have, or have it."""
    return lambda told: sum(number for _, number in list(store._turns.values())) == waiting


def test_crowd_with_one_key_that_nobody_remembers_costs_one_check(tmp_path):
    hasher = Counted()
    store = KeyStore(tmp_path, Clock(), hasher=hasher, patience_s=60)
    text, _ = store.create(role="consumer")
    assert crowd(store, [text] * 24, hasher, until=in_turns(store, 24)) == ["consumer"] * 24
    assert hasher.asked == 1
    assert store._turns == {}
    store.close()


def test_crowd_with_a_wrong_secret_gets_nothing_from_a_right_one(tmp_path):
    hasher = Counted()
    store = KeyStore(tmp_path, Clock(), hasher=hasher, patience_s=60)
    text, _ = store.create(role="consumer")
    wrong = text[:-4] + ("aaaa" if text[-4:] != "aaaa" else "bbbb")
    told = crowd(store, [text, wrong] * 6, hasher, until=in_turns(store, 12))
    assert told == ["consumer", "access.unauthenticated"] * 6
    assert store._turns == {}
    store.close()


def test_key_that_takes_too_long_to_check_is_told_so_and_not_let_in(tmp_path):
    hasher = Counted()
    store = KeyStore(tmp_path, Clock(), hasher=hasher, patience_s=0.1)
    text, _ = store.create(role="consumer")
    wrong = text[:-4] + ("aaaa" if text[-4:] != "aaaa" else "bbbb")
    told = crowd(store, [wrong] * 12, hasher, until=lambda told: told.count("server.busy") == 11)
    assert (told.count("access.unauthenticated"), hasher.asked) == (1, 1)
    assert store._turns == {}
    store.close()
