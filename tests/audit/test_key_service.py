"""Keys that live elsewhere: in a file, in another process, in a service that lies."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit.checkpoints import open_checkpoint
from audit.errors import KeyFileError, KeyFormatError, KeyServiceError, SignerMissingError
from audit.key_service import FileKeyService, KeyService, ServiceKey
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.signer import Signer, publish

SERVER = """
import socket, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
key = Ed25519PrivateKey.generate()
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as asked:
        length = int(asked.readline())
        if length < 0:
            connection.sendall(key.public_key().public_bytes_raw())
        else:
            connection.sendall(key.sign(asked.read(length)))
"""


class SocketKeyService:
    """The client half of a key service in another process, as small as one can be."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def public_key(self) -> bytes:
        return self._ask(b"-1\n")

    def sign(self, message: bytes) -> bytes:
        return self._ask(b"%d\n" % len(message) + message)

    def _ask(self, request: bytes) -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.path))
            connection.sendall(request)
            with connection.makefile("rb") as answer:
                return answer.read()


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SocketKeyService]:
    path = tmp_path_factory.mktemp("kms") / "s"
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield SocketKeyService(path)
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(params=["file", "process"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> KeyService:
    if request.param == "process":
        found: KeyService = request.getfixturevalue("remote")
        return found
    SigningKey.generate().save(tmp_path / "service.pem", b"secret")
    return FileKeyService(tmp_path / "service.pem", b"secret")


def test_log_is_signed_by_a_key_that_its_home_does_not_hold(
    service: KeyService, tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    signer = Signer.create(tmp_path / "signer", log_tools.ORIGIN, service=service)
    assert list((tmp_path / "signer").glob("*.pem")) == []
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(3))
        note = publish(ledger, Signer.open(tmp_path / "signer", services=[service]))
    assert open_checkpoint(note, log=signer.verifier, now=0).checkpoint.tree_size == 3
    assert signer.verifier.key.public_bytes == service.public_key()
    with pytest.raises(SignerMissingError):
        Signer.open(tmp_path / "signer")


def test_service_key_signs_what_a_key_file_signs(service: KeyService) -> None:
    key = ServiceKey(service)
    key.verify_key.verify("receipt", b"payload", key.sign("receipt", b"payload"))
    with pytest.raises(KeyFileError):
        key.save("nowhere.pem", None)


def test_log_moves_from_a_file_to_a_service(
    remote: SocketKeyService, tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    signer = Signer.create(tmp_path / "signer", log_tools.ORIGIN, b"secret")
    old, new = signer.rotate(2, service=remote)
    assert new.verifier.key.public_bytes == remote.public_key()
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(2))
        both = publish(ledger, signer)
        log_tools.fill(ledger, range(2, 3))
        alone = publish(ledger, signer)
    assert set(open_checkpoint(both, log=[old.verifier, new.verifier], now=0).log_keys) == {
        old.verifier, new.verifier
    }  # fmt: skip
    assert open_checkpoint(alone, log=[old.verifier, new.verifier], now=0).log_keys == (new.verifier,)
    assert Signer.open(tmp_path / "signer", b"secret", services=[remote]).vkey == new.vkey


class Broken:
    """A service that answers, but wrongly."""

    def __init__(self, public: object, signature: object) -> None:
        self.public, self.signature = public, signature

    def public_key(self) -> bytes:
        if isinstance(self.public, Exception):
            raise self.public
        return self.public  # type: ignore[return-value]

    def sign(self, message: bytes) -> bytes:
        if isinstance(self.signature, Exception):
            raise self.signature
        return self.signature  # type: ignore[return-value]


GOOD = SigningKey.generate().public_bytes


@pytest.mark.parametrize("public", [b"", b"x" * 31, bytes(32)])
def test_service_with_no_real_public_key_is_refused(public: bytes) -> None:
    with pytest.raises(KeyFormatError):
        ServiceKey(Broken(public, b""))


def test_service_that_does_not_answer_is_named() -> None:
    with pytest.raises(KeyServiceError, match="no public key"):
        ServiceKey(Broken(ConnectionError("gone"), b""))
    with pytest.raises(KeyServiceError, match="did not sign: gone"):
        ServiceKey(Broken(GOOD, ConnectionError("gone"))).unsafe_sign_raw(b"x")


@pytest.mark.parametrize("signature", [b"", b"x" * 64, b"x" * 63, None, "text"])
def test_signature_of_another_key_never_leaves(signature: object, tmp_path: Path) -> None:
    service = Broken(GOOD, signature)
    with pytest.raises(KeyServiceError, match="not by its public key"):
        ServiceKey(service).unsafe_sign_raw(b"x")
    signer = Signer.create(tmp_path / "signer", "a.example/log", service=service)
    before = signer.state()
    with pytest.raises(KeyServiceError):
        signer.sign(1, bytes(32), [])
    assert signer.state() == before
