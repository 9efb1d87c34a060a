"""A log of its own, keys of made-up sites, and a clock that the tests turn."""

from __future__ import annotations

import base64
import dataclasses
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from audit.entries import body_document, decode_entry, signing_payload
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.membership import SiteJoined, SiteKeysRotated, SiteLeft
from audit.notes import KeyType, NoteSigner
from clients.identity import SiteKeys, signature_text
from federation.network.invitation import format_time
from federation.network.membership import InviteRequest, Membership, enrolment_digest
from federation.network.pki import node_key_text

ORIGIN = "log.example.org/network"
NOW = datetime(2026, 11, 24, 8, 0, 0, tzinfo=UTC)


class TurnedClock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **amount: float) -> None:
        self.now += timedelta(**amount)


@dataclasses.dataclass
class Hospital:
    """A site's keys and what it would send."""

    name: str
    keys: SiteKeys
    node: ec.EllipticCurvePrivateKey
    population: str

    @classmethod
    def make(cls, folder: Path, name: str) -> Hospital:
        keys = SiteKeys.create(folder / name)
        return cls(name, keys, ec.generate_private_key(ec.SECP384R1()), os.urandom(16).hex())

    @property
    def node_key(self) -> str:
        return node_key_text(self.node.public_key())

    def enrolment(self, origin: str = ORIGIN):
        return self.keys.enrolment(self.name, self.population, origin)

    def signed(self, body, by: SigningKey | None = None):
        domain, payload = signing_payload(body)
        return dataclasses.replace(body, signature=signature_text(by or self.keys.identity, domain, payload))

    def joined(self, asked_with, /, *, now: datetime = NOW, by: SigningKey | None = None, **changes) -> dict:
        body = SiteJoined(
            site=self.name,
            origin=ORIGIN,
            invitation=asked_with.digest,
            identity_key=self.keys.identity.text,
            node_key=self.node_key,
            expires=format_time(now + timedelta(days=365)),
            enrolment=enrolment_digest(self.enrolment()),
            signature="",
        )
        return body_document(self.signed(dataclasses.replace(body, **changes), by))

    def leaving(self, invitation) -> dict:
        body = SiteLeft(site=self.name, origin=ORIGIN, invitation=invitation.digest, signature="")
        return body_document(self.signed(body))

    def rotation(self, invitation, fresh: str, *, now: datetime = NOW, **changes) -> dict:
        body = SiteKeysRotated(
            site=self.name,
            origin=ORIGIN,
            invitation=invitation.digest,
            previous_key=self.node_key,
            node_key=fresh,
            expires=format_time(now + timedelta(days=365)),
            signature="",
        )
        return body_document(self.signed(dataclasses.replace(body, **changes)))

    def headers(self, when: datetime) -> dict[str, str]:
        """What a SuperNode sends with each request."""
        pem = self.node.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        timestamp = when.isoformat()
        signature = self.node.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        return {
            "flwr-public-key": base64.b64encode(pem).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": base64.b64encode(signature).decode(),
        }


@dataclasses.dataclass
class Office:
    """A coordinator's membership with what a test asks of it."""

    membership: Membership
    ledger: Ledger
    clock: TurnedClock
    log_key: str
    folder: Path

    def invite(self, label: str = "St Mary", **options):
        return self.membership.invite(
            InviteRequest(label=label, **options),
            address="127.0.0.1:8443",
            ca="ab" * 32,
            log_key=self.log_key,
        )

    def hospital(self, name: str = "st-mary") -> Hospital:
        return Hospital.make(self.folder / "sites", name)

    def ask(self, hospital: Hospital, asked_with, /, **changes):
        return self.membership.request(
            asked_with.secret,
            hospital.joined(asked_with, now=self.clock(), **changes),
            body_document(hospital.enrolment()),
        )

    def admit(self, hospital: Hospital):
        invitation = self.invite(hospital.name)
        self.ask(hospital, invitation)
        self.membership.approve(hospital.name)
        return invitation

    def types(self) -> list[str]:
        return [decode_entry(data).type for data in self.ledger.entries(0, self.ledger.tree_size)]

    def bodies(self, kind: type) -> list:
        found = [decode_entry(data).body for data in self.ledger.entries(0, self.ledger.tree_size)]
        return [body for body in found if isinstance(body, kind)]


@pytest.fixture
def office(tmp_path):
    clock = TurnedClock()
    signer = NoteSigner(ORIGIN, SigningKey.generate(), KeyType.ED25519)
    with Ledger.create(tmp_path / "log.db", ORIGIN) as ledger:
        yield Office(Membership(ledger, tmp_path / "network", clock), ledger, clock, signer.vkey, tmp_path)
