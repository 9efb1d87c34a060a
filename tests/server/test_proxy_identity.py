"""A client certificate behind a proxy: off by default, believed from one address, and never spoofed."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import SettingsError
from server.proxy_identity import proxy_identity
from tests.server.conftest import stocked_lab

HEADER = "Client-Cert"


def certificate(*, days: int = 30, begun_days: int = 1) -> x509.Certificate:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ward-3")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=begun_days)).not_valid_after(
        now + timedelta(days=days)
    )
    return builder.sign(key, hashes.SHA256())


def der(found: x509.Certificate) -> bytes:
    return found.public_bytes(Encoding.DER)


def sequence(data: bytes) -> str:
    return f":{base64.b64encode(data).decode()}:"


def rfc9440(found: x509.Certificate) -> str:
    return sequence(der(found))


def escaped(found: x509.Certificate) -> str:
    return quote(found.public_bytes(Encoding.PEM).decode())


@pytest.fixture
def bound(lab):
    found = certificate()
    lab.key("consumer", certificate=found.fingerprint(hashes.SHA256()).hex())
    return found


def served(lab, *, peer: str = "10.1.2.3", header: str = HEADER, proxies: tuple[str, ...] = ("10.1.2.3",)):
    settings = lab.settings(mtls_header=header, mtls_trusted_proxies=proxies)
    app = create_app(settings, clock=lab.clock)
    return TestClient(app, client=(peer, 40_000), raise_server_exceptions=False)


@pytest.mark.parametrize("form", [rfc9440, escaped])
def test_certificate_from_the_proxy_is_its_keys_principal(lab, bound, row, form):
    with served(lab) as client:
        body = {"purpose": "triage", "rows": [row]}
        reply = client.post("/v1/models/toy/predict", headers={HEADER: form(bound)}, json=body)
        assert reply.status_code == 200
        assert lab.entries("prediction")[-1]["body"]["role"] == "consumer"


@pytest.mark.parametrize("peer", ["10.1.2.4", "127.0.0.1", "203.0.113.9", "::1", "testclient"])
def test_header_from_anywhere_else_is_ignored_and_counted(lab, bound, as_role, peer):
    with served(lab, peer=peer) as client:
        for _ in range(3):
            assert client.get("/v1/models", headers={HEADER: rfc9440(bound)}).status_code == 401
        assert (
            client.get("/v1/models", headers={HEADER: rfc9440(bound), **as_role("node")}).status_code == 200
        )
        metrics = client.get("/metrics", headers=as_role("operator")).text
        assert "affidavit_spoofed_identities_total 4.0" in metrics


def test_forwarded_for_does_not_make_anybody_the_proxy(lab, bound):
    with served(lab, peer="203.0.113.9") as client:
        for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
            headers = {HEADER: rfc9440(bound), name: "10.1.2.3"}
            assert client.get("/v1/models", headers=headers).status_code == 401


def test_serving_command_takes_no_peer_from_headers():
    from pathlib import Path

    from server import workers

    assert "proxy_headers=False" in Path(workers.__file__).read_text(encoding="utf-8")


def test_off_by_default(client, lab, bound):
    assert lab.settings().mtls_header == ""
    assert client.get("/v1/models", headers={HEADER: rfc9440(bound)}).status_code == 401


def test_two_headers_are_refused(lab, bound):
    other = certificate()
    with served(lab) as client:
        headers = [(HEADER, rfc9440(other)), (HEADER, rfc9440(bound))]
        assert client.get("/v1/models", headers=headers).status_code == 401


def pem(found: x509.Certificate) -> str:
    return found.public_bytes(Encoding.PEM).decode()


FORMS = {"rfc9440": rfc9440, "pem": escaped, "mixed": None}
JOINTS = {
    "comma": ",",
    "comma and space": ", ",
    "space": " ",
    "spaces": "    ",
    "tab": "\t",
    "nothing": "",
    "semicolon": ";",
    "escaped comma": "%2C",
    "escaped newline": "%0A",
    "escaped newlines": "%0D%0A%0D%0A",
    "escaped space": "%20",
    "escaped zero byte": "%00",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A server where one certificate is an operator's and another a consumer's."""
    home = stocked_lab(tmp_path_factory.mktemp("pair") / "homes")
    victim, attacker = certificate(), certificate()
    home.key("operator", certificate=victim.fingerprint(hashes.SHA256()).hex())
    home.key("consumer", certificate=attacker.fingerprint(hashes.SHA256()).hex())
    with served(home) as client:
        yield client, victim, attacker
    home.close()


@pytest.mark.parametrize("joint", JOINTS)
@pytest.mark.parametrize("form", FORMS)
def test_appended_certificate_makes_nobody(pair, form, joint):
    client, victim, attacker = pair
    make = FORMS[form]
    writers = (make, make) if make else (rfc9440, escaped)
    for first, second in ((victim, attacker), (attacker, victim), (victim, victim)):
        value = writers[0](first) + JOINTS[joint] + writers[1](second)
        assert client.get("/v1/keys", headers={HEADER: value}).status_code == 401, (form, joint)
    for one in (rfc9440(victim), escaped(victim)):
        assert client.get("/v1/keys", headers={HEADER: one}).status_code == 200


