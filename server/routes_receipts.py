"""Receipts by the id that an answer bears: the C2SP tlog-proof of its entry, once a checkpoint holds it."""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import PlainTextResponse, Response

from server.context import Caller, context_of
from server.errors import ReceiptNotFoundError
from server.routes_audit import Wait, proof_of
from server.schemas import problems

router = APIRouter(prefix="/v1/receipts", tags=["audit"])


@router.get(
    "/{receipt_id}",
    summary="Fetch an answer's proof (tlog-proof file)",
    response_class=PlainTextResponse,
    responses=problems(401, 403, 404, 503),
)
async def fetch_receipt(
    request: Request,
    principal: Caller,
    receipt_id: Annotated[
        str, Path(pattern=r"^[0-9a-f]{32}$", description="`entry.id` of the answer, or `entry_id`.")
    ],
    wait: Wait = "checkpointed",
) -> Response:
    """A C2SP tlog-proof file of the entry that the answer rests on, under a signed checkpoint.

    With `wait=witnessed` it waits, ten seconds at most, for the quorum's cosignatures. `503` with
    `audit.not_yet` means: not so far yet; ask again.
    """
    found = await to_thread.run_sync(context_of(request).coordinator.ledger.find_event, receipt_id)
    if found is None:
        raise ReceiptNotFoundError(f"no answer has the id {receipt_id}")
    return await proof_of(request, principal, found.leaf_index, wait, as_text=True)
