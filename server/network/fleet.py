"""What a SuperNode may say to SuperLink, checked before SuperLink hears it.

Flower signs the time alone, not the body, and does not compare a reply's source with the key that
authenticated; both are settled here. A request passes when its key belongs to an approved site, its
signature is fresh and was never seen, and every node id in its body is the one registered for that key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.run_pb2 import GetRunRequest
from google.protobuf.message import DecodeError, Message

from audit.membership import NODE_REFUSALS
from federation.network.pki import node_fingerprint, node_key_text
from federation.network.roster import Roster
from server.network.limits import OnceOnly

SMALL_BYTES: Final = 64 << 10
FLEET: Final[dict[str, tuple[type[Message], int | None]]] = {
    "/v1/fleet/activate-node": (ActivateNodeRequest, SMALL_BYTES),
    "/v1/fleet/deactivate-node": (DeactivateNodeRequest, SMALL_BYTES),
    "/v1/fleet/send-node-heartbeat": (SendNodeHeartbeatRequest, SMALL_BYTES),
    "/v1/fleet/pull-messages": (PullMessagesRequest, SMALL_BYTES),
    "/v1/fleet/push-messages": (PushMessagesRequest, 1 << 20),
    "/v1/fleet/get-run": (GetRunRequest, SMALL_BYTES),
    "/v1/fleet/get-fab": (GetFabRequest, SMALL_BYTES),
    "/v1/fleet/push-object": (PushObjectRequest, None),
    "/v1/fleet/pull-object": (PullObjectRequest, SMALL_BYTES),
    "/v1/fleet/confirm-message-received": (ConfirmMessageReceivedRequest, SMALL_BYTES),
}
"""The routes that pass, what their bodies are, and how long those may be (None: the gateway's limit).
register-node and unregister-node are not among them: keys come in by invitation.
"""

PUBLIC_KEY_HEADER: Final = "flwr-public-key"
SIGNATURE_HEADER: Final = "flwr-signature"
TIMESTAMP_HEADER: Final = "flwr-timestamp"
OLDEST_S: Final = 120.0  # Flower allows 305; the retries of one request sign anew
NEWEST_S: Final = 10.0


class NodeRefusedError(Exception):
    """The gateway turns a request away; `reason` is of the closed list, or "" for plain noise."""

    code = "network.node_refused"

    def __init__(self, reason: str, *, site: str = "", fingerprint: str = "", status: int = 401) -> None:
        assert reason in NODE_REFUSALS or not reason  # noqa: S101 - a closed list
        super().__init__(reason or "malformed")
        self.reason, self.site, self.fingerprint, self.status = reason, site, fingerprint, status


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeIdentity:
    """Whose key a request was signed with."""

    site: str
    node_key: str
    pem: bytes  # as it stood in the header, which is what SuperLink compares
    fingerprint: str


class FleetGate:
    """Authenticates headers, then compares bodies. `node_id_of` gives SuperLink's id of a key, or None."""

    def __init__(
        self,
        roster: Roster,
        node_id_of: Callable[[str], int | None],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._roster, self._node_id_of, self._clock = roster, node_id_of, clock
        self._once = OnceOnly(OLDEST_S + NEWEST_S + 5)

    def authenticate(self, headers: Mapping[str, str]) -> NodeIdentity:
        """Prove who sends, from the headers alone; no byte of a body is read before.

        Raises:
            NodeRefusedError: the key is no approved site's, or the signature stale, wrong or used.
        """
        try:
            pem = base64.b64decode(headers[PUBLIC_KEY_HEADER], validate=True)
            signature = base64.b64decode(headers[SIGNATURE_HEADER], validate=True)
            timestamp = headers[TIMESTAMP_HEADER]
            signed_at = datetime.fromisoformat(timestamp)
            age = (self._clock() - signed_at).total_seconds()
            key = serialization.load_pem_public_key(pem)
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("no EC key")
            key.verify(signature, timestamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
            node_key = node_key_text(key)
        except (
            KeyError, ValueError, TypeError, UnicodeError, binascii.Error,
            InvalidSignature, UnsupportedAlgorithm,
        ) as error:  # fmt: skip
            raise NodeRefusedError("") from error
        site, fingerprint = self._standing(node_key), node_fingerprint(node_key)
        if not -NEWEST_S < age < OLDEST_S or not self._once.is_new(
            hashlib.sha256(node_key.encode() + timestamp.encode()).digest()
        ):
            raise NodeRefusedError("replayed", site=site, fingerprint=fingerprint)
        return NodeIdentity(site=site, node_key=node_key, pem=pem, fingerprint=fingerprint)

    def check_standing(self, node: NodeIdentity) -> None:
        """Prove that the node's site still belongs, for a request that has waited.

        Raises:
            NodeRefusedError: it does not any more.
        """
        self._standing(node.node_key)

    def _standing(self, node_key: str) -> str:
        """Return the approved site whose present key this is."""
        member, fingerprint = self._roster.of_node_key(node_key), node_fingerprint(node_key)
        if member is None:
            raise NodeRefusedError("unregistered", fingerprint=fingerprint)
        standing = member.standing(self._clock())
        if standing in ("revoked", "left", "expired"):
            raise NodeRefusedError(standing, site=member.site, fingerprint=fingerprint)
        if standing != "approved" or member.node_key != node_key:
            raise NodeRefusedError("unregistered", site=member.site, fingerprint=fingerprint)
        return member.site

    def check_body(self, path: str, node: NodeIdentity, body: bytes) -> None:
        """Prove that the body speaks for the node that signed.

        Raises:
            NodeRefusedError: it names another node, or cannot be read; 503 while SuperLink does not know
                the key yet.
        """
        kind, _ = FLEET[path]
        try:
            message: Any = kind.FromString(body)
        except DecodeError as error:
            raise NodeRefusedError("", status=400) from error
        if isinstance(message, ActivateNodeRequest):
            self._require(bytes(message.public_key) == node.pem, node)
            if self._node_id_of(node.node_key) is None:
                raise NodeRefusedError("", status=503)
            return
        node_id = self._node_id_of(node.node_key)
        if node_id is None:
            raise NodeRefusedError("", status=503)
        said = message.node_id if isinstance(message, DeactivateNodeRequest) else message.node.node_id
        self._require(said == node_id, node)
        if isinstance(message, PushMessagesRequest):
            self._require(
                len(message.messages_list) == len(message.message_object_trees) == 1
                and message.messages_list[0].metadata.src_node_id == node_id,
                node,
            )

    def _require(self, condition: bool, node: NodeIdentity) -> None:
        if not condition:
            raise NodeRefusedError("forged_source", site=node.site, fingerprint=node.fingerprint)