AROUND = {
    "two blocks in one escaped value": lambda v, a: quote(pem(v) + pem(a)),
    "two blocks the other way round": lambda v, a: quote(pem(a) + pem(v)),
    "text before": lambda v, a: quote("subject=CN = ward-3\n" + pem(v)),
    "text after": lambda v, a: quote(pem(v) + "trailing"),
    "newline before": lambda v, a: quote("\n" + pem(v)),
    "two newlines after": lambda v, a: quote(pem(v) + "\n"),
    "space after": lambda v, a: quote(pem(v) + " "),
    "raw text after": lambda v, a: escaped(v) + "x",
    "comma alone after": lambda v, a: escaped(v) + ",",
    "comma alone before": lambda v, a: "," + escaped(v),
    "a chain": lambda v, a: quote(pem(a) + pem(v) + pem(certificate())),
    "xfcc": lambda v, a: f'Hash={v.fingerprint(hashes.SHA256()).hex()};Cert="{escaped(v)}"',
    "xfcc of two": lambda v, a: f'Cert="{escaped(v)}",Cert="{escaped(a)}"',
    "quoted": lambda v, a: f'"{escaped(v)}"',
    "escaped twice": lambda v, a: quote(escaped(v)),
    "escaped rfc9440": lambda v, a: quote(rfc9440(v)),
    "rfc9440 with a parameter": lambda v, a: rfc9440(v) + ";q=1",
    "two in one rfc9440": lambda v, a: rfc9440(v)[:-1] + rfc9440(a)[1:],
    "two certificates' bytes in one rfc9440": lambda v, a: sequence(der(v) + der(a)),
    "garbage after the certificate's bytes": lambda v, a: sequence(der(v) + b"x"),
    "space inside rfc9440": lambda v, a: ": " + rfc9440(v)[1:],
    "base64 alone": lambda v, a: rfc9440(v)[1:-1],
    "trusted certificate": lambda v, a: quote(pem(v).replace("CERTIFICATE", "TRUSTED CERTIFICATE")),
    "old label": lambda v, a: quote(pem(v).replace("CERTIFICATE", "X509 CERTIFICATE")),
    "header in the block": lambda v, a: quote(pem(v).replace("-----\n", "-----\nProc-Type: 4\n\n", 1)),
    "other end": lambda v, a: quote(pem(v).replace("END CERTIFICATE", "END PUBLIC KEY")),
    "bytes that are no text": lambda v, a: escaped(v) + "%FF",
}


@pytest.mark.parametrize("name", AROUND)
def test_anything_around_one_certificate_is_401(pair, name):
    client, victim, attacker = pair
    value = AROUND[name](victim, attacker)
    assert client.get("/v1/keys", headers={HEADER: value}).status_code == 401


def test_repeated_fields_are_401_whatever_they_hold(pair):
    client, victim, attacker = pair
    for first, second in (
        (escaped(victim), escaped(attacker)),
        (escaped(attacker), escaped(victim)),
        (rfc9440(victim), rfc9440(victim)),
        ("", escaped(victim)),
        (escaped(victim), ""),
    ):
        assert client.get("/v1/keys", headers=[(HEADER, first), (HEADER, second)]).status_code == 401


def test_lines_may_end_as_the_proxy_likes(pair):
    client, victim, _ = pair
    for text in (pem(victim), pem(victim).rstrip("\n"), pem(victim).replace("\n", "\r\n")):
        assert client.get("/v1/keys", headers={HEADER: quote(text)}).status_code == 200


HOSTILE = {
    "unknown": lambda: rfc9440(certificate()),
    "no base64": lambda: ":not base64:",
    "no certificate": lambda: f":{base64.b64encode(b'x' * 300).decode()}:",
    "empty": lambda: "",
    "colons": lambda: "::",
    "a name": lambda: "CN=ward-3",
    "a fingerprint": lambda: "ab" * 32,
    "huge": lambda: ":" + "A" * 40_000 + ":",
    "a key": lambda: quote("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_known_certificate_is_401(lab, bound, name):
    with served(lab) as client:
        assert client.get("/v1/models", headers={HEADER: HOSTILE[name]()}).status_code == 401


@pytest.mark.parametrize(
    "dates", [{"days": -1, "begun_days": 9}, {"days": 9, "begun_days": -1}], ids=["past", "future"]
)
def test_certificate_out_of_its_dates_is_401(lab, dates):
    found = certificate(**dates)
    lab.key("consumer", certificate=found.fingerprint(hashes.SHA256()).hex())
    with served(lab) as client:
        assert client.get("/v1/models", headers={HEADER: rfc9440(found)}).status_code == 401


def test_bad_key_is_not_saved_by_a_good_certificate(lab, bound):
    with served(lab) as client:
        headers = {HEADER: rfc9440(bound), "Authorization": "Bearer affidavit_no"}
        assert client.get("/v1/models", headers=headers).status_code == 401
        headers["Authorization"] = "Basic eA=="
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_network_and_mapped_address_count_as_the_proxy(lab, bound):
    with served(lab, peer="::ffff:10.1.2.77", proxies=("10.1.2.0/24",)) as client:
        assert client.get("/v1/models", headers={HEADER: rfc9440(bound)}).status_code == 200


@pytest.mark.parametrize(
    ("proxies", "said"),
    [((), "nobody is believed"), (("0.0.0.0/0",), "everybody"), (("::/0",), "everybody"),
     (("proxy",), "no address"), (("10.0.0.1/24",), "no address")],
)  # fmt: skip
def test_proxies_that_make_no_sense_stop_the_start(lab, proxies, said):
    settings = lab.settings(mtls_header=HEADER, mtls_trusted_proxies=proxies)
    with pytest.raises(SettingsError, match=said):
        proxy_identity(settings, lab.clock, lambda: None)


def test_environment_gives_proxies_by_commas(lab):
    assert lab.settings(mtls_trusted_proxies="10.0.0.1, 10.0.0.2").mtls_trusted_proxies == (
        "10.0.0.1",
        "10.0.0.2",
    )
