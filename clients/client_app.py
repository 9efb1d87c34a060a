"""The Flower ClientApp: a relay that carries bytes between the coordinator and the site's agent.

It is the only code of a site that a coordinator may replace, so it is trusted with nothing: it holds no
data, no model, no key and no budget, and imports neither torch nor pandas nor the agent. What the agent
answers is signed; what goes wrong here leaves as one code from the closed list, because Flower would send
an exception's text along.

A message's content is `{"header": {"kind": str, "header": bytes}, "blobs": {name: bytes}}`. Kind "round"
travels as Flower's "train", every other kind as "query". Large blobs come and go in pieces
(`federation.pieces`).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Final

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from clients.errors import LinkError
from clients.link import DEFAULT_TARGET, MAX_HEADER_BYTES, connect
from federation.pieces import PiecesError, blob_records, read_blobs

_logger = logging.getLogger(__name__)

ROUND_KINDS: Final = frozenset({"round"})
QUERY_KINDS: Final = frozenset(
    {
        "hello",
        "charter.sign",
        "run.propose",
        "cosign",
        "run.undelivered",
        "run.finished",
        "masked.keys",
        "masked.shares",
        "masked.survivors",
        "masked.open",
    }
)

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return relay(message, context, ROUND_KINDS)


@app.query()
def query(message: Message, context: Context) -> Message:
    return relay(message, context, QUERY_KINDS)


def relay(message: Message, context: Context, kinds: frozenset[str]) -> Message:
    """Hand the message's bytes to the agent and return its answer, or one closed code."""
    try:
        kind, header, blobs = unpack(message.content)
        if kind not in kinds:
            raise LinkError(f"kind {kind!r} does not travel as this type of message")
        target, site = _address(context)
        answer, answer_blobs = connect(target, site).handle(kind, header, blobs)
    except Exception:
        _logger.exception("the relay could not carry a message to its agent")
        return Message(pack("error", json.dumps({"error": "internal_error"}).encode(), {}), reply_to=message)
    return Message(pack(kind, answer, answer_blobs), reply_to=message)


def pack(kind: str, header: bytes, blobs: Mapping[str, bytes]) -> RecordDict:
    return RecordDict({"header": ConfigRecord({"kind": kind, "header": header}), **blob_records(blobs)})


def unpack(content: RecordDict) -> tuple[str, bytes, dict[str, bytes]]:
    """Read a message's content strictly.

    Raises:
        LinkError: a record is missing, of another type, or too large.
    """
    header_record = content.get("header")
    if not isinstance(header_record, ConfigRecord):
        raise LinkError("a message holds the records 'header' and 'blobs'")
    kind, header = header_record.get("kind"), header_record.get("header")
    if not isinstance(kind, str) or not isinstance(header, bytes) or len(header) > MAX_HEADER_BYTES:
        raise LinkError(f"'header' holds a kind and at most {MAX_HEADER_BYTES} bytes")
    try:
        return kind, header, read_blobs(content)
    except PiecesError as error:
        raise LinkError(f"{error.code}: {error}") from error


def _address(context: Context) -> tuple[str, str]:
    """The site's own configuration says where its agent is; nothing a coordinator sends can."""
    target = str(context.node_config.get("agent") or os.environ.get("AFFIDAVIT_AGENT") or DEFAULT_TARGET)
    site = context.node_config.get("site")
    if site is None:  # Flower's simulation numbers its nodes and gives them no configuration of their own
        names = [name for name in os.environ.get("AFFIDAVIT_SITES", "").split(",") if name]
        position = context.node_config.get("partition-id")
        if not isinstance(position, int) or not 0 <= position < len(names):
            raise LinkError(
                'the node does not say which site it is; start it with --node-config site="<name>"'
            )
        site = names[position]
    return target, str(site)
