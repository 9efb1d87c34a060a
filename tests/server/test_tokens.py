"""Bearer tokens: a real issuer in a process of its own, honest and hostile tokens, keys that turn."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.testclient import TestClient

import server.jwks
import server.oidc
from server.app import create_app
from server.errors import IssuerUnreachableError, SettingsError, UnauthenticatedError
from server.jwks import COOLDOWN_S, LIFESPAN_S, RETRY_S, IssuerKeys, UnknownKeyError, check_url
from server.jwks import fetch as real_fetch
from server.oidc import Claims, TokenVerifier, token_verifier
from server.settings import Settings

AUDIENCE = "affidavit-tests"
PREDICT = "/v1/models/toy/predict"


class Issuer:
    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, document: dict) -> dict:
        request = urllib.request.Request(self.url + path, data=json.dumps(document).encode())
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.loads(reply.read())

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return json.loads(reply.read())

    def claims(self, **changed: object) -> dict:
        now = int(time.time())
        found = {"iss": self.url, "aud": AUDIENCE, "sub": "dr-jekyll", "iat": now, "exp": now + 300,
                 "affidavit_role": "consumer", **changed}  # fmt: skip
        return {name: value for name, value in found.items() if value is not ...}

    def sign(
        self, *, alg: str = "RS256", headers: dict | None = None, kid: str | None = None, **changed: object
    ) -> str:
        asked = {"alg": alg, "claims": self.claims(**changed), "headers": headers or {}}
        return self.post("/sign", {**asked, **({"kid": kid} if kid else {})})["token"]

    def public(self, kid: str | None = None) -> tuple[str, jwt.PyJWK]:
        keys = [key for key in self.get("/jwks")["keys"] if key.get("alg") == "RS256"]
        found = keys[-1] if kid is None else next(key for key in keys if key["kid"] == kid)
        return found["kid"], jwt.PyJWK.from_dict(found)


@contextmanager
def running_issuer():
    file = Path(__file__).parent / "oidc_issuer.py"
    process = subprocess.Popen(
        [sys.executable, str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        yield Issuer(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def issuer():
    with running_issuer() as found:
        yield found


@pytest.fixture(autouse=True)
def _behaves(issuer):
    yield
    issuer.post("/behave", {"how": "well"})


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A busy machine's issuer is slow, not silent: only tests that say so give up on it."""
    monkeypatch.setattr(server.jwks, "WAIT_S", 120.0)


@pytest.fixture
def tokens(lab, issuer):
    settings = lab.settings(oidc_issuer=issuer.url, oidc_audience=AUDIENCE)
    with TestClient(create_app(settings, clock=lab.clock), raise_server_exceptions=False) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def status(client, token: str, path: str = "/v1/models") -> int:
    return client.get(path, headers=bearer(token)).status_code


def test_token_of_the_client_credentials_grant_is_let_in_as_its_role(tokens, issuer, lab, row):
    grant = {"aud": AUDIENCE, "sub": "service-7", "affidavit_role": "consumer", "affidavit_region": "eu"}
    token = issuer.post("/token", grant)["access_token"]
    reply = tokens.post(PREDICT, headers=bearer(token), json={"purpose": "triage", "rows": [row]})
    assert reply.status_code == 200
    body = lab.entries("prediction")[-1]["body"]
    assert (body["role"], body["region"]) == ("consumer", "eu")
    assert body["principal"].startswith("p-")
    assert "service-7" not in json.dumps(lab.entries()), "the issuer's name for somebody is in no leaf"


@pytest.mark.parametrize("alg", ["RS256", "ES256", "EdDSA"])
def test_every_kind_of_key_that_the_issuer_has_counts(tokens, issuer, alg):
    assert status(tokens, issuer.sign(alg=alg)) == 200


def test_one_subject_is_one_principal_and_another_is_another(tokens, issuer, lab, row):
    body = {"purpose": "triage", "rows": [row]}
    for subject in ("a", "a", "b"):
        token = issuer.sign(sub=subject, jti=str(time.time_ns()))
        assert tokens.post(PREDICT, headers=bearer(token), json=body).status_code == 200
    first, second, third = (entry["body"]["principal"] for entry in lab.entries("prediction")[-3:])
    assert first == second != third


def test_api_keys_stay_good_beside_an_issuer(tokens, as_role):
    assert tokens.get("/v1/models", headers=as_role("consumer")).status_code == 200


