"""A proof beside an answer, for whoever would rather wait than come back for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import to_thread

from audit.checkpoints import parse_checkpoint_note
from audit.principal import Principal
from audit.tlog_proof import TlogProof
from server.answers import Answered, Asked
from server.context import Context
from server.watching import MAX_WAIT_S, Level

Told = TypeVar("Told")


async def answer(
    context: Context,
    principal: Principal,
    read: Callable[[], Asked],
    tell: Callable[[Answered], Told],
    wait: Callable[[], Level],
) -> Told:
    """`PredictService.answer`, told with the proof of a level, which may be known only once it is read."""

    def at_once(answered: Answered) -> Told | Answered:
        return tell(answered) if wait() == "sequenced" else answered

    told = await context.predicting.answer(principal, read, at_once)
    return tell(await proved(context, told, wait())) if isinstance(told, Answered) else told


async def proved(context: Context, answered: Answered, wait: Level) -> Answered:
    """The answer with a proof of the level asked for, or of the one below where that did not come in time."""
    if wait == "sequenced":
        return answered
    index, ledger = answered.leaf_index, context.coordinator.ledger
    timeout_s = min(MAX_WAIT_S, context.settings.request_timeout_s / 2)
    level, note = wait, await context.watching.wait(index, wait, timeout_s)
    if note is None and wait == "witnessed":
        level, note = "checkpointed", await context.watching.wait(index, "checkpointed", 0.2)
    if note is None:
        return answered
    size = parse_checkpoint_note(note).tree_size
    hashes = await to_thread.run_sync(ledger.inclusion_proof, index, size)
    proof = TlogProof(leaf_index=index, hashes=tuple(hashes), checkpoint_note=note).format()
    return answered._replace(level=level, proof=proof.decode())
