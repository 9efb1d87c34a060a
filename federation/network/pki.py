"""Keys and certificates of a federation: an own CA (EC P-384), a server certificate (P-256), node keys.

    home/tls/ca.pem, ca.key            the federation's own CA; ca.key may be kept elsewhere between renewals
    home/tls/server.pem, server.key    the gateway's certificate, followed by the CA's
    home/tls/inner.pem, inner.key      SuperLink's, for loopback alone

With certificates of one's own (`adopt`) server.pem, server.key and ca.pem are copies and nothing renews them.
A site's node key is P-384 in OpenSSH form, which is what a SuperNode reads.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from audit._files import write_durably
from federation.network.errors import PkiError

CA_DAYS: Final = 3650
SERVER_DAYS: Final = 90
RENEW_BEFORE: Final = timedelta(days=30)
WARN_CA_DAYS: Final = 180
SOON_DAYS: Final = 30
URGENT_DAYS: Final = 7
LOOPBACK: Final = ("localhost", "127.0.0.1")

_SKEW: Final = timedelta(minutes=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateState:
    """How long a certificate still holds, for `status` and `doctor`."""

    name: str
    path: Path
    not_after: datetime
    lifetime: timedelta  # from its issue
    left: timedelta
    renews: bool  # by `coordinator up`

    @property
    def days_left(self) -> int:
        return self.left // timedelta(days=1)

    @property
    def is_due(self) -> bool:
        """Whether its renewal is due; see `renewal_margin`."""
        return self.renews and self.left < renewal_margin(self.lifetime)

    @property
    def urgency(self) -> str:
        """Return "urgent", "soon" or "", by what people have to do about it: what renews itself is silent
        until it is overdue.
        """
        if self.renews and not self.is_due:
            return ""
        if self.name == "ca" and URGENT_DAYS <= self.days_left < WARN_CA_DAYS:
            return "soon"
        return urgency_of(self.left)


@dataclass(frozen=True, slots=True)
class Pki:
    """The folder of a coordinator's certificates."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, hosts: Sequence[str], *, name: str, now: datetime | None = None) -> Pki:
        """Make a CA and the two server certificates.

        Raises:
            PkiError: there are certificates already.
        """
        if (folder / "ca.pem").exists():
            raise PkiError(
                folder / "ca.pem", "exists", "certificates are made once; `coordinator up` renews them"
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        now = now or datetime.now(UTC)
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:50]} CA")])
        certificate = (
            _builder(subject, subject, key.public_key(), now, timedelta(days=CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .sign(key, hashes.SHA384())
        )
        write_key(folder / "ca.key", key)
        write_durably(folder / "ca.pem", _pem(certificate), mode=0o644)
        pki = cls(folder)
        pki.issue("server", hosts, now=now)
        pki.issue("inner", LOOPBACK, now=now)
        return pki

    @classmethod
    def adopt(
        cls, folder: Path, *, cert: Path, key: Path, ca: Path, name: str, now: datetime | None = None
    ) -> Pki:
        """Use certificates from elsewhere for the gateway; SuperLink's inner ones are still our own.

        Raises:
            PkiError: they do not fit together.
        """
        pki = cls.create(folder, LOOPBACK, name=name, now=now)
        chain, private, root = _read(cert), _read(key), _read(ca)
        _check_fit(cert, chain, key, private, ca, root)
        os.replace(folder / "ca.pem", folder / "inner-ca.pem")
        os.replace(folder / "ca.key", folder / "inner-ca.key")
        write_durably(folder / "ca.pem", root, mode=0o644)
        write_durably(folder / "server.key", private)
        write_durably(folder / "server.pem", chain, mode=0o644)
        return pki

    @property
    def adopted(self) -> bool:
        return (self.folder / "inner-ca.pem").exists()

    @property
    def ca(self) -> Path:
        """The CA that sites pin."""
        return self.folder / "ca.pem"

    @property
    def inner_ca(self) -> Path:
        """The CA of the certificate that SuperLink has on loopback."""
        return self.folder / ("inner-ca.pem" if self.adopted else "ca.pem")

    def ca_fingerprint(self) -> str:
        """Return the SHA-256 of the CA's DER, as invitations carry it."""
        return pem_fingerprint(_read(self.ca))

    def issue(
        self,
        stem: str,
        hosts: Sequence[str],
        *,
        now: datetime | None = None,
        lifetime: timedelta = timedelta(days=SERVER_DAYS),
    ) -> None:
        """Write `<stem>.pem` and a fresh `<stem>.key`, signed by the own CA.

        Raises:
            PkiError: the CA's key is not here, or a host is neither a name nor an address.
        """
        now = now or datetime.now(UTC)
        ca_pem = _read(self.inner_ca)
        ca = x509.load_pem_x509_certificate(ca_pem)
        ca_key = _load_key(self.inner_ca.with_suffix(".key"))
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:60])])
        lifetime = min(lifetime, ca.not_valid_after_utc - now)
        certificate = (
            _builder(subject, ca.subject, key.public_key(), now, lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
            .sign(ca_key, hashes.SHA384())
        )
        write_key(self.folder / f"{stem}.key", key)
        write_durably(self.folder / f"{stem}.pem", _pem(certificate) + ca_pem, mode=0o644)

    def hosts(self) -> tuple[str, ...]:
        """Return the names that the gateway's certificate is for."""
        certificate = x509.load_pem_x509_certificate(_read(self.folder / "server.pem"))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return tuple(str(name.value) for name in names if isinstance(name, (x509.DNSName, x509.IPAddress)))

    def renew(
        self, *, now: datetime | None = None, server: timedelta = timedelta(days=SERVER_DAYS)
    ) -> tuple[str, ...]:
        """Renew what our own CA signed and what is due; return the names of those renewed.

        `server` is how long the gateway's certificate lasts from now on; one that lasts longer is due too.
        """
        now = now or datetime.now(UTC)
        renewed = []
        for state in self.states(now=now):
            stem = state.path.stem
            lifetime = server if stem == "server" else timedelta(days=SERVER_DAYS)
            if state.is_due or (state.renews and state.lifetime > lifetime + 2 * _SKEW):
                self.issue(stem, self.hosts() if stem == "server" else LOOPBACK, now=now, lifetime=lifetime)
                renewed.append(stem)
        return tuple(renewed)

    def states(self, *, now: datetime | None = None) -> tuple[CertificateState, ...]:
        """Return every certificate and what is left of its time."""
        now = now or datetime.now(UTC)
        found = []
        for stem, renews in (("ca", False), ("server", not self.adopted), ("inner", True)):
            path = self.folder / f"{stem}.pem"
            certificate = x509.load_pem_x509_certificate(_read(path))
            end = certificate.not_valid_after_utc
            found.append(
                CertificateState(
                    name=stem,
                    path=path,
                    not_after=end,
                    lifetime=end - certificate.not_valid_before_utc - _SKEW,
                    left=end - now,
                    renews=renews,
                )
            )
        return tuple(found)


def renewal_margin(lifetime: timedelta) -> timedelta:
    """Return how long before its end a key or certificate is renewed: 30 days, or the last third of less."""
    return min(RENEW_BEFORE, lifetime / 3)


def urgency_of(left: timedelta) -> str:
    """Return "urgent" in the last 7 days, "soon" in the last 30, else ""."""
    if left < timedelta(days=URGENT_DAYS):
        return "urgent"
    return "soon" if left < timedelta(days=SOON_DAYS) else ""


def create_node_key(path: Path) -> str:
    """Write a new P-384 key in OpenSSH form; return its public key as `node_key_text` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_durably(path, pem)
    return node_key_text(key.public_key())


def read_node_key(path: Path) -> str:
    """Return the public key of a node key file.

    Raises:
        PkiError: it is no P-384 key in OpenSSH form.
    """
    try:
        key = serialization.load_ssh_private_key(_read(path), None)
    except ValueError as error:
        raise PkiError(path, f"is no OpenSSH private key: {error}", "restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(path, "is no P-384 key", "restore it from a backup")
    return node_key_text(key.public_key())


def node_key_text(key: ec.EllipticCurvePublicKey) -> str:
    """Return base64 of the DER SubjectPublicKeyInfo: how entries hold a node key."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(der).decode()


def parse_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """Read what `node_key_text` wrote, strictly.

    Raises:
        ValueError: it is not that, or not on P-384.
    """
    der = base64.b64decode(text, validate=True)
    key = serialization.load_der_public_key(der)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("a node key is on the curve P-384")
    if node_key_text(key) != text:
        raise ValueError("the node key is not in its one DER form")
    return key


def node_key_pem(text: str) -> bytes:
    """Return the same key as PEM, which is what Flower compares."""
    return parse_node_key(text).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def node_fingerprint(text: str) -> str:
    """Return the SHA-256 of the DER key, in hex."""
    return hashlib.sha256(base64.b64decode(text)).hexdigest()


def pem_fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of a PEM certificate's DER, in hex.

    Raises:
        ValueError: it is no certificate.
    """
    return x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256()).hex()


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Write a private key for its owner alone."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_durably(path, pem)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    lifetime: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + lifetime)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as error:
        raise PkiError(
            Path(host), "is no host name or address", "give --host a name sites can reach"
        ) from error


def _check_fit(cert: Path, chain: bytes, key: Path, private: bytes, ca: Path, root: bytes) -> None:
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        root_certificate = x509.load_pem_x509_certificate(root)
        loaded = serialization.load_pem_private_key(private, None)
    except (ValueError, TypeError) as error:
        raise PkiError(cert, f"certificates or key cannot be read: {error}", "give PEM files") from error
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != loaded.public_key().public_bytes(*form):
        raise PkiError(key, f"is not the key of {cert}", "give the certificate's own key")
    links = x509.load_pem_x509_certificates(chain)
    tail = links[-1]
    if tail != root_certificate:
        try:
            tail.verify_directly_issued_by(root_certificate)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise PkiError(
                ca, f"did not sign the last certificate in {cert}", "give the CA, and the whole chain"
            ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PkiError(
            path, f"cannot be read: {error.strerror}", "run `affidavit coordinator init`"
        ) from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError) as error:
        raise PkiError(path, f"is no private key: {error}", "restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(path, "is no EC key", "restore it from a backup")
    return key


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