def forged(header: dict, claims: dict, sign: bytes | None = None) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signature = b"" if sign is None else hmac.new(sign, b".".join(parts), hashlib.sha256).digest()
    return b".".join([*parts, base64.urlsafe_b64encode(signature).rstrip(b"=")]).decode()


def pem_of(key: jwt.PyJWK) -> bytes:
    return key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


HOSTILE = {
    "alg none": lambda i: forged({"alg": "none", "kid": i.public()[0]}, i.claims()),
    "alg NONE": lambda i: forged({"alg": "NONE", "kid": i.public()[0]}, i.claims()),
    "HS256 by the public key": lambda i: forged(
        {"alg": "HS256", "kid": i.public()[0], "typ": "JWT"}, i.claims(), pem_of(i.public()[1])
    ),
    "HS256 by the shared key of the set": lambda i: forged(
        {"alg": "HS256", "kid": "shared", "typ": "JWT"}, i.claims(), b"shared-secret-shared-secret-shared"
    ),
    "RS256 says HS256 key": lambda i: i.sign(kid=None, headers={"kid": "shared"}),
    "another algorithm than the key's": lambda i: i.post(
        "/sign", {"alg": "ES256", "claims": i.claims(), "headers": {"kid": i.public()[0]}}
    )["token"],
    "a short RSA key of the set": lambda i: i.sign(kid="small"),
    "signed by a stranger": lambda i: jwt.encode(
        i.claims(), rsa.generate_private_key(public_exponent=65537, key_size=2048), algorithm="RS256",
        headers={"kid": i.public()[0]},
    ),
    "signed by a stranger whose key it brings": lambda i: jwt.encode(
        i.claims(), STRANGER, algorithm="RS256",
        headers={"jwk": jwt.get_algorithm_by_name("RS256").to_jwk(STRANGER.public_key(), as_dict=True)},
    ),
    "names where its key is": lambda i: i.sign(headers={"jku": "http://127.0.0.1:9/k", "kid": "away"}),
    "no key id": lambda i: i.sign(headers={"kid": ""}),
    "unknown key id": lambda i: i.sign(headers={"kid": "never-seen"}),
    "key id that is a path": lambda i: i.sign(headers={"kid": "../../etc/passwd"}),
    "expired": lambda i: i.sign(exp=int(time.time()) - 1),
    "no expiry": lambda i: i.sign(exp=...),
    "not yet": lambda i: i.sign(nbf=int(time.time()) + 600),
    "issued in the future": lambda i: i.sign(iat=int(time.time()) + 600),
    "another audience": lambda i: i.sign(aud="somebody-else"),
    "no audience": lambda i: i.sign(aud=...),
    "audience that begins alike": lambda i: i.sign(aud=AUDIENCE + "-2"),
    "another issuer": lambda i: i.sign(iss=i.url + "/"),
    "no issuer": lambda i: i.sign(iss=...),
    "no subject": lambda i: i.sign(sub=...),
    "empty subject": lambda i: i.sign(sub=""),
    "huge subject": lambda i: i.sign(sub="x" * 300),
    "no role": lambda i: i.sign(affidavit_role=...),
    "a role that there is not": lambda i: i.sign(affidavit_role="root"),
    "two roles": lambda i: i.sign(affidavit_role=["consumer", "officer"]),
    "role as an object": lambda i: i.sign(affidavit_role={"consumer": True}),
    "a site for a consumer": lambda i: i.sign(affidavit_site="alpha"),
    "a region that is no name": lambda i: i.sign(affidavit_region="EU\nwest"),
    "models that are no names": lambda i: i.sign(affidavit_models=["toy", "../x"]),
    "an empty list of models": lambda i: i.sign(affidavit_models=[]),
    "a logout token": lambda i: i.sign(headers={"typ": "logout+jwt"}),
    "asks for an extension": lambda i: i.sign(headers={"crit": ["b64"], "b64": False}),
    "huge": lambda i: i.sign(junk="x" * 20_000),
    "deep": lambda i: forged({"alg": "RS256", "kid": i.public()[0]}, json.loads("[" * 500 + "]" * 500)),
    "cut": lambda i: i.sign()[:-20],
    "no signature": lambda i: i.sign().rpartition(".")[0] + ".",
    "four parts": lambda i: i.sign() + ".x",
    "payload changed": lambda i: (lambda h, p, s: f"{h}.{p[:-2]}AA.{s}")(*i.sign().split(".")),
    "no token at all": lambda i: "x.y.z",
    "not ASCII": lambda i: "é.é.é",
}  # fmt: skip
STRANGER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


