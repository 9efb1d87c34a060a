"""A client certificate that a proxy checked: the one identity that this server takes from somebody else's
word.

Off unless `mtls_header` is set. The proxy ends TLS, asks for the client's certificate, checks it against its
own authorities, and passes it on in that header, as RFC 9440 writes it (`:base64 of DER:`) or as escaped PEM.
Only a connection from `mtls_trusted_proxies` may say so; from anywhere else the header is ignored and
counted. A proxy that adds its header to one that the client sent, rather than replacing it, would let anybody
be anybody. So the header holds one certificate and not a character more: two headers, two values joined by a
comma, and text before, between or after are refused, whichever way round. Whoever can open a connection from
a trusted address is believed: give the proxy an address of its own, and let nothing else run there.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.requests import Request

from server.errors import SettingsError, UnauthenticatedError
from server.settings import Settings

MAX_HEADER_CHARS: Final = 16_384
_BASE64: Final = "[A-Za-z0-9+/]+={0,2}"
_one_rfc9440: Final = re.compile(f":({_BASE64}):").fullmatch
_one_pem: Final = re.compile(
    r"-----BEGIN CERTIFICATE-----\r?\n"
    rf"((?:[A-Za-z0-9+/]+\r?\n)*{_BASE64})\r?\n"
    r"-----END CERTIFICATE-----(?:\r?\n)?"
).fullmatch

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class ProxyIdentity:
    """Reads the certificate's fingerprint from a trusted proxy's header."""

    header: str
    networks: tuple[Network, ...]
    clock: Callable[[], datetime]
    spoofed: Callable[[], None]  # called for each header from an untrusted address

    def fingerprint(self, request: Request) -> str:
        """Return the hex SHA-256 of the client's certificate; "" when there is none to believe.

        Raises:
            UnauthenticatedError: a trusted proxy sent what is no certificate, several, or one not valid now.
        """
        given = request.headers.getlist(self.header)
        if not given:
            return ""
        if not self._is_trusted(request):
            self.spoofed()
            return ""
        if len(given) != 1 or len(given[0]) > MAX_HEADER_CHARS:
            raise UnauthenticatedError("the proxy sent several client certificates, or a huge one")
        try:
            certificate = _certificate(given[0])
        except (ValueError, binascii.Error) as error:
            raise UnauthenticatedError("the proxy's header holds no certificate") from error
        now = self.clock()
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise UnauthenticatedError("the client certificate is unknown, revoked or expired")
        return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()

    def _is_trusted(self, request: Request) -> bool:
        if request.client is None:
            return False
        try:
            address = ipaddress.ip_address(request.client.host)
        except ValueError:
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return any(address in network for network in self.networks)


def proxy_identity(
    settings: Settings, clock: Callable[[], datetime], spoofed: Callable[[], None]
) -> ProxyIdentity | None:
    """Return what reads certificates under these settings; None where `mtls_header` is not set.

    Raises:
        SettingsError: no proxy is trusted, everybody is, or an address is none.
    """
    if not settings.mtls_header:
        return None
    networks = []
    for text in settings.mtls_trusted_proxies:
        try:
            network = ipaddress.ip_network(text)
        except ValueError as error:
            raise SettingsError(f"mtls_trusted_proxies: {text[:50]!r} is no address or network") from error
        if network.prefixlen == 0:
            raise SettingsError(f"mtls_trusted_proxies: {text} is everybody; name the proxy's own address")
        networks.append(network)
    if not networks:
        raise SettingsError("mtls_trusted_proxies: name the proxy's address; without one nobody is believed")
    return ProxyIdentity(settings.mtls_header, tuple(networks), clock, spoofed)


def _certificate(text: str) -> x509.Certificate:
    """The one certificate that the whole of `text` is.

    A parser of PEM looks for the first block and skips what is around it; a proxy that appends would leave
    the client's own choice in front.
    """
    found = _one_rfc9440(text) or _one_pem(unquote(text, errors="strict"))
    if found is None:
        raise ValueError("neither one RFC 9440 byte sequence nor one block of PEM")
    der = base64.b64decode("".join(found[1].split()), validate=True)
    certificate = x509.load_der_x509_certificate(der)
    if certificate.public_bytes(Encoding.DER) != der:
        raise ValueError("more bytes than the certificate's")
    return certificate
