"""Certificates: what is issued verifies, what ends is renewed in time, what does not fit is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store

from federation.network.errors import PkiError
from federation.network.pki import (
    Pki,
    create_node_key,
    node_key_pem,
    node_key_text,
    parse_node_key,
    pem_fingerprint,
    read_node_key,
)
from server.network.handshakes import Handshakes
from server.network.serving import keep_fresh

HOSTS = ("coordinator.example.org", "127.0.0.1")


@pytest.fixture
def pki(tmp_path):
    return Pki.create(tmp_path / "tls", HOSTS, name="log.example.org/x")


def verified(pki: Pki, stem: str, name: x509.DNSName | x509.IPAddress, ca=None, when=None):
    chain = x509.load_pem_x509_certificates((pki.folder / f"{stem}.pem").read_bytes())
    root = x509.load_pem_x509_certificate((ca or pki.inner_ca).read_bytes())
    builder = PolicyBuilder().store(Store([root])).time(when or datetime.now(UTC))
    return builder.build_server_verifier(name).verify(chain[0], [])


def test_issued_certificates_verify_for_their_names(pki):
    import ipaddress

    verified(pki, "server", x509.DNSName("coordinator.example.org"))
    verified(pki, "server", x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
    verified(pki, "inner", x509.DNSName("localhost"))
    with pytest.raises(x509.verification.VerificationError):
        verified(pki, "inner", x509.DNSName("coordinator.example.org"))


def test_another_ca_does_not_verify(pki, tmp_path):
    other = Pki.create(tmp_path / "other", HOSTS, name="log.example.org/x")
    assert other.ca_fingerprint() != pki.ca_fingerprint()
    with pytest.raises(x509.verification.VerificationError):
        verified(pki, "server", x509.DNSName("coordinator.example.org"), other.ca)


def test_private_keys_are_their_owners_alone(pki, tmp_path):
    create_node_key(tmp_path / "node.key")
    keys = [*pki.folder.glob("*.key"), tmp_path / "node.key"]
    assert len(keys) == 4
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in keys)


def test_certificates_are_made_once(pki):
    with pytest.raises(PkiError, match="exists"):
        Pki.create(pki.folder, HOSTS, name="x")


def test_only_what_ends_within_thirty_days_is_renewed(pki):
    before = (pki.folder / "server.pem").read_bytes()
    assert pki.renew() == ()
    assert (pki.folder / "server.pem").read_bytes() == before
    later = datetime.now(UTC) + timedelta(days=61)
    assert pki.renew(now=later) == ("server", "inner")
    assert pki.hosts() == HOSTS
    assert all(state.days_left >= 89 for state in pki.states(now=later))
    verified(pki, "server", x509.DNSName("coordinator.example.org"), when=later)


def test_no_certificate_outlives_its_ca(pki):
    last_days = datetime.now(UTC) + timedelta(days=3640)
    pki.issue("server", HOSTS, now=last_days)
    ends = {state.name: state.not_after for state in pki.states()}
    assert ends["server"] <= ends["ca"]


def test_renewing_without_the_ca_key_says_so(pki):
    (pki.folder / "ca.key").unlink()
    with pytest.raises(PkiError, match=r"ca\.key"):
        pki.renew(now=datetime.now(UTC) + timedelta(days=80))


def test_own_certificates_are_adopted_and_never_renewed(pki, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(pki.folder, given)
    own = Pki.adopt(
        tmp_path / "own", cert=given / "server.pem", key=given / "server.key", ca=given / "ca.pem", name="x"
    )
    assert own.ca_fingerprint() == pki.ca_fingerprint()
    assert own.inner_ca != own.ca
    verified(own, "server", x509.DNSName("coordinator.example.org"), own.ca)
    verified(own, "inner", x509.DNSName("localhost"), own.inner_ca)
    assert own.renew(now=datetime.now(UTC) + timedelta(days=80)) == ("inner",)


@pytest.mark.parametrize("wrong", ["key", "ca", "cert"])
def test_certificates_that_do_not_fit_are_refused(pki, tmp_path, wrong):
    other = Pki.create(tmp_path / "other", HOSTS, name="y")
    files = {
        name: pki.folder / file
        for name, file in (("cert", "server.pem"), ("key", "server.key"), ("ca", "ca.pem"))
    }
    files[wrong] = other.folder / files[wrong].name
    with pytest.raises(PkiError):
        Pki.adopt(tmp_path / "own", **files, name="x")


def test_node_key_has_one_text(tmp_path):
    text = create_node_key(tmp_path / "node.key")
    assert read_node_key(tmp_path / "node.key") == text
    assert node_key_text(parse_node_key(text)) == text
    assert node_key_pem(text).startswith(b"-----BEGIN PUBLIC KEY-----")


@pytest.mark.parametrize(
    "text",
    ["", "AAAA", "not base64!", node_key_text(ec.generate_private_key(ec.SECP256R1()).public_key())],
)
def test_other_keys_are_no_node_keys(text):
    with pytest.raises(ValueError, match=r".*"):
        parse_node_key(text)


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_damaged_files_name_the_file_and_the_fix(tmp_path, content):
    (tmp_path / "node.key").write_bytes(content)
    with pytest.raises(PkiError, match="backup"):
        read_node_key(tmp_path / "node.key")
    with pytest.raises(ValueError, match=r".*"):
        pem_fingerprint(content)


@pytest.mark.parametrize(
    ("lifetime", "before", "due"),
    [
        (timedelta(days=90), timedelta(days=31), False),
        (timedelta(days=90), timedelta(days=29), True),
        (timedelta(seconds=60), timedelta(seconds=21), False),
        (timedelta(seconds=60), timedelta(seconds=19), True),
    ],
)
def test_a_certificate_is_renewed_in_its_last_month_or_its_last_third(pki, lifetime, before, due):
    now = datetime.now(UTC).replace(microsecond=0)
    pki.issue("server", HOSTS, now=now, lifetime=lifetime)
    then = now + lifetime - before
    assert ("server" in pki.renew(now=then, server=lifetime)) is due
    state = next(state for state in pki.states(now=then) if state.name == "server")
    assert state.left > before if due else state.left == before


def test_a_shorter_life_in_the_settings_is_taken_at_once(pki):
    assert pki.renew(server=timedelta(seconds=60)) == ("server",)
    assert pki.renew(server=timedelta(seconds=60)) == ()


def test_people_hear_of_what_does_not_renew_itself_and_of_what_is_overdue(pki):
    def heard(**passed: float) -> dict[str, str]:
        later = datetime.now(UTC) + timedelta(**passed)
        return {state.name: state.urgency for state in pki.states(now=later)}

    assert heard() == {"ca": "", "server": "", "inner": ""}
    assert heard(days=65) == {"ca": "", "server": "soon", "inner": "soon"}  # `coordinator up` is not up
    assert heard(days=84) == {"ca": "", "server": "urgent", "inner": "urgent"}
    assert heard(days=3500)["ca"] == "soon"
    assert heard(days=3645)["ca"] == "urgent"


def test_a_serving_context_takes_the_new_certificate_and_waits_for_a_key_that_fits(pki):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate, key = pki.folder / "server.pem", pki.folder / "server.key"
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()

        def serial() -> int:
            def answer() -> None:
                with (
                    contextlib.suppress(OSError),
                    context.wrap_socket(listener.accept()[0], server_side=True),
                ):
                    pass

            served = threading.Thread(target=answer)
            served.start()
            found = x509.load_pem_x509_certificate(ssl.get_server_certificate(address).encode())
            served.join(60)
            return found.serial_number

        async def play() -> None:
            first = serial()
            fresh = asyncio.create_task(keep_fresh(context, certificate, key, every_s=0.01))
            await asyncio.sleep(0.05)
            old_key = key.read_bytes()
            pki.issue("server", HOSTS)
            new_key = key.read_bytes()
            key.write_bytes(old_key)  # as between the two writes
            os.utime(certificate, ns=(1, 1))
            await asyncio.sleep(0.1)
            assert serial() == first
            key.write_bytes(new_key)
            async with asyncio.timeout(60):
                while serial() == first:
                    await asyncio.sleep(0.02)
            fresh.cancel()

        asyncio.run(play())


def test_failed_handshakes_are_counted_and_told_once_a_minute(pki, caplog):
    now = [0.0]
    book = Handshakes(monotonic=lambda: now[0])
    for number in range(40):
        book.note(f"REASON_{number % 20}")
    assert sum(book.failed.values()) == 40
    assert len(book.failed) <= 17
    assert len(caplog.records) == 1
    now[0] = 61.0
    book.note("TLSV1_ALERT_UNKNOWN_CA")
    assert len(caplog.records) == 2
    assert "39" not in caplog.records[0].message