@pytest.fixture(scope="module")
def judged_client(lab_template, issuer, tmp_path_factory):
    """One application for all hostile tokens: none of them may change what the next one meets."""
    import shutil

    folder = tmp_path_factory.mktemp("judged")
    shutil.copytree(lab_template.folder, folder / "homes")
    settings = Settings(
        coordinator_home=folder / "homes/coordinator", signer_home=folder / "homes/signer",
        publish_interval_s=3600, oidc_issuer=issuer.url, oidc_audience=AUDIENCE,
    )  # fmt: skip
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_token_is_401_and_writes_nothing(judged_client, issuer, name):
    ledger = judged_client.app.state.context.coordinator.ledger
    assert status(judged_client, issuer.sign()) == 200
    size, token = ledger.tree_size, HOSTILE[name](issuer)
    reply = judged_client.get("/v1/models", headers={"Authorization": f"Bearer {token}".encode()})
    assert (reply.status_code, reply.json()["code"]) == (401, "access.unauthenticated")
    assert token not in reply.text
    assert ledger.tree_size == size


def test_answer_never_says_why_a_token_does_not_count(judged_client, issuer):
    said = {
        judged_client.get("/v1/models", headers=bearer(HOSTILE[name](issuer))).json()["detail"]
        for name in ("expired", "another audience", "signed by a stranger", "unknown key id", "two roles")
    }
    assert len(said) == 1


def test_token_that_expires_while_remembered_stops(tokens, issuer, lab):
    token = issuer.sign(exp=int(lab.clock().timestamp()) + 40)
    assert status(tokens, token) == 200
    lab.clock.forward(seconds=39)
    assert status(tokens, token) == 200
    lab.clock.forward(seconds=2)
    assert status(tokens, token) == 401


def test_remembered_token_costs_no_thread_and_no_network(tokens, issuer, monkeypatch):
    token = issuer.sign()
    assert status(tokens, token) == 200
    verifier = tokens.app.state.context.identities.tokens
    monkeypatch.setattr(verifier, "authenticate", lambda _: pytest.fail("looked up again"))
    assert status(tokens, token) == 200


def test_models_and_region_of_a_token_reach_the_policies(tokens, issuer, row):
    body = {"purpose": "triage", "rows": [row]}
    other = tokens.post(PREDICT, headers=bearer(issuer.sign(affidavit_models=["other"])), json=body)
    assert (other.status_code, other.json()["policies"]) == (403, ["key-not-for-this-model"])
    assert (
        tokens.post(PREDICT, headers=bearer(issuer.sign(affidavit_models=["toy"])), json=body).status_code
        == 200
    )


def test_rotation_is_followed_and_the_old_key_ends(issuer, lab):
    settings = lab.settings(oidc_issuer=issuer.url, oidc_audience=AUDIENCE)
    with TestClient(create_app(settings, clock=lab.clock)) as client:
        before = issuer.sign(alg="ES256", jti="before")
        assert status(client, before) == 200
        keys = client.app.state.context.identities.tokens._keys
        issuer.post("/rotate", {"alg": "ES256", "drop": True})
        after = issuer.sign(alg="ES256", jti="after")
        assert status(client, after) == 401, "within the cool-down of the first look"
        keys._tried -= COOLDOWN_S
        assert status(client, after) == 200
        stale = issuer.sign(alg="RS256")
        assert status(client, stale) == 200, "the other keys stay"
        with pytest.raises(UnknownKeyError):
            keys.key(jwt.get_unverified_header(before)["kid"])


class Time:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["error", "garbage", "huge", "redirect", "empty"])
def test_issuer_that_fails_is_stale_if_error_then_fails_closed(issuer, how):
    clock = Time()
    keys = IssuerKeys(issuer.url, stale_s=600, clock=clock)
    kid, _ = issuer.public()
    assert keys.key(kid).key_id == kid
    issuer.post("/behave", {"how": how})
    clock.now += LIFESPAN_S + 599
    assert keys.key(kid).key_id == kid, "the last keys count a while longer"
    with pytest.raises(UnknownKeyError):
        keys.key("new-one")
    clock.now += 2
    with pytest.raises(IssuerUnreachableError, match="cannot be fetched") as caught:
        keys.key(kid)
    assert caught.value.extra["retry_after_s"] >= 1
    clock.now += RETRY_S
    issuer.post("/behave", {"how": "well"})
    assert keys.key(kid).key_id == kid, "and it recovers by itself"


