"""The Flower ClientApp: a relay that carries bytes between the coordinator and the site's agent.

It is the only code of a site that a coordinator may replace, so it is trusted with nothing: it holds no
data, no model, no key and no budget, and imports neither torch nor pandas nor the agent. What the agent
answers is signed; what goes wrong here leaves as one code from the closed list, because Flower would send
an exception's text along.

A message holds a kind, a header and blobs (`federation.pieces`). Kind "round" travels as Flower's "train",
every other kind as "query". A query may hold several kinds and as many headers, without blobs: the agent is
asked one after the other, as long as it does not answer with an error.
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
from clients.link import DEFAULT_TARGET, MAX_HEADER_BYTES, AgentLink, connect
from federation.pieces import PiecesError, message_content, read_blobs

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

MAX_SEVERAL: Final = 4  # questions in one message

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
        asked, blobs = unpack_all(message.content)
        for kind, _ in asked:
            if kind not in kinds or (len(asked) > 1 and kind in ROUND_KINDS):
                raise LinkError(f"kind {kind!r} does not travel as this type of message")
        content = _carry(connect(*_address(context)), asked, blobs)
    except Exception:
        _logger.exception("the relay could not carry a message to its agent")
        content = pack("error", json.dumps({"error": "internal_error"}).encode(), {})
    return Message(content, reply_to=message)


def _carry(link: AgentLink, asked: list[tuple[str, bytes]], blobs: Mapping[str, bytes]) -> RecordDict:
    """Return the content of the reply: the agent's answers, up to the first that is an error."""
    if len(asked) == 1:
        kind, header = asked[0]
        answer, answer_blobs = link.handle(kind, header, blobs)
        return pack(kind, answer, answer_blobs)
    answers: list[bytes] = []
    for kind, header in asked:
        answer, answer_blobs = link.handle(kind, header, {})
        if answer_blobs:
            raise LinkError(f"kind {kind!r} has blobs in its answer and is asked alone")
        answers.append(answer)
        found = json.loads(answer)
        if not isinstance(found, dict) or "error" in found:
            break
    return message_content([kind for kind, _ in asked[: len(answers)]], answers, {})


def pack(kind: str, header: bytes, blobs: Mapping[str, bytes]) -> RecordDict:
    return message_content(kind, header, blobs)


def unpack(content: RecordDict) -> tuple[str, bytes, dict[str, bytes]]:
    """Read a message's content strictly.

    Raises:
        LinkError: a record is missing, of another type, or too large.
    """
    header_record = content.get("header")
    if not isinstance(header_record, ConfigRecord):
        raise LinkError("a message holds the record 'header'")
    kind, header = header_record.get("kind"), header_record.get("header")
    if not isinstance(kind, str) or not isinstance(header, bytes) or len(header) > MAX_HEADER_BYTES:
        raise LinkError(f"'header' holds a kind and at most {MAX_HEADER_BYTES} bytes")
    try:
        return kind, header, read_blobs(content)
    except PiecesError as error:
        raise LinkError(f"{error.code}: {error}") from error


def unpack_all(content: RecordDict) -> tuple[list[tuple[str, bytes]], dict[str, bytes]]:
    """Read the questions of a message and its blobs, strictly: one with any, or two and more without.

    Raises:
        LinkError: as `unpack`.
    """
    record = content.get("header")
    kinds = record.get("kind") if isinstance(record, ConfigRecord) else None
    if not isinstance(record, ConfigRecord) or not isinstance(kinds, list):
        kind, header, blobs = unpack(content)
        return [(kind, header)], blobs
    headers = record.get("header")
    if set(content) != {"header"} or set(record) != {"kind", "header"} or not isinstance(headers, list):
        raise LinkError("several questions are one record of kinds and headers")
    if not 2 <= len(kinds) <= MAX_SEVERAL or len(kinds) != len(headers):
        raise LinkError(f"several questions are two to {MAX_SEVERAL} kinds and as many headers")
    asked: list[tuple[str, bytes]] = []
    pairs: list[tuple[object, object]] = list(zip(kinds, headers, strict=True))
    for name, said in pairs:
        if not isinstance(name, str) or not isinstance(said, bytes) or len(said) > MAX_HEADER_BYTES:
            raise LinkError(f"a question is a kind and at most {MAX_HEADER_BYTES} bytes")
        asked.append((name, said))
    return asked, {}


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
