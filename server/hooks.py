"""What others add to a prediction without touching its path: facts before the decision, annotations and
observations after the answer.

Order in `server.service`: every `FactProvider` - the decision - the answers - every `Annotator` - the entry -
every `Observer`. Whoever raises stops the prediction before anything is in the log, except an observer, whose
failure is logged: its entry is durable and its answer true.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

from audit.principal import AttributeValue, Decision, Principal

if TYPE_CHECKING:
    from server.answers import Answered, Asked
    from server.live import ServedVersion

_logger = logging.getLogger(__name__)

B = TypeVar("B", bound=Any)
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})

# Each request makes several of these; a frozen dataclass would cost four times as much to make.


class Facts(NamedTuple):
    """What the policies may know: of the model (`resource`) and of the request (`context`)."""

    resource: Mapping[str, AttributeValue] = _NONE
    context: Mapping[str, AttributeValue] = _NONE


NO_FACTS: Final = Facts()


class Answering(NamedTuple):
    """An allowed request and its answers, before the entry is written."""

    principal: Principal
    asked: Asked
    served: ServedVersion
    decision: Decision
    plain: Sequence[Mapping[str, Any]]  # the rows as they are committed to
    encoded: Sequence[Sequence[float]]  # the rows as the model sees them
    answers: tuple[dict[str, Any], ...]  # numbers as decimal text
    margins: tuple[float | None, ...] = ()  # by the exact outputs, where the charter restricts answers


class Annotation(NamedTuple):
    """What one annotator adds."""

    shown: Mapping[str, Any] = _NONE  # members of the answer's `annotations`
    body: Mapping[str, Any] = _NONE  # fields of the `Prediction` entry
    rows: Sequence[Mapping[str, Any]] = ()  # for each row, what is committed to and sealed with its answer

    def outputs(self, answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers as they are committed to: each with what was added to its row."""
        added = self.rows or ({},) * len(answers)
        return [{**answer, **more} for answer, more in zip(answers, added, strict=True)]


NOTHING: Final = Annotation()


class FactProvider(Protocol):
    """Gathers facts; the names it gives must stand in the policies' schema.

    One that looks at who asks, at the version and at the request's purpose, legal basis and consent, and at
    nothing else of the request, may say so (`is_shared = True`): it is then asked once for all such requests
    of one moment.
    """

    def facts(self, principal: Principal, asked: Asked, served: ServedVersion) -> Facts:
        """Return what is known now; quick, because it is on every request's path."""
        ...


class Annotator(Protocol):
    """Adds to an answer; returns an awaitable where that takes long."""

    def annotate(self, answering: Answering) -> Annotation | Awaitable[Annotation]:
        """Return what is to be shown, and what the entry is to hold."""
        ...


class Observer(Protocol):
    """Looks at what was answered, once that is durable."""

    def observe(self, answering: Answering, answered: Answered) -> None:
        """Count, compare, remember; quick."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """All that was registered, in the order in which it is called."""

    facts: tuple[FactProvider, ...] = ()
    annotators: tuple[Annotator, ...] = ()
    observers: tuple[Observer, ...] = ()

    @property
    def are_shared(self) -> bool:
        """Whether every provider of facts says that it looks at nothing that is a request's own."""
        return all(getattr(provider, "is_shared", False) for provider in self.facts)

    def gather(self, principal: Principal, asked: Asked, served: ServedVersion) -> Facts:
        """Return every provider's facts as one; a later provider's word replaces an earlier one's."""
        found = [provider.facts(principal, asked, served) for provider in self.facts]
        said = [facts for facts in found if facts is not NO_FACTS]
        if len(said) == 1:
            return said[0]
        resource: dict[str, AttributeValue] = {}
        context: dict[str, AttributeValue] = {}
        for facts in said:
            resource.update(facts.resource)
            context.update(facts.context)
        return Facts(resource=resource, context=context)

    def annotate_now(self, answering: Answering) -> Annotation | None:
        """`annotate` without waiting; None where an annotator would take long."""
        found = []
        for annotator in self.annotators:
            added = annotator.annotate(answering)
            if not isinstance(added, Annotation):
                if isinstance(added, Coroutine):
                    added.close()  # it was not begun
                return None
            found.append(added)
        return _together(found, answering)

    async def annotate(self, answering: Answering) -> Annotation:
        """Return every annotator's additions as one."""
        found = []
        for annotator in self.annotators:
            added = annotator.annotate(answering)
            found.append(added if isinstance(added, Annotation) else await added)
        return _together(found, answering)

    def observe(self, answering: Answering, answered: Answered) -> None:
        """Tell every observer; the answer goes out whatever they do."""
        for observer in self.observers:
            try:
                observer.observe(answering, answered)
            except Exception:  # the entry is durable: the caller is owed the answer
                _logger.exception("an observer failed: request=%s", answered.request_id)


def _together(found: Sequence[Annotation], answering: Answering) -> Annotation:
    said = [added for added in found if added is not NOTHING]
    if len(said) == 1 and len(said[0].rows) == len(answering.answers):
        return said[0]
    shown: dict[str, Any] = {}
    body: dict[str, Any] = {}
    rows: list[dict[str, Any]] = [{} for _ in answering.answers]
    for added in said:
        shown.update(added.shown)
        body.update(added.body)
        for row, more in zip(rows, added.rows, strict=False):
            row.update(more)
    return Annotation(shown=shown, body=body, rows=rows)


def with_fields(body: B, fields: Mapping[str, Any]) -> B:
    """Return an entry's body with an annotation's fields."""
    changed: B = replace(body, **fields) if fields else body
    return changed