def test_issuer_never_reached_is_503_with_a_code_and_keys_go_on(lab, as_role, issuer):
    settings = lab.settings(oidc_issuer="http://127.0.0.1:9", oidc_audience=AUDIENCE)
    with TestClient(create_app(settings, clock=lab.clock), raise_server_exceptions=False) as client:
        reply = client.get("/v1/models", headers=bearer(issuer.sign()))
        assert (reply.status_code, reply.json()["code"]) == (503, "access.issuer_unreachable")
        assert int(reply.headers["retry-after"]) >= 1
        assert client.get("/v1/models", headers=as_role("consumer")).status_code == 200


def test_invented_key_ids_make_one_look_in_a_cool_down(issuer):
    clock = Time()
    keys = IssuerKeys(issuer.url, clock=clock)
    keys.key(issuer.public()[0])
    for number in range(200):
        with pytest.raises(UnknownKeyError):
            keys.key(f"invented-{number}")
    assert keys.fetches == 1
    clock.now += COOLDOWN_S
    for number in range(200):
        with pytest.raises(UnknownKeyError):
            keys.key(f"invented-{number}")
    assert keys.fetches == 2


def test_many_callers_at_once_fetch_once(issuer):
    issuer.post("/behave", {"how": "slow"})
    keys, kid, found = IssuerKeys(issuer.url), issuer.public()[0], []
    threads = [threading.Thread(target=lambda: found.append(keys.key(kid).key_id)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [kid] * 16
    assert keys.fetches == 1


def test_failing_issuer_is_not_asked_by_every_caller():
    clock, asked = Time(), []

    def down(url: str) -> bytes:
        asked.append(url)
        raise OSError("down")

    keys = IssuerKeys("https://issuer.example", fetch=down, clock=clock)
    for _ in range(50):
        with pytest.raises(IssuerUnreachableError):
            keys.key("k")
    assert len(asked) == 1
    clock.now += RETRY_S
    with pytest.raises(IssuerUnreachableError):
        keys.key("k")
    assert len(asked) == 2


def test_configuration_that_speaks_for_another_issuer_is_not_believed(issuer):
    def fetch(url: str) -> bytes:
        data = real_fetch(url)
        return data.replace(issuer.url.encode(), b"https://evil.example", 1) if "well-known" in url else data

    with pytest.raises(IssuerUnreachableError):
        IssuerKeys(issuer.url, fetch=fetch).key("k")


@pytest.mark.parametrize(
    "url",
    ["http://issuer.example", "ftp://127.0.0.1/x", "file:///etc/passwd", "https://", "https://u:p@h/", "//h",
     "", "http://127.0.0.1.evil.example/", "http://localhost.evil.example"],
)  # fmt: skip
def test_only_https_or_this_machine_is_fetched(url):
    with pytest.raises(SettingsError):
        check_url(url, "oidc_issuer")


def test_issuer_without_audience_stops_the_start(lab):
    settings = lab.settings(oidc_issuer="https://issuer.example")
    with pytest.raises(SettingsError, match="oidc_audience"):
        token_verifier(settings, lambda i, s: "p", lab.clock)
    assert token_verifier(lab.settings(), lambda i, s: "p", lab.clock) is None


def test_verified_tokens_are_a_bounded_memory(issuer, lab):
    verifier = TokenVerifier(
        issuer=issuer.url, audience=AUDIENCE, keys=IssuerKeys(issuer.url),
        claims=Claims(role="affidavit_role", region="r", models="m", site="s"),
        pseudonym=lambda _, subject: f"p-{subject}", clock=lab.clock,
    )  # fmt: skip
    token = issuer.sign()
    principal = verifier.authenticate(token)
    for number in range(server.oidc._CACHE_SIZE + 10):
        verifier._remember(f"t{number}", principal, int(time.time()) + 60)
    assert len(verifier._known) == server.oidc._CACHE_SIZE
    assert verifier.recall(token) is None
    with pytest.raises(UnauthenticatedError):
        verifier.authenticate(token + "x")
