from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from audit.errors import BadSignatureError, KeyFileError, KeyFormatError, UnknownDomainError
from audit.keys import DOMAINS, SigningKey, VerifyKey, fingerprint, format_public_key, parse_public_key
from tests.soak_report import Report

KEY = SigningKey.generate()


@pytest.mark.reported
def test_wycheproof_ed25519_vectors_have_their_stated_outcome(shared_vectors: Path, report: Report) -> None:
    document = json.loads((shared_vectors / "ed25519/ed25519_test.json").read_bytes())
    count = 0
    for group in document["testGroups"]:
        key = VerifyKey(bytes.fromhex(group["publicKey"]["pk"]))
        for case in group["tests"]:
            try:
                key.verify_raw(bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
                found = "valid"
            except BadSignatureError:
                found = "invalid"
            assert found == case["result"], case
            count += 1
    assert count == 151
    report("vectors", size="151 Ed25519 signatures (Wycheproof)", result="151 as stated")


def test_signature_serves_its_domain_only() -> None:
    signature = KEY.sign("statement", b"payload")
    KEY.verify_key.verify("statement", b"payload", signature)
    for domain in DOMAINS - {"statement"}:
        with pytest.raises(BadSignatureError):
            KEY.verify_key.verify(domain, b"payload", signature)


def test_payload_cannot_be_moved_across_the_domain_boundary() -> None:
    signature = KEY.unsafe_sign_raw(b"affidavit/run/v1\x00x")
    KEY.verify_key.verify("run", b"x", signature)
    with pytest.raises(BadSignatureError):
        KEY.verify_key.verify("run", b"\x00x", signature)


@pytest.mark.parametrize("domain", ["", "note", "Statement", "statement/v1\x00", "run\n"])
def test_domain_outside_the_closed_list_is_refused(domain: str) -> None:
    with pytest.raises(UnknownDomainError):
        KEY.sign(domain, b"")
    with pytest.raises(UnknownDomainError):
        KEY.verify_key.verify(domain, b"", b"\0" * 64)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[:-1],
        lambda s: s + b"\0",
        lambda s: b"",
        lambda s: bytes([s[0] ^ 1]) + s[1:],
        lambda s: b"\0" * 64,
    ],
)
def test_bad_signature_is_refused_and_names_the_key(change: object) -> None:
    signature = change(KEY.sign("run", b"x"))  # type: ignore[operator]
    with pytest.raises(BadSignatureError) as caught:
        KEY.verify_key.verify("run", b"x", signature)
    assert caught.value.key == KEY.text


SMALL_ORDER = [
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "0100000000000000000000000000000000000000000000000000000000000080",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


@pytest.mark.parametrize("public", SMALL_ORDER)
def test_key_under_which_one_signature_fits_many_messages_is_refused(public: str) -> None:
    with pytest.raises(KeyFormatError):
        VerifyKey(bytes.fromhex(public))


def test_public_key_text_reads_back() -> None:
    assert parse_public_key(KEY.text) == KEY.public_bytes
    assert KEY.text == format_public_key(KEY.public_bytes)
    assert len(fingerprint(KEY.public_bytes)) == 16


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.upper(),
        lambda t: " " + t,
        lambda t: t + "\n",
        lambda t: t[:-1],
        lambda t: t.removeprefix("ed25519:"),
        lambda t: t.replace("ed25519", "ed448"),
        lambda t: t[:-4] + "====",
        lambda t: "ed25519:",
        lambda t: t + "AAAA",
    ],
)
def test_other_spelling_of_a_public_key_is_refused(change: object) -> None:
    with pytest.raises(KeyFormatError):
        parse_public_key(change(KEY.text))  # type: ignore[operator]


def test_base64_with_stray_final_bits_is_refused() -> None:
    text = format_public_key(SigningKey.generate().public_bytes)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    stray = alphabet[alphabet.index(text[-2]) ^ 1]
    with pytest.raises(KeyFormatError, match="canonical"):
        parse_public_key(text[:-2] + stray + "=")


@given(st.text(max_size=80))
def test_parsing_arbitrary_key_text_raises_the_declared_error_only(text: str) -> None:
    with pytest.raises(KeyFormatError):
        parse_public_key("ed25519:" + text)


def test_key_file_is_private_encrypted_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    KEY.save(path, b"passphrase")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"ENCRYPTED" in path.read_bytes()
    assert SigningKey.load(path, b"passphrase").public_bytes == KEY.public_bytes
    assert os.listdir(tmp_path) == ["key.pem"]


@pytest.mark.parametrize("passphrase", [None, b"wrong", b""])
def test_encrypted_key_needs_its_passphrase(tmp_path: Path, passphrase: bytes | None) -> None:
    KEY.save(tmp_path / "key.pem", b"passphrase")
    with pytest.raises(KeyFileError) as caught:
        SigningKey.load(tmp_path / "key.pem", passphrase)
    assert caught.value.path == str(tmp_path / "key.pem")


def test_passphrase_for_an_unencrypted_key_is_refused(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.pem", None)
    with pytest.raises(KeyFileError, match="not encrypted"):
        SigningKey.load(tmp_path / "key.pem", b"passphrase")


def test_key_is_never_overwritten(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.pem", None)
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        SigningKey.generate().save(tmp_path / "key.pem", None)
    assert (tmp_path / "key.pem").read_bytes() == before


def test_empty_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="empty"):
        KEY.save(tmp_path / "key.pem", b"")


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    KEY.save(tmp_path / "key.pem", None)
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        SigningKey.load(tmp_path / "key.pem")


def test_missing_damaged_or_other_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot read"):
        SigningKey.load(tmp_path / "none.pem")
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, data in (
        ("damaged", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"),
        ("empty", b""),
        ("x25519", other),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(KeyFileError):
            SigningKey.load(path)


def test_private_key_is_not_in_its_repr() -> None:
    assert KEY.text in repr(KEY)
    private = KEY._private.private_bytes_raw()
    assert private.hex() not in repr(KEY)
